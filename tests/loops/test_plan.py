import pytest

from toss_lightning.errors import ConfigError
from toss_lightning.loops.plan import TOSS_PLAN, make_plan

SETS = ("custom", "utility", "harmful")


def test_toss_trains_three_adapters_and_scores_before_the_last() -> None:
    plan = make_plan(TOSS_PLAN, epochs=2, reference_epochs=3, sets=SETS)
    assert [(stage.name, stage.set, stage.epochs, stage.actions) for stage in plan.stages] == [
        ("utility", "utility", 3, ()),
        ("degraded", "harmful", 3, ()),
        ("target", "custom", 2, ("score", "select")),
    ]
    assert [stage.weighted for stage in plan.stages] == [False, False, True]
    assert plan.names == TOSS_PLAN


def test_plain_fine_tuning_is_a_target_without_weights() -> None:
    (stage,) = make_plan(["target"], 1, 1, ["custom"]).stages
    assert not stage.weighted


def test_the_control_is_never_weighted() -> None:
    plan = make_plan(["utility", "degraded", "score", "select", "sft", "target"], 1, 1, SETS)
    assert {stage.name: stage.weighted for stage in plan.stages}["sft"] is False


def test_given_references_need_no_stage() -> None:
    plan = make_plan(TOSS_PLAN, 1, 1, ["custom"], given=["utility", "degraded"])
    assert plan.names == ("score", "select", "target")


def test_actions_may_come_last() -> None:
    plan = make_plan(["utility", "degraded", "score"], 1, 1, SETS)
    assert [stage.name for stage in plan.stages] == ["utility", "degraded"]
    assert plan.actions == ("score",)


def test_every_epoch_belongs_to_a_stage() -> None:
    plan = make_plan(TOSS_PLAN, 1, 2, SETS)
    assert [plan.at(epoch) for epoch in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)]


@pytest.mark.parametrize(
    ("steps", "sets", "message"),
    [
        (["traget"], SETS, "loop.plan: unknown step 'traget'; known: utility, degraded"),
        (["target", "target"], SETS, "loop.plan: 'target' stands twice"),
        (
            ["score"],
            SETS,
            "'score' needs utility and degraded before it: add the stage, or give the adapter",
        ),
        (["select", "target"], SETS, "'select' needs score before it"),
        (TOSS_PLAN, ["custom", "utility"], "data.harmful: step 'degraded' of loop.plan needs this set"),
        (["target"], [], "data.custom: step 'target' of loop.plan needs this set"),
        ([], SETS, "loop.plan: nothing to do"),
    ],
)
def test_a_plan_that_cannot_work_says_why(steps: list[str], sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(steps, 1, 1, sets)


def test_no_epochs() -> None:
    with pytest.raises(ConfigError, match="0 epochs for stage 'target': give at least 1"):
        make_plan(["target"], 0, 1, SETS)
