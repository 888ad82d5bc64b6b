"""What a run says of itself: in lines, in tables, and in words that need no paper."""

import io

from rich.console import Console

from toss_lightning.report.summary import Summary, held_out_lines, losses_table, plain_words, stage_name

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
    return Summary(held_out={name: dict(losses) for name, losses in LOSSES.items()}, selection=dict(SELECTION))


def test_a_checkpoint_brings_everything_back() -> None:
    first = summary()
    first.of_round(1)["promoted"] = 3
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
    assert state["rounds"] == [{"round": 0, "masked": 1}]
    assert state["held_out"]["base"]["task_loss"] == 3.0


def test_stages_have_names_for_people() -> None:
    one = summary()
    assert [stage_name(one, stage) for stage in LOSSES] == [
        "base model",
        "degraded reference",
        "degraded reference, round 1",
        "plain SFT",
        "TOSS",
    ]
    one.selection["round"] = 1
    assert stage_name(one, "target") == "TOSS-Pro"
    assert stage_name(Summary(), "target") == "target"


def test_the_closing_table_has_a_row_per_stage() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(losses_table(summary()))
    lines = [line for line in console.export_text().splitlines() if "3.900" in line or "0.900" in line]
    assert ["degraded reference, round 1" in line or "TOSS" in line for line in lines] == [True, True]


def test_the_same_in_markdown_for_some_of_the_stages() -> None:
    assert held_out_lines(summary(), ["base", "nothing", "target"]) == [
        "| | task loss (lower is better) | harmful loss (higher is safer) |",
        "|---|---|---|",
        "| base model | 3.000 | 4.000 |",
        "| TOSS | 2.100 | 3.900 |",
    ]


def test_plain_words() -> None:
    words = plain_words(summary())
    assert "75% of the 20 masked tokens lay in contaminated rows (a blind choice would have hit 25%)." in words
    assert "Plain SFT took the task loss from 3.00 to 2.00 and the loss of harmful replies from 4.00 to 2.50" in words
    assert "TOSS took them to 2.10 and 3.90" in words
    assert plain_words(Summary()) == ""


def test_plain_words_of_toss_pro_name_it() -> None:
    one = summary()
    one.selection["round"] = 1
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
