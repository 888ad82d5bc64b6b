"""What a run says of itself: in lines, in tables, and in words that need no paper."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import tiny_fit
from tiny import some_pairs, write_rows

from toss_lightning.data.mixtures import SafeInstr
from toss_lightning.errors import StoreError
from toss_lightning.gradients import Correction, Gradients, Probe
from toss_lightning.loops.plan import TOSS_PLAN
from toss_lightning.models import Optim
from toss_lightning.report.summary import (
    Summary,
    held_out_cells,
    losses_table,
    method_of,
    plain_words,
    selected_words,
    stage_name,
)
from toss_lightning.selection import DrSft, GlobalTopFraction

LOSSES = {
    "base": {"task_loss": 3.0, "harmful_loss": 4.0},
    "degraded": {"task_loss": 2.9, "harmful_loss": 1.0},
    "degraded-1": {"task_loss": 2.8, "harmful_loss": 0.9},
    "sft": {"task_loss": 2.0, "harmful_loss": 2.5},
    "target": {"task_loss": 2.1, "harmful_loss": 3.9},
}
SELECTION = {
    "tokens": 200,
    "masked": 20,
    "rows": 9,
    "rows_fully_masked": 1,
    "discard": 0.1,
    "masked_share_per_label": {"harmful": {"tokens": 50, "masked": 15, "share_of_masked_tokens": 0.75}},
}


def summary() -> Summary:
    held_out = {name: dict(losses) for name, losses in LOSSES.items()}
    return Summary(held_out=held_out, selection=dict(SELECTION), method="TOSS")


def test_a_checkpoint_brings_everything_back() -> None:
    first = summary()
    first.of_round(1)["promoted"] = 3
    first.correction, first.idle, first.plain = {"corrected": 0}, ["nothing happened"], True
    first.weak = {"degraded": "it learned nothing"}
    again = Summary()
    again.load_state(first.state())
    assert again == first


def test_what_a_checkpoint_holds_does_not_change_with_the_run() -> None:
    one = summary()
    one.of_round(0)["masked"] = 1
    state = one.state()
    one.of_round(0)["masked"] = 2
    one.of_round(1)
    one.held_out["base"]["task_loss"] = 9.0
    one.idle.append("later")
    assert state["rounds"] == [{"round": 0, "masked": 1}]
    assert state["held_out"]["base"]["task_loss"] == 3.0
    assert state["idle"] == []


def test_stages_have_names_for_people() -> None:
    one = summary()
    assert [stage_name(one, stage) for stage in LOSSES] == [
        "base model",
        "degraded reference",
        "degraded reference, round 1",
        "plain SFT",
        "TOSS",
    ]
    one.method = "TOSS-Pro + SafeInstr"
    assert stage_name(one, "target") == "TOSS-Pro + SafeInstr"
    assert stage_name(Summary(), "target") == "fine-tuned"


def test_a_run_is_called_by_its_summary_or_else_by_its_selection(tmp_path: Path) -> None:
    selection = tmp_path / "selection"
    assert method_of(tmp_path, selection) == "fine-tuned"
    selection.mkdir()
    (selection / "selection.json").write_text('{"masked": 3}')
    assert method_of(tmp_path, selection) == "fine-tuned", "another program need not say how it selects"
    (selection / "selection.json").write_text('{"method": "TOSS"}')
    assert method_of(tmp_path, selection) == "TOSS"
    (tmp_path / "summary.json").write_text('{"method": "TOSS + SPF"}')
    assert method_of(tmp_path, selection) == "TOSS + SPF"


@pytest.mark.parametrize("content", ['{"method": "TOSS"', "[1, 2]", "\udcff"])
@pytest.mark.parametrize("file", ["summary.json", "selection.json"])
def test_nothing_is_called_plain_because_its_summary_is_damaged(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=rf"^{tmp_path}/{file}: .*: run the step that wrote it again$"):
        method_of(tmp_path, tmp_path)


def test_the_closing_table_has_a_row_per_stage() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(losses_table(summary()))
    lines = [line for line in console.export_text().splitlines() if "3.900" in line or "0.900" in line]
    assert ["degraded reference, round 1" in line or "TOSS" in line for line in lines] == [True, True]


def test_the_same_as_cells_for_some_of_the_stages() -> None:
    assert held_out_cells(summary(), ["base", "nothing", "target"]) == (
        ["", "task loss (lower is better)", "harmful loss (higher is safer)"],
        [["base model", "3.000", "4.000"], ["TOSS", "2.100", "3.900"]],
    )
    assert held_out_cells(Summary(), ["base"]) == ([""], [])


def test_a_held_out_set_that_is_no_longer_there_leaves_a_dash() -> None:
    one = summary()
    del one.held_out["target"]["harmful_loss"]
    assert held_out_cells(one, ["base", "target"])[1] == [["base model", "3.000", "4.000"], ["TOSS", "2.100", "–"]]


def test_plain_words() -> None:
    words = plain_words(summary())
    assert "75% of the 20 masked tokens lay in contaminated rows (a blind choice would have hit 25%)." in words
    assert "Plain SFT took the task loss from 3.00 to 2.00 and the loss of harmful replies from 4.00 to 2.50" in words
    assert "TOSS took them to 2.10 and 3.90" in words
    assert plain_words(Summary()) == ""


@pytest.mark.parametrize("lost", ["tokens", "masked", "masked_share_per_label"])
def test_plain_words_of_a_selection_that_says_less(lost: str) -> None:
    """As that of another program may."""
    one = summary()
    del one.selection[lost]
    assert plain_words(one).startswith("Plain SFT took")


def test_plain_words_of_toss_pro_name_it() -> None:
    one = summary()
    one.method = "TOSS-Pro"
    assert "TOSS-Pro took them to 2.10 and 3.90" in plain_words(one)


def test_a_round_in_one_line(capsys) -> None:
    one = summary()
    one.of_round(1).update(
        promoted=3, promoted_per_label={"benign": 1, "harmful": 2}, harmful_loss=0.9, threshold=1.25, jaccard=0.5
    )
    one.say_round(1)
    assert capsys.readouterr().out == (
        "round 1: 3 rows promoted (1 benign, 2 harmful); held-out harmful loss of the degraded reference 0.900;"
        " threshold 1.250; mask shares 50% with the round before (Jaccard)\n"
    )
    one.of_round(2).update(promoted=3, promoted_per_label={}, harmful_loss=None, threshold=None, jaccard=1.0)
    one.say_round(2)
    assert capsys.readouterr().out == "round 2: 3 rows promoted; mask shares 100% with the round before (Jaccard)\n"


def test_a_selection_in_one_line(capsys) -> None:
    one = summary()
    one.say_selected()
    assert capsys.readouterr().out == (
        "select: 20 of 200 response tokens masked (10.0%); 1 of 9 rows are masked in full\n"
    )
    one.selection["rows_left_out"] = 2
    one.say_selected()
    assert capsys.readouterr().out.endswith("; 2 of 9 rows are left out\n")


def test_what_a_selection_did_beside_masking() -> None:
    more = {"end_tokens_protected": 3, "anchored": 1234}
    assert selected_words({**SELECTION, **more}) == (
        "20 of 200 response tokens masked (10.0%); 3 end-of-turn tokens kept that would have been among them; 1,234"
        " held to the base; 1 of 9 rows are masked in full"
    )
    assert selected_words({}) == ""


# --- references that learned nothing ----------------------------------------------------------------------------------


def test_a_reference_that_learned_nothing_which_carries_over_is_said_loudly(capsys) -> None:
    one = summary()
    base = one.held_out["base"]
    one.held_out["utility"] = {"task_loss": base["task_loss"] - 0.1, "harmful_loss": base["harmful_loss"] + 1}
    one.held_out["degraded-1"] = {"task_loss": base["task_loss"] - 1, "harmful_loss": base["harmful_loss"] + 0.5}
    one.judge_reference("utility", "utility")
    assert capsys.readouterr().out == "", "what it makes of harmful rows is no fault of it"
    one.judge_reference("degraded-1", "degraded")
    warned = capsys.readouterr().out
    assert warned.startswith(
        "WARNING: the degraded reference, round 1 has learned nothing that carries over: its harmful loss on held-out"
        f" rows is {base['harmful_loss'] + 0.5:.3f}, that of the base {base['harmful_loss']:.3f}. "
    )
    assert "train it for fewer epochs (loop.reference_epochs, or loop.keep_epoch: best), at a lower" in warned
    one.say_weak()
    assert capsys.readouterr().out == warned, "and once more at the end"
    assert list(one.state()["weak"]) == ["degraded-1"]


def test_a_weak_reference_whose_best_epoch_was_kept_is_not_told_to_train_for_fewer() -> None:
    losses = {"harmful_loss": 4.0}
    one = Summary(held_out={"base": {"harmful_loss": 3.0}, "degraded": losses}, epochs={"degraded": [losses]})
    one.judge_reference("degraded", "degraded")
    assert one.weak["degraded"].endswith("say little: train it at a lower model.optim.lr, or on more rows")


def test_a_reference_without_held_out_rows_is_not_judged(capsys) -> None:
    one = Summary(held_out={"base": {"task_loss": 3.0}, "degraded": {"task_loss": 4.0}})
    one.judge_reference("degraded", "degraded")
    assert capsys.readouterr().out == ""
    assert one.weak == {}


# --- plug-ins that changed nothing ------------------------------------------------------------------------------------

SAME = "TOSS gave every token the same weight (1)"
PLAIN = "WARNING: no plug-in of this method changed anything: the target is a plain fine-tuning"


def test_plug_ins_that_changed_nothing_are_said_loudly(capsys) -> None:
    one = summary()
    one.say_idle()
    assert capsys.readouterr().out == ""
    one.idle = [SAME]
    one.say_idle()
    assert capsys.readouterr().out == f"WARNING: {SAME}\n"
    one.plain = True
    one.say_idle()
    assert capsys.readouterr().out == f"WARNING: {SAME}\n{PLAIN}\n"
    one.idle = []
    one.say_idle()
    assert capsys.readouterr().out == "", "plain fine-tuning that was asked for is no surprise"


def test_a_run_whose_weights_were_nearly_equal_says_so(
    tiny_model: str, tiny_sets: dict, tmp_path: Path, capsys
) -> None:
    """DR-SFT with a degraded reference that hardly learned anything."""
    tiny_fit(
        tiny_model,
        tiny_sets,
        tmp_path / "run",
        plan=("degraded", "score", "select", "target"),
        loop={"epochs": 1, "selection": DrSft()},
        module={"optim": Optim(lr=1e-6)},
    )
    said = json.loads((tmp_path / "run/summary.json").read_text())
    assert said["plain"]
    assert len(said["idle"]) == 1
    assert re.fullmatch(r"DrSft gave every token nearly the same weight, 1 ± [\de.-]+, over all steps", said["idle"][0])
    assert f"WARNING: {said['idle'][0]}\n{PLAIN}\n" in capsys.readouterr().out


class Watches(Correction):
    """Looks at every gradient and leaves it as it is, or else halves it."""

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        self.halves = halves

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        self.record(steps=1, corrected=float(self.halves))
        for gradient in gradients.values() if self.halves else ():
            gradient.mul_(0.5)


@pytest.mark.parametrize(
    ("discard", "correction", "mixture", "idle", "plain"),
    [
        (0.2, None, False, [], False),
        (0.0, None, False, [SAME], True),
        (0.0, None, True, [SAME], False),
        (0.2, Watches(), False, ["Watches changed no step's gradient"], False),
        (0.0, Watches(), False, [SAME, "Watches changed no step's gradient"], True),
        (0.0, Watches(halves=True), False, [SAME], False),
        (None, Watches(), False, ["Watches changed no step's gradient"], True),
        (None, None, False, [], True),
    ],
)
def test_a_run_says_which_of_its_plug_ins_changed_nothing(
    tiny_model: str,
    tiny_sets: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    discard: float | None,
    correction: Correction | None,
    mixture: bool,
    idle: list[str],
    plain: bool,
) -> None:
    safety = write_rows(tmp_path / "safety.jsonl", some_pairs(3, start=4))
    loop: dict[str, Any] = {"epochs": 1}
    if discard is not None:
        loop["selection"] = GlobalTopFraction(discard)
    tiny_fit(
        tiny_model,
        {**tiny_sets, "safety": safety},
        tmp_path / "run",
        plan=("target",) if discard is None else TOSS_PLAN,
        loop=loop,
        data={"mixture": SafeInstr(rows=2) if mixture else None},
        module={"correction": correction},
    )
    said = json.loads((tmp_path / "run/summary.json").read_text())
    assert (said["idle"], said["plain"]) == (idle, plain)
    weak = {f"WARNING: {reason}" for reason in said["weak"].values()}
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    warnings = [line for line in warnings if line not in weak]
    assert warnings == [*(f"WARNING: {reason}" for reason in idle), *([PLAIN] if idle and plain else [])]
    if correction is not None:
        assert said["correction"]["corrected"] == (said["correction"]["steps"] if correction.halves else 0)
    else:
        assert said["correction"] == {}


def test_weights_of_ones_own_that_are_made_in_training_may_count_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    one = Summary({}, {}, {})
    one.selection = {"weighed_in_training": True}
    one.say_selected()
    assert capsys.readouterr().out == ""
