"""The plug-ins together: what is refused before training, and what is said to have changed next to nothing."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from runs import tiny_fit
from tiny import some_pairs, write_rows

from toss_lightning.errors import ConfigError, TrainingError
from toss_lightning.gradients import SPF, Correction, DualSelect
from toss_lightning.loops.method import Method
from toss_lightning.loops.plan import TOSS_PLAN, Given, make_plan
from toss_lightning.models import Lora
from toss_lightning.models.objective import Objective
from toss_lightning.selection import (
    Anchored,
    ChainSelection,
    DrSft,
    GlobalTopFraction,
    Selection,
    Sot,
    TokenWeights,
    TossRows,
)

SETS = ("custom", "utility", "harmful", "safety")
SOT_PLAN = ("score", "select", "target")


def check(selection: Selection, steps: tuple[str, ...] = TOSS_PLAN, normalize: Any = "all") -> None:
    Method(selection).check(steps, SETS, 0, Lora(), SingleDeviceStrategy("cpu"), normalize)


def weights_of(*rows: Any, **more: Any) -> TokenWeights:
    weights = {row_id: np.asarray(row, dtype=np.float32) for row_id, row in enumerate(rows)}
    return TokenWeights(weights, dict.fromkeys(weights, ""), **more)


def noted(*weights: float) -> Objective:
    """Of a stage in which an online selection gave these weights."""
    objective = Objective(online=DrSft())
    objective.spread.add(torch.tensor(weights))
    return objective


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["exp", "proportional"])
@pytest.mark.parametrize("wrap", [False, True])
def test_weights_of_whole_rows_where_each_row_is_divided_by_its_own(weights: Any, wrap: bool) -> None:
    selection: Selection = Sot(weights=weights)
    selection = Anchored(selection) if wrap else selection
    with pytest.raises(
        ConfigError,
        match=rf"model.normalize: row divides each row .* with weights: {weights} would .*: set it to kept",
    ):
        check(selection, SOT_PLAN, "row")
    for normalize in ("all", "kept"):
        check(selection, SOT_PLAN, normalize)


def test_a_run_is_refused_before_anything_is_trained(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model.normalize: row divides each row"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=SOT_PLAN, loop={"selection": Sot()}, module={"normalize": "row"})
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("selection", "plan", "told"),
    [
        (ChainSelection(), ["target"], "[utility, degraded, score, select, target]"),
        (Sot(), ["sft", "target"], "[score, select, target]"),
        (Anchored(GlobalTopFraction()), ["target"], "[utility, degraded, score, select, target]"),
        (GlobalTopFraction(), ["target"], None),
        (ChainSelection(), ["sft"], None),
        (ChainSelection(), [*TOSS_PLAN], None),
    ],
)
def test_a_selection_that_the_plan_of_another_methods_file_leaves_out_is_told(
    selection: Selection, plan: list[str], told: str | None
) -> None:
    steps = make_plan(plan, 1, 1, Given(SETS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Method(selection).warn_of_unused(steps)
    names = ", ".join(plan)
    assert [str(one.message) for one in caught] == (
        [
            f"loop.selection: {type(selection).__name__} is not used, for loop.plan ({names}) has no step select: the"
            f" target learns from every token alike. To train with it: --loop.plan '{told}'"
        ]
        if told
        else []
    )


@pytest.mark.parametrize(
    ("correction", "normalize", "message"),
    [
        (None, "kept", "model.normalize: kept divides by weights, which DrSft makes only while a step is trained on"),
        (DualSelect(), "all", "model.correction: DualSelect chooses rows of a step by the loss that is to be trained"),
    ],
)
def test_what_weighs_while_it_trains_does_not_suit_what_must_know_weights_before(
    correction: Correction | None, normalize: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Method(DrSft(), correction).check(TOSS_PLAN, SETS, 0, Lora(), SingleDeviceStrategy("cpu"), normalize)
    check(DrSft(), ("score", "target"), normalize)


@pytest.mark.parametrize(
    ("correction", "lora", "message"),
    [
        (SPF(k=4), Lora(r=4), r"correction\.k: 4 directions .* of rank 4"),
        (SPF(examples=9), Lora(r=4), r"correction\.examples: 9 reference rows are needed, but data\.safety has 4"),
        (DualSelect(), Lora(r=4, targets=["q_proj", "embed_tokens"]), "is no plain LoRA on a linear layer"),
    ],
)
def test_a_correction_that_does_not_fit_is_refused_before_anything_is_trained(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path, correction: Correction, lora: Lora, message: str
) -> None:
    sets = {**tiny_sets, "safety": write_rows(tmp_path / "safety.jsonl", some_pairs(4))}
    with pytest.raises(ConfigError, match=message):
        tiny_fit(tiny_model, sets, tmp_path / "run", module={"correction": correction, "lora": lora})
    assert not (tmp_path / "run" / "adapters").exists()


def test_rounds_without_a_utility_reference(tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> None:
    loop = {"selection": DrSft(), "rounds": 1, "promote": 2}
    with pytest.raises(ConfigError, match=r"loop\.rounds: rows are promoted by token scores, which need a utility ref"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["degraded", "score", "select", "target"], loop=loop)
    assert not (tmp_path / "adapters").exists()


def test_row_suits_weights_that_it_leaves_alone_and_plans_in_which_they_do_not_act() -> None:
    check(Sot(weights="uniform"), SOT_PLAN, "row")
    check(TossRows(), TOSS_PLAN, "row")
    check(Sot(), ("score", "select"), "row")
    check(Sot(), ("target",), "row")


# --- next to nothing --------------------------------------------------------------------------------------------------


def test_weights_that_are_nearly_equal_are_said_to_be() -> None:
    w = np.random.default_rng(0).dirichlet(np.ones(1000))  # shares of 1000 rows, as SOT learns them
    rows = [np.full(3, value) for value in np.exp(w) / np.exp(w).mean()]
    assert min(map(min, rows)) < max(map(max, rows)), "they are not equal"
    assert Method(Sot(0.0)).idle(weights_of(*rows), Objective()) == [
        "SOT gave every token nearly the same weight, 1 ± 0.001"
    ]
    assert Method(Sot(0.0)).idle(weights_of([1, 1], [1.0]), Objective()) == ["SOT gave every token the same weight (1)"]
    assert Method(Sot(0.0)).idle(weights_of([1, 1], [0.9]), Objective()) == []
    assert Method(GlobalTopFraction()).idle(weights_of([1] * 99, [0]), Objective()) == []


def test_what_a_row_counts_is_nothing_where_it_is_divided_out() -> None:
    rows = weights_of([3.0, 3.0], [0.1], [0.7] * 5)
    assert Method(Sot()).idle(rows, Objective("kept")) == []
    assert Method(Sot()).idle(rows, Objective("row")) == ["SOT gave every token the same weight (1)"]
    assert Method(Sot()).idle(weights_of([3.0, 3.0], [0.0]), Objective("row")) == [], "a row was left out"
    assert Method(Sot()).idle(weights_of([3.0, 0.0], [1.0]), Objective("row")) == [], "a token was"


def test_an_anchor_is_something() -> None:
    anchored = weights_of([1.0, 1.0], anchor={0: np.float32([1, 0])})
    assert Method(Anchored()).idle(anchored, Objective()) == []


def test_weights_made_in_training_are_looked_at_too() -> None:
    ones = weights_of([1.0, 1.0])
    assert Method(DrSft()).idle(ones, noted(0.999, 1.001)) == [
        "DrSft gave every token nearly the same weight, 1 ± 0.001, over all steps"
    ]
    assert Method(DrSft()).idle(ones, noted(0.5, 1.0)) == []
    assert Method(DrSft()).idle(weights_of([1.0, 0.0]), noted(1.0, 1.0)) == [], "what it gave beforehand counts"


def test_an_online_selection_that_kept_nothing_ends_the_run() -> None:
    with pytest.raises(TrainingError, match=r"loop.selection DR-SFT gave every token the weight 0 in every step"):
        Method(DrSft()).idle(weights_of([1.0, 1.0]), noted(0.0, 0.0))
