"""Scores and selections of other runs: what is trained with them, and when they are refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Kill, scored, tiny_fit
from tiny import WORDS, save_tiny_model, some_pairs, write_rows

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.models import Base, References
from toss_lightning.scores import TokenScores
from toss_lightning.selection import (
    Anchored,
    ChainSelection,
    ConstrainedSft,
    DrSft,
    GlobalTopFraction,
    OnlineSelection,
    TokenWeights,
)
from toss_lightning.selection.online import to_be_weighed

PAIRS = tuple((("utility", "utility"), ("degraded", degraded)) for degraded in ("degraded", "degraded-1"))
"""References, and the adapters of a run that stand for them."""


@pytest.mark.parametrize("round", [None, 0, 1])
def test_a_selection_from_a_store_of_another_run(tiny_model, tiny_sets, tmp_path: Path, pro: Path, round) -> None:
    before = scored(pro)
    loop = {"scores_from": str(pro / "scores"), "scores_round": round, "selection": GlobalTopFraction(0.2)}
    tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=["select"], loop=loop)
    by_hand = GlobalTopFraction(0.2).select(TokenScores(pro / "scores", 1 if round is None else round))
    np.testing.assert_array_equal(TokenWeights.load(tmp_path / "selection").flat(), by_hand.flat())
    assert not (tmp_path / "scores").exists()
    assert scored(pro) == before, "the other run's store is only read"


def test_a_store_of_another_run_and_the_target_alone(tiny_model, tiny_sets, tmp_path: Path, pro: Path) -> None:
    loop = {"scores_from": str(pro / "scores")}
    tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=["select", "target"], loop=loop)
    weights = "adapters/target/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (pro / weights).read_bytes()


def test_a_selection_of_another_run_and_the_target_alone(tiny_model, tiny_sets, tmp_path: Path, pro: Path) -> None:
    loop = {"selection_from": str(pro / "selection")}
    tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=["target"], loop=loop)
    weights = "adapters/target/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (pro / weights).read_bytes()
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (tmp_path, pro))
    assert ours["selection"] == theirs["selection"]
    assert ours["method"] == theirs["method"] == "TOSS-Pro"


def test_what_a_target_was_selected_by_names_its_method_after_a_resume_too(
    tiny_model, tiny_sets, tmp_path: Path, pro: Path
) -> None:
    def fit(**options: Any) -> None:
        loop = {"selection_from": str(pro / "selection")}
        tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=["target"], loop=loop, **options)

    with pytest.raises(RuntimeError, match="killed"):
        fit(callbacks=[Kill(2)])
    fit(ckpt_path="last")
    assert json.loads((tmp_path / "summary.json").read_text())["method"] == "TOSS-Pro"


@pytest.mark.parametrize("plan", [["select", "target"], ["target"]])
def test_what_is_given_may_lie_below_the_home_directory(
    tiny_model, tiny_sets, tmp_path: Path, pro: Path, monkeypatch: pytest.MonkeyPatch, plan: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(pro))
    loop = {"scores_from": "~/scores"} if "select" in plan else {"selection_from": "~/selection"}
    tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=plan, loop=loop)
    assert (tmp_path / "adapters" / "target").is_dir()


def test_a_selection_with_anchors_wants_the_selection_that_made_it(tiny_model, tiny_sets, tmp_path: Path) -> None:
    def anchored() -> Anchored:
        return Anchored(GlobalTopFraction(0.3), safety_rows=2)

    def taken(run: str, **loop: Any) -> None:
        of_run = {"selection_from": str(tmp_path / "made" / "selection"), **loop}
        tiny_fit(tiny_model, tiny_sets, tmp_path / run, plan=["target"], loop=of_run)

    tiny_sets = {**tiny_sets, "safety": write_rows(tmp_path / "safety.jsonl", some_pairs(4, start=9))}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "made", loop={"selection": anchored()})
    made = "made by TOSS-Anchor with 2 safety rows in each step, and loop.selection is "
    with pytest.raises(StoreError, match=made + "TOSS with 0: give the one that it was made with"):
        taken("plain")
    with pytest.raises(StoreError, match=made + "TOSS-Anchor with 0"):
        taken("fewer", selection=Anchored(GlobalTopFraction(0.3)))
    taken("same", selection=anchored())
    weights = "adapters/target/adapter_model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (tmp_path / "made" / weights).read_bytes()


def test_a_selection_serves_another_base_with_the_same_tokenizer(tiny_sets, tmp_path: Path, pro: Path) -> None:
    class TheirWeights(GlobalTopFraction):
        """What the other base trains with, when it makes the selection itself."""

        def select(self, scores: TokenScores) -> TokenWeights:
            return TokenWeights.load(pro / "selection")

    other = save_tiny_model(tmp_path / "other", hidden=48, seed=7)
    loop = {"selection_from": str(pro / "selection")}
    tiny_fit(other, {"custom": tiny_sets["custom"]}, tmp_path / "taken", plan=["target"], loop=loop)
    tiny_fit(other, tiny_sets, tmp_path / "made", loop={"selection": TheirWeights()})
    weights = "adapters/target/adapter_model.safetensors"
    assert (tmp_path / "taken" / weights).read_bytes() == (tmp_path / "made" / weights).read_bytes()
    tiny_fit(other, {"custom": tiny_sets["custom"]}, tmp_path / "plain", plan=["target"])
    assert (tmp_path / "taken" / weights).read_bytes() != (tmp_path / "plain" / weights).read_bytes()


def test_a_selection_is_refused_by_naming_what_differs(tiny_model, tiny_sets, tmp_path: Path, pro: Path) -> None:
    def refusal(model: str, custom: str, **data: Any) -> str:
        loop = {"selection_from": str(pro / "selection")}
        with pytest.raises(StoreError, match="has other tokens than the row that was selected from") as error:
            tiny_fit(model, {"custom": custom}, tmp_path / "run", plan=["target"], loop=loop, data=data)
        assert "\n" not in str(error.value)
        return str(error.value)

    # the same words under other numbers, and as many of them
    other = save_tiny_model(tmp_path / "other", words=reversed(WORDS))
    assert "(another tokenizer)" in refusal(other, tiny_sets["custom"])
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|> {{ message['role'] }} w0 {{ message['content'] }} <|im_end|> "
        "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant w0 {% endif %}"
    )
    assert "(another template)" in refusal(tiny_model, tiny_sets["custom"], chat_template=str(template))
    assert "(another limits)" in refusal(tiny_model, tiny_sets["custom"], max_length=15)
    changed = write_rows(tmp_path / "custom.jsonl", some_pairs(14, start=9), label="benign", source="made")
    assert "(another dataset)" in refusal(tiny_model, changed)


def test_scores_of_other_rows_are_refused_before_the_target_is_trained(
    tiny_model, tiny_sets, tmp_path: Path, pro: Path
) -> None:
    changed = write_rows(tmp_path / "custom.jsonl", some_pairs(14, start=9))
    loop = {"scores_from": str(pro / "scores")}
    with pytest.raises(StoreError, match="row 0 is not the one that was scored"):
        tiny_fit(tiny_model, {"custom": changed}, tmp_path / "run", plan=["select", "target"], loop=loop)
    assert not (tmp_path / "run/adapters").exists()


def test_held_out_rows_are_scored_for_a_selection_that_reads_them(tiny_model, tiny_sets, tmp_path: Path) -> None:
    selection = ChainSelection(None, centre="held_out", false_alarms=0.3)
    loop = {"selection": selection, "rounds": 1, "promote": 4}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "made", loop=loop, data={"holdout": 0.4})
    scores = TokenScores(tmp_path / "made" / "scores")
    summary = json.loads((tmp_path / "made" / "summary.json").read_text())
    for name in ("utility_val", "harmful_val"):
        rows = next(one["rows"] for one in summary["data"] if one["set"] == name)
        assert summary["selection"]["held_out"][name]["rows"] == rows == len(scores.held_out(name).row_ids)
        assert scores.held_out(name).rounds == [0, 1]
        # the same adapters and the same rows: what validation took is the mean of what was filed
        losses = {key: float(scores.held_out(name).flat(f"loss_{key}").mean()) for key in ("utility", "degraded-1")}
        key = {"utility_val": "task_loss", "harmful_val": "harmful_loss"}[name]
        for adapter, loss in losses.items():
            assert loss == pytest.approx(summary["held_out"][adapter][key], rel=1e-5)
    # and another run, without the held-out rows, selects from them
    custom = {"custom": tiny_sets["custom"]}
    from_there = {"scores_from": str(scores.path), "selection": selection}
    tiny_fit(tiny_model, custom, tmp_path / "taken", plan=["select"], loop=from_there)
    taken = TokenWeights.load(tmp_path / "taken" / "selection")
    np.testing.assert_array_equal(taken.flat(), TokenWeights.load(tmp_path / "made" / "selection").flat())


def test_a_store_with_other_held_out_rows_than_this_run_is_warned_of(tiny_model, tiny_sets, tmp_path: Path) -> None:
    selection = ChainSelection(None, centre="held_out", false_alarms=0.3)
    tiny_fit(tiny_model, tiny_sets, tmp_path / "made", loop={"selection": selection}, data={"holdout": 0.4})
    loop = {"scores_from": str(tmp_path / "made" / "scores"), "selection": selection}

    def said(**sets: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run: Any = {"plan": ["select"], "loop": loop, "data": {"holdout": 0.4}}
            tiny_fit(tiny_model, {**tiny_sets, **sets}, tmp_path / "taken", **run)
        return [text for one in caught if "which are others than" in (text := str(one.message))]

    assert said() == []
    (line,) = said(utility_val=write_rows(tmp_path / "other.jsonl", some_pairs(5, start=3)))
    assert line == (
        f"loop.scores_from: ChainSelection reads the utility_val rows of {tmp_path}/made/scores, which are others than"
        " data.utility_val has now"
    )


class Focal(OnlineSelection):
    """Weighs by the target's own losses, and reads nothing else."""

    columns = ()

    def select(self, scores: TokenScores) -> TokenWeights:
        return to_be_weighed(scores, ())

    def weigh(self, losses, tokens):
        return 1 - (-losses).exp()


def test_a_selection_may_weigh_by_the_losses_of_the_target_alone(tiny_model, tiny_sets, tmp_path: Path) -> None:
    custom = {"custom": tiny_sets["custom"]}
    tiny_fit(tiny_model, custom, tmp_path / "focal", plan=["score", "select", "target"], loop={"selection": Focal()})
    tiny_fit(tiny_model, custom, tmp_path / "plain", plan=["target"])
    weights = "adapters/target/adapter_model.safetensors"
    assert (tmp_path / "focal" / weights).read_bytes() != (tmp_path / "plain" / weights).read_bytes()
    loop = {"selection_from": str(tmp_path / "focal" / "selection"), "selection": GlobalTopFraction()}
    with pytest.raises(StoreError, match=r"made for another kind of .* than GlobalTopFraction"):
        tiny_fit(tiny_model, custom, tmp_path / "other", plan=["target"], loop=loop)


def test_weights_that_are_made_in_training_want_the_selection_that_they_were_prepared_for(
    tiny_model, tiny_sets, tmp_path: Path
) -> None:
    def taken(run: str, selection: OnlineSelection) -> None:
        loop = {"selection_from": str(tmp_path / "made" / "selection"), "selection": selection}
        tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path / run, plan=["target"], loop=loop)

    tiny_fit(tiny_model, tiny_sets, tmp_path / "made", loop={"selection": DrSft()})
    with pytest.raises(StoreError, match=r"made by DR-SFT with 0 safety rows in each step, and loop.selection is con"):
        taken("other", ConstrainedSft())
    taken("same", DrSft())
    weights = "adapters/target/adapter_model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (tmp_path / "made" / weights).read_bytes()


def test_losses_of_another_base_are_no_reference_for_the_targets_own(tiny_model, tiny_sets, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", hidden=48, seed=7)
    online = {"selection": ConstrainedSft()}
    custom = {"custom": tiny_sets["custom"]}
    tiny_fit(tiny_model, custom, tmp_path / "made", plan=["score", "select"], loop=online)
    for plan, given in ((["select", "target"], "scores"), (["target"], "selection")):
        loop = {f"{given}_from": str(tmp_path / "made" / given), **online}
        with pytest.raises(StoreError, match="scored with another base, against whose losses ConstrainedSft would"):
            tiny_fit(other, custom, tmp_path / "run", plan=plan, loop=loop)
        tiny_fit(tiny_model, custom, tmp_path / f"from-{given}", plan=plan, loop=loop)


def test_losses_of_another_precision_are_a_reference_with_a_warning(tiny_model, tiny_sets, tmp_path: Path) -> None:
    online = {"selection": DrSft()}
    rounded = {"base": Base(tiny_model, quantization="none", dtype="bfloat16")}
    plan = ["utility", "degraded", "score", "select"]
    tiny_fit(tiny_model, tiny_sets, tmp_path / "made", plan=plan, loop=online, module=rounded)
    loop = {"scores_from": str(tmp_path / "made" / "scores"), **online}
    with pytest.warns(UserWarning, match=r"scored in none/bfloat16, against whose losses DrSft weighs .* none/float32"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["select", "target"], loop=loop)


def test_held_out_scores_follow_the_references_and_the_rows(
    tiny_model, tiny_sets, tmp_path: Path, pro: Path, capsys
) -> None:
    def score(selection: Any = None, held_out: str = "", **given: Any) -> None:
        selection = selection or ChainSelection(None, false_alarms=0.3)
        sets = {**tiny_sets, **({"utility_val": held_out} if held_out else {})}
        module = {"references": References(**given)}
        tiny_fit(tiny_model, sets, tmp_path / "run", plan=["score"], loop={"selection": selection}, module=module)

    first, second = ({name: str(pro / "adapters" / of) for name, of in pair} for pair in PAIRS)
    score(GlobalTopFraction(), **first)
    score(**first)
    assert "used as it is" in capsys.readouterr().out, "the custom set needs no new scores"
    store = TokenScores(tmp_path / "run" / "scores")
    before = store.held_out("utility_val").flat("loss_degraded")
    score(GlobalTopFraction(), **second)
    with pytest.raises(StoreError, match="utility_val: scored with another degraded than the custom set"):
        TokenScores(store.path).held_out("utility_val")
    score(**second)
    after = TokenScores(store.path).held_out("utility_val").flat("loss_degraded")
    assert len(after) == len(before)
    assert (after != before).any()
    other = write_rows(tmp_path / "other.jsonl", some_pairs(5, start=3))
    score(held_out=other, **second)
    assert len(TokenScores(store.path).held_out("utility_val").row_ids) == 5


def test_scores_without_held_out_rows_do_not_serve_a_selection_that_reads_them(
    tiny_model, tiny_sets, tmp_path: Path, pro: Path
) -> None:
    loop = {"scores_from": str(pro / "scores"), "selection": ChainSelection(None, false_alarms=0.1)}
    with pytest.raises(
        StoreError, match="has no utility losses of the utility_val set, no degraded-1 losses of the ut"
    ):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["select", "target"], loop=loop)


def test_held_out_rows_that_are_not_there_are_asked_for(tiny_model, tiny_sets, tmp_path: Path) -> None:
    loop = {"selection": Anchored(ChainSelection(None, centre="held_out"))}
    with pytest.raises(
        ConfigError, match=r"data\.harmful_val: .* reads this set: give a path to it, or data\.holdout$"
    ):
        tiny_fit(tiny_model, tiny_sets, tmp_path, loop=loop, data={"holdout": 0})


@pytest.mark.parametrize(
    ("plan", "loop", "error", "message"),
    [
        (["select", "target"], {"scores_from": "no/such"}, StoreError, "no/such: no token scores here"),
        (["target"], {"selection_from": "no/such"}, StoreError, "no/such: no selection to be had"),
        (["utility", "degraded", "score", "select"], {"scores_from": "x"}, ConfigError, "'score' would make what loop"),
        (["select", "target"], {"selection_from": "x"}, ConfigError, "'select' would make what loop.selection_from"),
    ],
)
def test_what_is_given_twice_or_not_there(
    tiny_model, tiny_sets, tmp_path: Path, plan: list, loop: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=plan, loop=loop)
    assert "\n" not in str(caught.value)


def test_a_round_that_the_store_does_not_have(tiny_model, tiny_sets, tmp_path: Path, pro: Path) -> None:
    loop = {"scores_from": str(pro / "scores"), "scores_round": 2}
    with pytest.raises(StoreError, match=r"scores: no scores of round 2 here \(rounds: 0, 1\)"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["select", "target"], loop=loop)
