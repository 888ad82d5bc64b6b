"""What a stage is served: its own rows with their values, rows that are added, and rows that stand beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CHATML, some_pairs, word_tokenizer, write_rows

from toss_lightning.data import TossDataModule
from toss_lightning.data.mixtures import SafeInstr
from toss_lightning.data.stages import Companions
from toss_lightning.errors import DataError

Make = Callable[..., TossDataModule]


@pytest.fixture
def make(tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A datamodule with its sets read, on one of so many ranks; 14 custom rows and 5 safety rows."""
    safety = write_rows(tmp_path_factory.mktemp("safety") / "safety.jsonl", some_pairs(5, start=3))

    def made(rank: int = 0, ranks: int = 1, **settings: Any) -> TossDataModule:
        given = {**tiny_sets, "safety": safety, "batch_size": 4, "max_tokens": 40, **settings}
        datamodule = TossDataModule(**given)
        module = SimpleNamespace(tokenizer=word_tokenizer())
        datamodule.trainer = SimpleNamespace(lightning_module=module, world_size=ranks, global_rank=rank)  # type: ignore[assignment]
        datamodule.setup("fit")
        return datamodule

    return made


def served(datamodule: TossDataModule, name: str) -> list[tuple[int, list[float]]]:
    """Place in the stage of each row that is served, and one of its tokens' values."""
    return sorted(
        (int(place), batch[name][batch["row"] == at].tolist())
        for batch in datamodule.train_dataloader()
        for at, place in enumerate(batch["index"])
    )


def test_all_tokens_of_a_stage_count_1_by_default(make: Make) -> None:
    datamodule = make()
    datamodule.begin_stage("custom", 1)
    rows = datamodule.sets["custom"].rows
    assert served(datamodule, "weight") == [(at, [1.0] * len(row.response_positions)) for at, row in enumerate(rows)]
    for batch in datamodule.train_dataloader():
        assert not batch["selected"].any()
        assert not batch["companion"].any()
        assert "step" not in batch


def test_values_reach_the_tokens_that_they_are_of(make: Make) -> None:
    datamodule = make()
    rows = datamodule.sets["custom"].rows
    # each token's value names its row and its place in the response
    values = {row.row_id: row.row_id + np.arange(len(row.response_positions), dtype=np.float32) / 32 for row in rows}
    datamodule.begin_stage("custom", 1, {"weight": {row: 2 * one for row, one in values.items()}, "loss_base": values})
    assert served(datamodule, "loss_base") == [(at, values[row.row_id].tolist()) for at, row in enumerate(rows)]
    for batch in datamodule.train_dataloader():
        assert torch.equal(batch["weight"], 2 * batch["loss_base"])
        assert torch.equal(batch["loss_base"], batch["row_id"][batch["row"]] + batch["ordinal"] / 32)
        assert batch["selected"].all()


def test_rows_that_are_left_out_are_in_no_batch(make: Make) -> None:
    datamodule = make()
    datamodule.begin_stage("custom", 1, left_out={0, 5, 6})
    kept = [row for row in datamodule.sets["custom"].rows if row.row_id not in {0, 5, 6}]
    assert datamodule.stage_rows is not None
    assert (datamodule.stage_rows.rows, datamodule.stage_rows.own) == (kept, 11)
    assert len(served(datamodule, "weight")) == 11


def test_promoted_rows_are_served_beside_the_sets_own(make: Make) -> None:
    datamodule = make()
    datamodule.begin_stage("harmful", 1, promoted={3, 11})
    stage, custom = datamodule.stage_rows, datamodule.sets["custom"].rows
    assert stage is not None
    assert stage.rows == [*datamodule.sets["harmful"].rows, custom[3], custom[11]]
    assert [place for place, _ in served(datamodule, "weight")] == list(range(stage.own)) == list(range(7 + 2))


def test_rows_of_the_mixture_are_served_where_they_are_wanted(make: Make) -> None:
    datamodule = make(mixture=SafeInstr(rows=2))
    custom = datamodule.sets["custom"].rows
    weights = {row.row_id: np.zeros(len(row.response_positions), np.float32) for row in custom}
    datamodule.begin_stage("custom", 1, {"weight": weights, "loss_base": weights})
    assert datamodule.stage_rows is not None
    assert len(datamodule.stage_rows.rows) == 14
    datamodule.begin_stage("custom", 1, {"weight": weights, "loss_base": weights}, mixed=True)
    stage = datamodule.stage_rows
    assert stage.rows[:14] == custom
    assert (stage.own, stage.selected) == (16, [True] * 14 + [False] * 2)
    for name, added in (("weight", 1.0), ("loss_base", 0.0)):
        for place, values in served(datamodule, name):
            assert set(values) == {added if place >= 14 else 0.0}


@pytest.mark.parametrize("mixture", [None, SafeInstr(rows=2)])
def test_companions_stand_in_every_step_with_values_of_their_own(make: Make, mixture: SafeInstr | None) -> None:
    datamodule = make(mixture=mixture)
    companions = Companions("safety", 2, {"weight": 0.0, "anchor": 0.5})
    datamodule.begin_stage("custom", 3, mixed=True, companions=companions, whole_step=True)
    own = 16 if mixture else 14
    loader, seen = datamodule.train_dataloader(), 0
    assert datamodule.plan is not None
    assert datamodule.stage_rows is not None
    assert (datamodule.stage_rows.own, datamodule.plan.steps_per_epoch) == (own, -(-own // 4))
    for epoch in range(3):
        loader.set_epoch(epoch)
        steps = [batch["step"] for batch in loader if "step" in batch]
        assert len(steps) == datamodule.plan.steps_per_epoch
        for step in steps:
            beside = [place for batch in step for place in batch["index"][batch["companion"]].tolist()]
            assert len(set(beside)) == 2
            assert all(place >= own for place in beside)
            seen += 2
            for batch in step:
                companion = batch["companion"][batch["row"]]
                assert torch.equal(batch["weight"], (~companion).float())
                assert torch.equal(batch["anchor"], companion / 2)
    assert seen == 3 * 2 * datamodule.plan.steps_per_epoch


def test_companions_without_values_count_as_every_row_does(make: Make) -> None:
    datamodule = make()
    datamodule.begin_stage("custom", 1, companions=Companions("safety", 4))
    for batch in datamodule.train_dataloader():
        assert batch["weight"].eq(1).all()
        assert batch["companion_tokens"] > 0


def test_a_stage_that_follows_forgets_what_stood_beside_the_last_one(make: Make) -> None:
    datamodule = make(mixture=SafeInstr())
    datamodule.begin_stage("custom", 1, mixed=True, companions=Companions("safety", 2), whole_step=True)
    datamodule.begin_stage("custom", 1)
    assert [place for place, _ in served(datamodule, "weight")] == list(range(14))
    assert all("step" not in batch for batch in datamodule.train_dataloader())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_of_some_rows_of_a_set(make: Make, ranks: int) -> None:
    wanted, found = [12, 0, 7, 3], []
    batches = [make(rank, ranks).batches("custom", wanted) for rank in range(ranks)]
    assert len({len(one) for one in batches}) == 1, "every rank runs equally many"
    rows = make().sets["custom"].rows
    for batch in (batch for one in batches for batch in one):
        assert batch["input_ids"].numel() <= 40
        for at, place in enumerate(batch["index"].tolist()):
            found.append(place)
            ids = rows[place].input_ids
            assert batch["input_ids"][at, : len(ids)].tolist() == ids.tolist()
            assert batch["row_id"][at] == rows[place].row_id
    assert sorted(found) == sorted(wanted)


def test_the_mixture_and_the_safety_set_are_part_of_what_a_run_is(make: Make) -> None:
    one, other, none = (make(mixture=mixture).identity() for mixture in (SafeInstr(rows=2), SafeInstr(rows=3), None))
    assert (one["data.mixture"], none["data.mixture"]) == ("SafeInstr count=2, share=None", "none")
    assert {key for key in one if one[key] != other[key]} == {"data.mixture"}
    assert "safety set" in none


# --- settings that reach the reader and the tokenizer -----------------------------------------------------------------


@pytest.fixture
def two_replies(tmp_path: Path) -> str:
    """A set of one row with two replies, of 17 tokens."""
    said = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("train_on", "replies"), [("all", "w2 w3 <end> w5 <end>"), ("last", "w5 <end>")])
def test_the_turns_that_are_trained_on(make: Make, two_replies: str, train_on: str, replies: str) -> None:
    (row,) = make(custom=two_replies, train_on=train_on).sets["custom"].rows
    said = word_tokenizer().decode(row.input_ids[row.response_positions])
    assert said.replace("<|im_end|>", "<end>") == replies


def test_the_other_sets_are_read_before_the_custom_one_which_may_be_large(make: Make) -> None:
    assert [*make().sets] == ["custom", "utility", "harmful", "safety", "utility_val", "harmful_val"]
    with pytest.raises(DataError, match=r"^missing\.jsonl: no such file"):
        make(custom="slow.jsonl", safety="missing.jsonl")


@pytest.mark.parametrize(("overlong", "lengths"), [("drop", []), ("truncate", [12])])
def test_rows_that_are_longer_than_they_may_be(
    make: Make, two_replies: str, tmp_path: Path, overlong: str, lengths: list[int]
) -> None:
    short = write_rows(tmp_path / "short.jsonl", [("w1", "w2")])
    custom = make(custom=[short, two_replies], max_length=12, overlong=overlong).sets["custom"]
    assert [len(row.input_ids) for row in custom.rows] == [8, *lengths]
    assert (custom.truncated, custom.overlong) == (len(lengths), 1 - len(lengths))


def test_a_row_that_is_longer_than_it_may_be_stops_the_run_where_that_is_wanted(make: Make, two_replies: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 17 tokens, but data\.max_length is 12"):
        make(custom=two_replies, utility=None, harmful=None, safety=None, max_length=12, overlong="error")


def test_options_reach_the_template(make: Make, tmp_path: Path) -> None:
    (tmp_path / "tagged.jinja").write_text("{{ tag }} " + CHATML)
    datamodule = make(chat_template=str(tmp_path / "tagged.jinja"), template_options={"tag": "w7"})
    for rows in datamodule.sets.values():
        assert {int(row.input_ids[0]) for row in rows.rows} == {word_tokenizer().convert_tokens_to_ids("w7")}


def test_a_chat_template_below_the_home_directory(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jinja").write_text("w7 " + CHATML)
    monkeypatch.setenv("HOME", str(tmp_path))
    (rows, *_) = make(chat_template="~/mine.jinja").sets.values()
    assert int(rows.rows[0].input_ids[0]) == word_tokenizer().convert_tokens_to_ids("w7")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_chat_template_that_is_not_utf_8(make: Make, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.jinja").write_text("Grüße " + CHATML, encoding=encoding)
    with pytest.raises(DataError) as error:
        make(chat_template=str(tmp_path / "mine.jinja"))
    assert str(error.value) == f"data.chat_template: {tmp_path}/mine.jinja: not in UTF-8: save it as that"
