from collections.abc import Sequence
from typing import Any

import pytest

from toss_lightning.errors import ConfigError
from toss_lightning.loops.plan import TOSS_PLAN, Given, Plan, Stage, make_plan

SETS = ("custom", "utility", "harmful")


def planned(steps: Sequence[str] = TOSS_PLAN, rounds: int = 0, sets: Sequence[str] = SETS, **given: Any) -> Plan:
    return make_plan(steps, epochs=2, reference_epochs=3, given=Given(sets, **given), rounds=rounds)


def stages(plan: Plan) -> list[Stage]:
    return [step for step in plan.steps if isinstance(step, Stage)]


def test_toss_trains_three_adapters_and_scores_before_the_last() -> None:
    plan = planned()
    assert plan.names == TOSS_PLAN == ("utility", "degraded", "score", "select", "target")
    assert [(stage.name, stage.set, stage.epochs, stage.weighted) for stage in stages(plan)] == [
        ("utility", "utility", 3, False),
        ("degraded", "harmful", 3, False),
        ("target", "custom", 2, True),
    ]


def test_each_round_promotes_trains_the_degraded_adapter_again_and_scores_again() -> None:
    plan = planned(rounds=2)
    assert plan.names == (
        *("utility", "degraded", "score"),
        *("promote-1", "degraded-1", "score-1"),
        *("promote-2", "degraded-2", "score-2"),
        *("select", "target"),
    )
    refits = [stage for stage in stages(plan) if stage.round]
    assert [(stage.name, stage.adapter, stage.set, stage.epochs) for stage in refits] == [
        ("degraded-1", "degraded", "harmful", 3),
        ("degraded-2", "degraded", "harmful", 3),
    ]


def test_rounds_follow_the_scoring_wherever_it_stands() -> None:
    plan = planned(["sft", "utility", "degraded", "score"], rounds=1)
    assert plan.names == ("sft", "utility", "degraded", "score", "promote-1", "degraded-1", "score-1")


def test_plain_fine_tuning_is_a_target_without_weights() -> None:
    (stage,) = stages(planned(["target"], sets=["custom"]))
    assert not stage.weighted


def test_the_control_is_never_weighted() -> None:
    plan = planned(["utility", "degraded", "score", "select", "sft", "target"])
    assert {stage.name: stage.weighted for stage in stages(plan)} == {
        "utility": False,
        "degraded": False,
        "sft": False,
        "target": True,
    }


def test_given_references_need_no_stage() -> None:
    plan = planned(sets=["custom"], references=["utility", "degraded"])
    assert plan.names == ("score", "select", "target")


def test_a_given_degraded_reference_is_trained_again_in_the_rounds_all_the_same() -> None:
    plan = planned(["utility", "degraded", "score"], rounds=1, references=["degraded"])
    assert plan.names == ("utility", "score", "promote-1", "degraded-1", "score-1")


def test_given_scores_or_a_given_selection_need_no_steps_before_them() -> None:
    assert planned(["select", "target"], sets=["custom"], scores=True).names == ("select", "target")
    (stage,) = stages(planned(["target"], sets=["custom"], selection=True))
    assert stage.weighted


def test_actions_may_come_last() -> None:
    plan = planned(["utility", "degraded", "score"])
    assert [stage.name for stage in stages(plan)] == ["utility", "degraded"]
    assert plan.names[-1] == "score"


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (["traget"], {}, "loop.plan: unknown step 'traget'; known: utility, degraded"),
        (["target", "target"], {}, "loop.plan: 'target' stands twice"),
        (["utility", "degraded", "score", "score"], {}, "loop.plan: 'score' stands twice"),
        (
            ["score"],
            {},
            "'score' needs utility and degraded before it: add it, or give what it makes in model.references.utility",
        ),
        (["utility", "score"], {}, "'score' needs degraded before it: .* model.references.degraded"),
        (["select", "target"], {}, "'select' needs score before it: .* loop.scores_from"),
        (TOSS_PLAN, {"sets": ["custom", "utility"]}, "data.harmful: step 'degraded' of loop.plan needs this set"),
        (["target"], {"sets": []}, "data.custom: step 'target' of loop.plan needs this set"),
        ([], {}, "loop.plan: nothing to do"),
        (["utility"], {"references": ["utility"]}, "loop.plan: nothing to do"),
        (TOSS_PLAN, {"scores": True}, "'score' would make what loop.scores_from gives: leave one of them out"),
        (TOSS_PLAN, {"selection": True}, "'select' would make what loop.selection_from gives: leave one of them out"),
        (
            ["utility", "degraded", "score", "target"],
            {},
            "loop.plan: the target would be trained on every token, whatever scores say: put select before it",
        ),
        (["target"], {"rounds": 2}, "loop.rounds: 2 rounds need a score step in loop.plan: add it"),
        (TOSS_PLAN, {"rounds": -1}, "loop.rounds: -1: give 0 or more"),
        (
            TOSS_PLAN,
            {"rounds": 2, "sets": ["custom"], "references": ["utility", "degraded"]},
            r"data.harmful: 2 rounds \(loop.rounds\) promote rows into the harmful set, and there is none",
        ),
    ],
)
def test_a_plan_that_cannot_work_says_why(steps: list[str], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        planned(steps, **options)
    assert "\n" not in str(error.value)


def test_scores_that_are_given_to_a_plan_without_a_selection_are_idle() -> None:
    # a baseline of a comparison whose methods share them
    with pytest.warns(UserWarning, match=r"on every token, .*: put select before it, or leave loop.scores_from"):
        (stage,) = stages(planned(["target"], scores=True))
    assert not stage.weighted


def test_no_epochs() -> None:
    with pytest.raises(ConfigError, match="0 epochs for stage 'target': give at least 1"):
        make_plan(["target"], 0, 1, Given(SETS))
    with pytest.raises(ConfigError, match="0 epochs for stage 'utility': give at least 1"):
        make_plan(["utility"], 1, 0, Given(SETS))
