"""Each row once, each batch within its bounds, and the same optimizer steps on any number of devices."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from toss_lightning.data.batching import (
    BatchLoader,
    PassBatches,
    StageRows,
    StepBatches,
    StepPlan,
    collate,
    plan_pass,
    plan_steps,
)
from toss_lightning.data.tokenize import TokenizedRow
from toss_lightning.errors import ConfigError

LENGTHS = np.random.default_rng(7).integers(3, 60, 53).tolist()
setups = pytest.mark.parametrize(
    ("batch_size", "max_tokens", "world_size"),
    [(8, 120, 1), (8, 120, 2), (8, 60, 3), (5, 10_000, 4), (1, 60, 2), (64, 120, 2), (53, 200, 7)],
)


def make_row(row_id: int, length: int, replies: int | None = None) -> TokenizedRow:
    """A row of the ids 1, 2, 3, ...; its last tokens are response."""
    count = length // 2 if replies is None else replies
    ends = np.zeros(count, dtype=bool)
    ends[-1:] = True
    return TokenizedRow(
        row_id,
        np.arange(1, length + 1, dtype=np.int32),
        np.arange(length - count, length, dtype=np.int32),
        ends,
    )


def make_rows(lengths: list[int]) -> list[TokenizedRow]:
    return [make_row(100 + number, length) for number, length in enumerate(lengths)]


def some_weights(rows: list[TokenizedRow]) -> dict[int, np.ndarray]:
    """Weights of which many are 0, and one row's all."""
    draw = np.random.default_rng(3)
    weights = {row.row_id: draw.choice([0, 0.25, 1], len(row.response_positions)).astype(np.float32) for row in rows}
    weights[rows[4].row_id][:] = 0
    return weights


def weighted(rows: list[TokenizedRow], weights: dict[int, np.ndarray]) -> StageRows:
    """A stage on rows of which a selection speaks."""
    return StageRows(rows, [{"weight": weights[row.row_id]} for row in rows], [True] * len(rows))


def members(step: list[list[tuple[int, ...]]]) -> list[int]:
    return sorted(row for rank in step for group in rank for row in group)


def served(batches: StepBatches) -> list[dict]:
    """The batches of an epoch."""
    return [batches[index] for index in range(len(batches))]


# --- steps --------------------------------------------------------------------------------------------------------


@setups
def test_every_row_stands_once_in_each_epoch(batch_size, max_tokens, world_size):
    plan = plan_steps(LENGTHS, batch_size, max_tokens, epochs=3, world_size=world_size)
    assert len(plan.steps) == 3
    for epoch in plan.steps:
        assert sorted(row for step in epoch for row in members(step)) == list(range(len(LENGTHS)))


@setups
def test_steps_hold_batch_size_rows_and_only_the_last_fewer(batch_size, max_tokens, world_size):
    plan = plan_steps(LENGTHS, batch_size, max_tokens, epochs=2, world_size=world_size)
    assert plan.steps_per_epoch == -(-len(LENGTHS) // batch_size)
    for epoch in plan.steps:
        sizes = [len(members(step)) for step in epoch]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
        assert sizes[-1] == len(LENGTHS) - batch_size * (len(sizes) - 1)


@setups
def test_no_micro_batch_exceeds_max_tokens(batch_size, max_tokens, world_size):
    plan = plan_steps(LENGTHS, batch_size, max_tokens, epochs=2, world_size=world_size)
    groups = [group for epoch in plan.steps for step in epoch for rank in step for group in rank if group]
    assert all(len(group) * max(LENGTHS[row] for row in group) <= max_tokens for group in groups)


@setups
def test_each_rank_runs_as_many_micro_batches_in_every_step(batch_size, max_tokens, world_size):
    plan = plan_steps(LENGTHS, batch_size, max_tokens, epochs=2, world_size=world_size)
    assert {len(step) for epoch in plan.steps for step in epoch} == {world_size}
    assert {len(rank) for epoch in plan.steps for step in epoch for rank in step} == {plan.accumulate}


@setups
def test_the_rows_of_a_step_depend_on_no_device(batch_size, max_tokens, world_size):
    alone = plan_steps(LENGTHS, batch_size, 10_000, epochs=2)
    spread = plan_steps(LENGTHS, batch_size, max_tokens, epochs=2, world_size=world_size)
    for epoch, other in zip(alone.steps, spread.steps, strict=True):
        assert [members(step) for step in epoch] == [members(step) for step in other]


def test_epochs_are_shuffled_differently_and_the_same_when_planned_again():
    one, again, other = (plan_steps(LENGTHS, 8, 120, epochs=3, seed=seed) for seed in (5, 5, 6))
    assert one == again
    orders = [[members(step) for step in epoch] for plan in (one, other) for epoch in plan.steps]
    assert all(orders[i] != orders[j] for i in range(6) for j in range(i))


def test_the_first_epochs_do_not_depend_on_how_many_follow():
    assert plan_steps(LENGTHS, 8, 10_000, epochs=1).steps == plan_steps(LENGTHS, 8, 10_000, epochs=4).steps[:1]


def test_rows_are_packed_longest_first_and_shared_out():
    plan = plan_steps([2, 9, 3, 8], batch_size=4, max_tokens=18, epochs=1)
    assert plan == StepPlan([[[[(1, 3), (2, 0)]]]], accumulate=2)
    plan = plan_steps([2, 9, 3, 8], batch_size=4, max_tokens=18, epochs=1, world_size=2)
    assert plan == StepPlan([[[[(1, 3)], [(2, 0)]]]], accumulate=1)


def test_ranks_without_a_row_run_empty_micro_batches():
    plan = plan_steps([5], batch_size=4, max_tokens=10, epochs=1, world_size=3)
    assert plan.steps == [[[[(0,)], [()], [()]]]]


@pytest.mark.parametrize("plan", [lambda: plan_steps([5, 11], 2, 10, 1), lambda: plan_pass([5, 11], 10)])
def test_a_row_longer_than_max_tokens(plan):
    with pytest.raises(
        ConfigError, match=r"^data\.max_tokens: 10 holds no row of 11 tokens: raise it, or lower data.max_l"
    ):
        plan()


# --- what a step sums up ------------------------------------------------------------------------------------------


@setups
def test_step_totals_are_the_sums_over_all_ranks(batch_size, max_tokens, world_size):
    rows = make_rows(LENGTHS)
    weights = some_weights(rows)
    plan = plan_steps(LENGTHS, batch_size, max_tokens, epochs=2, world_size=world_size)
    ranks = [StepBatches(weighted(rows, weights), plan, rank) for rank in range(world_size)]
    seen = []
    for step in range(plan.steps_per_epoch):
        at = range(step * plan.accumulate, (step + 1) * plan.accumulate)
        batches = [ranks[rank][index] for rank in range(world_size) for index in at]
        ids = [int(row) for batch in batches for row in batch["row_id"]]
        tokens = sum(len(batch["weight"]) for batch in batches)
        weight = sum(batch["weight"].double().sum().item() for batch in batches)
        counted = sum(weights[row].any() for row in ids)
        assert {batch["step_tokens"] for batch in batches} == {tokens}
        assert [batch["step_weight"] for batch in batches] == pytest.approx([weight] * len(batches))
        assert {batch["step_rows"] for batch in batches} == {counted}
        assert {batch["companion_tokens"] for batch in batches} == {0}
        seen += ids
    assert sorted(seen) == sorted(weights)
    assert len(ranks[0]) == plan.steps_per_epoch * plan.accumulate


def test_a_token_without_a_given_weight_weighs_1():
    plan = plan_steps([4, 6], 2, 100, 1)
    batch = StepBatches(StageRows.plain(make_rows([4, 6])), plan)[0]
    assert batch["weight"].tolist() == [1.0] * 5
    assert (batch["step_tokens"], batch["step_weight"], batch["step_rows"]) == (5.0, 5.0, 2.0)
    assert not batch["selected"].any()
    assert not batch["companion"].any()


def test_values_that_only_some_rows_have_are_0_elsewhere_and_a_weight_is_1():
    rows = make_rows([4, 6, 2])
    values = [{"anchor": np.float32([0.5, 2])}, {"weight": np.float32([0, 0, 0.25]), "loss_base": np.ones(3)}, {}]
    stage = StageRows(rows, values, [True, True, False])
    assert stage.names == ["anchor", "loss_base", "weight"]
    batch = StepBatches(stage, plan_steps([4, 6, 2], 3, 100, 1))[0]
    # longest first
    assert batch["index"].tolist() == [1, 0, 2]
    assert batch["selected"].tolist() == [True, True, False]
    assert batch["weight"].tolist() == [0, 0, 0.25, 1, 1, 1]
    assert batch["anchor"].tolist() == [0, 0, 0, 0.5, 2, 0]
    assert batch["loss_base"].tolist() == [1, 1, 1, 0, 0, 0]
    assert (batch["step_tokens"], batch["step_weight"], batch["step_rows"]) == (6.0, 3.25, 3.0)


@setups
def test_a_row_has_the_same_place_in_the_stage_in_every_epoch_and_on_every_rank(batch_size, max_tokens, world_size):
    rows = make_rows(LENGTHS)
    plan = plan_steps(LENGTHS, batch_size, max_tokens, epochs=2, world_size=world_size)
    ranks = [StepBatches(StageRows.plain(rows), plan, rank) for rank in range(world_size)]
    for epoch in range(2):
        for batches in ranks:
            batches.epoch = epoch
        places = [(batch["index"] + 100).tolist() for batches in ranks for batch in served(batches)]
        assert places == [batch["row_id"].tolist() for batches in ranks for batch in served(batches)]
        assert sorted(place for batch in places for place in batch) == list(range(100, 100 + len(rows)))


# --- companions ---------------------------------------------------------------------------------------------------

OWN = 40
"""Rows of LENGTHS that are a stage's own; the others are companions."""
beside = pytest.mark.parametrize("per_step", [1, 3, 12, 13])


def with_companions(per_step: int, *, batch_size=8, max_tokens=120, world_size=1, epochs=3, seed=0) -> StepPlan:
    return plan_steps(LENGTHS, batch_size, max_tokens, epochs, world_size, seed, len(LENGTHS) - OWN, per_step)


def companions_of(plan: StepPlan) -> list[list[int]]:
    """Those of each step, epochs one after the other."""
    return [[row for row in members(step) if row >= OWN] for epoch in plan.steps for step in epoch]


@beside
@setups
def test_each_step_has_so_many_different_companions_beside_its_rows(batch_size, max_tokens, world_size, per_step):
    plan = with_companions(per_step, batch_size=batch_size, max_tokens=max_tokens, world_size=world_size)
    assert [len(set(found)) for found in companions_of(plan)] == [per_step] * 3 * plan.steps_per_epoch
    without = plan_steps(LENGTHS[:OWN], batch_size, max_tokens, epochs=3, world_size=world_size)
    for epoch, other in zip(plan.steps, without.steps, strict=True):
        own = [[row for row in members(step) if row < OWN] for step in epoch]
        assert own == [members(step) for step in other], "companions change nothing about the others"
        assert all(len(rank) == plan.accumulate for step in epoch for rank in step)
    groups = [group for epoch in plan.steps for step in epoch for rank in step for group in rank if group]
    assert all(len(group) * max(LENGTHS[row] for row in group) <= max_tokens for group in groups)


@beside
def test_each_companion_comes_once_before_any_comes_again(per_step):
    plan = with_companions(per_step, batch_size=3)
    counted = Counter(dict.fromkeys(range(OWN, len(LENGTHS)), 0))
    for found in companions_of(plan):
        counted.update(found)
        assert max(counted.values()) - min(counted.values()) <= 1
    assert max(counted.values()) > 1


def test_companions_come_in_another_order_each_time():
    order = [row for found in companions_of(with_companions(1, batch_size=3)) for row in found]
    assert sorted(order[:13]) == sorted(order[13:26]) == list(range(OWN, 53))
    assert order[:13] != order[13:26]


def test_where_there_are_fewer_companions_than_wanted_all_of_them_stand_in_each_step():
    assert companions_of(with_companions(99)) == companions_of(with_companions(13)) == [list(range(OWN, 53))] * 15


@setups
def test_the_companions_of_a_step_depend_on_no_device(batch_size, max_tokens, world_size):
    alone = with_companions(5, batch_size=batch_size, max_tokens=10_000)
    spread = with_companions(5, batch_size=batch_size, max_tokens=max_tokens, world_size=world_size)
    assert companions_of(alone) == companions_of(spread)


def test_companions_are_drawn_the_same_when_planned_again_and_others_with_another_seed():
    one, again, other = (with_companions(3, seed=seed) for seed in (5, 5, 6))
    assert one == again
    assert companions_of(one) != companions_of(other)
    # those of the first epochs do not depend on how many follow, and those of the second are not those of the first
    short = companions_of(with_companions(3, epochs=1, seed=5))
    assert companions_of(one)[: len(short)] == short != companions_of(one)[len(short) : 2 * len(short)]


@setups
def test_the_totals_of_a_step_do_not_count_its_companions(batch_size, max_tokens, world_size):
    rows = make_rows(LENGTHS)
    weights = some_weights(rows)
    stage = replace(weighted(rows, weights), companions=len(LENGTHS) - OWN, per_step=3)
    assert stage.own == OWN
    plan = with_companions(3, batch_size=batch_size, max_tokens=max_tokens, world_size=world_size)
    ranks = [StepBatches(stage, plan, rank) for rank in range(world_size)]
    for step in range(plan.steps_per_epoch):
        at = range(step * plan.accumulate, (step + 1) * plan.accumulate)
        batches = [batch[index] for batch in ranks for index in at]
        companion = [bool(one) for batch in batches for one in batch["companion"]]
        ids = [int(row) for batch in batches for row in batch["row_id"]]
        assert companion == [row >= 100 + OWN for row in ids]
        own, beside = ([row for row in ids if (row >= 100 + OWN) == wanted] for wanted in (False, True))
        totals = {
            "step_tokens": sum(len(weights[row]) for row in own),
            "step_weight": sum(weights[row].sum() for row in own),
            "step_rows": sum(weights[row].any() for row in own),
            "companion_tokens": sum(len(weights[row]) for row in beside),
        }
        for batch in batches:
            assert {name: batch[name] for name in totals} == pytest.approx(totals)


# --- whole steps --------------------------------------------------------------------------------------------------


@setups
def test_the_first_micro_batch_of_a_step_brings_all_of_its_rank_where_wanted(batch_size, max_tokens, world_size):
    rows = make_rows(LENGTHS)
    stage = replace(weighted(rows, some_weights(rows)), companions=len(LENGTHS) - OWN, per_step=3, whole_step=True)
    plan = with_companions(3, batch_size=batch_size, max_tokens=max_tokens, world_size=world_size)
    for rank in range(world_size):
        batches = served(StepBatches(stage, plan, rank))
        for first in range(0, len(batches), plan.accumulate):
            step = batches[first : first + plan.accumulate]
            assert all("step" not in batch for batch in step[1:])
            assert len(step[0]["step"]) == plan.accumulate
            for brought, batch in zip(step[0]["step"], step, strict=True):
                for name, value in brought.items():
                    assert torch.equal(value, batch[name]), name
    plain = StepBatches(replace(stage, whole_step=False), plan)
    assert all("step" not in batch for batch in served(plain))


# --- passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 60])
@pytest.mark.parametrize("max_tokens", [60, 500])
def test_a_pass_covers_each_row_once_in_as_many_batches_on_each_rank(world_size, max_tokens):
    ranks = plan_pass(LENGTHS, max_tokens, world_size)
    assert len(ranks) == world_size
    assert len({len(groups) for groups in ranks}) == 1
    assert sorted(row for groups in ranks for group in groups for row in group) == list(range(len(LENGTHS)))
    for groups in ranks:
        assert all(len(group) * max(LENGTHS[row] for row in group) <= max_tokens for group in groups if group)


def test_the_batches_of_a_pass_say_their_set():
    rows = make_rows([4, 6, 5])
    batches = PassBatches(rows, plan_pass([4, 6, 5], 12)[0], "task_loss")
    assert [batch["row_id"].tolist() for batch in BatchLoader(batches)] == [[101, 102], [100]]
    assert [batches[index]["set"] for index in range(len(batches))] == ["task_loss"] * 2
    assert [batches[index]["index"].tolist() for index in range(len(batches))] == [[1, 2], [0]]


# --- collate ------------------------------------------------------------------------------------------------------


def test_collate_pads_on_the_right_and_lists_the_response_tokens_row_by_row():
    values = [{"weight": np.float32([0.5, 0]), "loss_base": np.float32([3, 4])}, {"weight": np.float32([1])}]
    batch = collate([make_row(7, 5, replies=2), make_row(3, 3, replies=1)], values)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert batch["row_id"].tolist() == [7, 3]
    assert batch["row"].tolist() == [0, 0, 1]
    assert batch["position"].tolist() == [3, 4, 2]
    assert batch["ordinal"].tolist() == [0, 1, 0]
    assert batch["length"].tolist() == [5, 3]
    assert batch["weight"].tolist() == [0.5, 0, 1]
    kinds = {name: value.dtype for name, value in batch.items()}
    whole = ("input_ids", "row_id", "length", "row", "position", "ordinal")
    assert kinds == {"weight": torch.float32} | dict.fromkeys(whole, torch.int64)


def test_collate_takes_the_values_that_are_named():
    rows = [make_row(7, 5, replies=2), make_row(3, 3, replies=1)]
    values = [{"loss_base": np.float32([3, 4])}, {"weight": np.float32([0.5]), "anchor": np.float32([2])}]
    batch = collate(rows, values, ["anchor", "loss_base", "weight"])
    assert batch["weight"].tolist() == [1, 1, 0.5]
    assert batch["anchor"].tolist() == [0, 0, 2]
    assert batch["loss_base"].tolist() == [3, 4, 0]
    assert {batch[name].dtype for name in ("anchor", "loss_base", "weight")} == {torch.float32}


def test_positions_point_at_the_response_tokens():
    rows = make_rows([8, 3, 5, 4])
    batch = collate(rows)
    found = batch["input_ids"][batch["row"], batch["position"]]
    assert found.tolist() == [int(token) for row in rows for token in row.input_ids[row.response_positions]]
    assert batch["weight"].tolist() == [1.0] * len(found)


def test_a_batch_of_no_rows_has_the_same_parts():
    names = ["anchor", "weight"]
    empty, full = collate([], [], names), collate(make_rows([4]), None, names)
    assert empty["input_ids"].shape == (0, 0)
    assert all(len(value) == 0 for value in empty.values())
    assert {name: value.dtype for name, value in empty.items()} == {name: value.dtype for name, value in full.items()}


# --- the loader ---------------------------------------------------------------------------------------------------


def loader(num_workers: int = 0, per_step: int = 0) -> BatchLoader:
    rows = make_rows(LENGTHS)
    stage = weighted(rows, some_weights(rows))
    if per_step:
        stage = replace(stage, companions=len(LENGTHS) - OWN, per_step=per_step, whole_step=True)
    plan = plan_steps(LENGTHS, 8, 120, epochs=2, seed=1, companions=stage.companions, per_step=per_step)
    return BatchLoader(StepBatches(stage, plan), num_workers)


def ids(batches) -> list[list[int]]:
    return [batch["row_id"].tolist() for batch in batches]


def ids_of_steps(batches) -> list[list[list[int]]]:
    """What each batch brings of its whole step."""
    return [ids(batch.get("step", [])) for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_serves_the_plan_in_its_order(num_workers):
    served = loader(num_workers)
    expected = loader().batches
    for epoch in (0, 1, 0):
        served.set_epoch(epoch)
        expected.epoch = epoch
        assert ids(served) == ids(expected[index] for index in range(len(expected)))
    counted = Counter(row for batch in ids(served) for row in batch)
    assert counted == Counter(range(100, 100 + len(LENGTHS)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("before", [1, 4, 13])
def test_a_loader_goes_on_behind_the_last_batch_that_was_served(num_workers, epoch, before):
    first, second, whole = loader(num_workers), loader(num_workers), loader()
    for one in (first, second, whole):
        one.set_epoch(epoch)
    started = ids(islice(iter(first), before))
    second.load_state_dict(first.state_dict())
    assert started + ids(second) == ids(whole)
    assert ids(second) == ids(whole)  # the next pass is a whole one


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("before", [1, 4])
def test_a_loader_goes_on_with_the_same_companions_and_whole_steps(num_workers, before):
    first, second, whole = (loader(num_workers, per_step=3) for _ in range(3))
    for one in (first, second, whole):
        one.set_epoch(1)
    for _ in islice(iter(first), before):
        pass
    second.load_state_dict(first.state_dict())
    resumed, undisturbed = list(second), list(whole)[before:]
    assert ids(resumed) == ids(undisturbed)
    assert ids_of_steps(resumed) == ids_of_steps(undisturbed)
    assert any(batch["companion"].any() for batch in resumed)
    assert any("step" in batch for batch in resumed)


def test_a_loader_that_was_not_yet_asked_again_still_knows_where_it_stood():
    first, second, third = loader(), loader(), loader()
    list(islice(iter(first), 3))
    second.load_state_dict(first.state_dict())
    third.load_state_dict(second.state_dict())
    assert ids(third) == ids(loader())[3:]


def test_a_resumed_loader_counts_from_the_start_of_the_epoch():
    first, second = loader(), loader()
    list(islice(iter(first), 3))
    second.load_state_dict(first.state_dict())
    list(islice(iter(second), 2))
    assert second.state_dict() == {"served": 5}


def test_a_pass_that_was_served_to_its_end_is_followed_by_a_whole_one():
    first, second = loader(), loader()
    for _ in islice(iter(first), len(first)):  # as Lightning does, which never asks for one more
        pass
    second.load_state_dict(first.state_dict())
    assert ids(second) == ids(loader())
