"""What a report says beside its rows: a chapter for each thing there is, and none for what there is not."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from made_runs import measure
from scores_on_disk import add_base, make_scores
from tiny import word_tokenizer

from toss_lightning.report import chapters
from toss_lightning.report.figures import groups_of
from toss_lightning.report.finished import FinishedRun
from toss_lightning.report.summary import Summary
from toss_lightning.report.tokens import risk_score
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, PerRowTopFraction, TokenCleaning, TokenWeights
from toss_lightning.selection.base import mask_weights, token_weights

LABELS: list[str | None] = ["harmful", "benign"] * 10


def made(path: Path, labels: list[str | None] | None = LABELS) -> TokenScores:
    generator = np.random.default_rng(0)
    utility, degraded, base = (generator.normal(size=(20, 6)).tolist() for _ in range(3))
    return add_base(make_scores(path, utility, degraded, labels), base)


def of_scores(scores: TokenScores, weights: TokenWeights | None = None) -> chapters.Chapter:
    score = risk_score(scores)
    assert score is not None
    return chapters.scores(scores, weights, score, groups_of(scores))


def of_mask(scores: TokenScores, weights: TokenWeights) -> chapters.Chapter:
    return chapters.masked(weights, scores, groups_of(scores), word_tokenizer())


def run(summary: Summary | None = None, **facts: Any) -> FinishedRun:
    return FinishedRun(Path("run"), summary=summary or Summary(), **facts)


def texts(picture: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(picture).iter() if one.tag.endswith("}text")]


# --- losses, the probe, judges ----------------------------------------------------------------------------------------


def test_held_out_losses_of_each_stage() -> None:
    losses = {"base": {"task_loss": 3.0, "harmful_loss": 4.0}, "target": {"task_loss": 2.0, "harmful_loss": 3.9}}
    chapter = chapters.held_out(run(Summary(held_out=losses, method="TOSS")))
    assert chapter is not None
    ((header, lines),) = chapter.tables
    assert header == ["", "task loss (lower is better)", "harmful loss (higher is safer)"]
    assert lines == [["base model", "3.000", "4.000"], ["TOSS", "2.000", "3.900"]]


def test_the_margin_is_drawn_from_the_base_on() -> None:
    stages = {"sft": [{"step": 3, "margin": 0.5}, {"step": 6, "margin": 0.1}], "target": [{"step": 3, "margin": 0.9}]}
    probe: dict[str, Any] = {"base": {"margin": 1.0}, "stages": stages}
    chapter = chapters.probe(run(Summary(safety_probe=probe, method="TOSS")))
    assert chapter is not None
    (picture,) = chapter.charts
    assert {"plain SFT", "TOSS"} <= {*texts(picture)}
    assert [len(points.split()) for points in re.findall('points="([^"]*)"', picture)] == [3, 2]


@pytest.mark.parametrize("probe", [{}, {"base": {"margin": 1.0}}, {"base": {"margin": 1.0}, "stages": {}}])
def test_nothing_was_probed(probe: Mapping[str, Any]) -> None:
    assert chapters.probe(run(Summary(safety_probe=dict(probe)))) is None


def test_a_margin_that_is_no_number_is_not_drawn() -> None:
    values = [{"step": 3, "margin": float("nan")}, {"step": 6, "margin": None}, {"step": 9, "margin": 0.5}]
    chapter = chapters.probe(run(Summary(safety_probe={"base": {"margin": 1.0}, "stages": {"target": values}})))
    assert chapter is not None
    (picture,) = chapter.charts
    assert [len(points.split()) for points in re.findall('points="([^"]*)"', picture)] == [2]


def test_what_a_correction_did() -> None:
    chapter = chapters.correction(run(Summary(correction={"steps": 8, "share": 0.123456, "<kind>": "a\nb"})))
    assert chapter is not None
    ((_, lines),) = chapter.tables
    assert lines == [["steps", "8"], ["share", "0.1235"], ["<kind>", "a⏎ b"]]


def test_what_judges_said() -> None:
    rate = measure("harmful compliance", [0.1, 0.2], [0.3, 0.5], judge="Strict | <one>", screening=True)
    found = {
        "adapters": ["base", "target"],
        "measures": [rate],
        "names": {"base": "base model", "target": "TOSS"},
        "divergence": {"harmful replies": {"base": [0.0, 0.0], "target": [0.5, 0.25]}},
        "agreement": [],
        "cut": {"base": 0, "target": 3},
    }
    chapter = chapters.evaluation(run(evaluation=found))
    assert chapter is not None
    ((header, (line,)),) = chapter.tables
    assert header == ["", "judge", "n", "base model", "TOSS"]
    assert line[:3] == ["harmful compliance ↓", "Strict | <one> (screening)", "2"]
    assert len(chapter.charts) == 1
    assert [lines for _, lines in chapter.folded.values()] == [[], []], "no differences, and one judge agrees with none"
    assert chapter.after == ["Replies that were cut at max_new_tokens: base model 0, TOSS 3."]
    still = chapters.evaluation(run(evaluation=found | {"divergence": {}, "cut": {"base": 0}}))
    assert still is not None
    assert (still.charts, still.after) == ([], [])


def test_what_was_not_done_has_no_chapter() -> None:
    empty = run()
    for chapter in (
        chapters.held_out,
        chapters.probe,
        chapters.correction,
        chapters.evaluation,
        chapters.sets,
        chapters.rounds,
    ):
        assert chapter(empty) is None


def test_sets_are_counted() -> None:
    custom = {"set": "custom", "rows": 12345, "response_tokens": 9, "dropped": 1, "truncated": 0, "longest": 7}
    chapter = chapters.sets(run(facts={"data": [custom]}))
    assert chapter is not None
    ((_, lines),) = chapter.tables
    assert lines == [["custom", "12,345", "9", "1", "0", "7"]]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_of_labelled_rows_have_three_pictures_and_say_what_they_know(tmp_path: Path) -> None:
    chapter = of_scores(made(tmp_path))
    lies, places, hits = chapter.charts
    for picture in (lies, places, hits):
        assert {"harmful", "benign"} <= {*texts(picture)}
    assert "token score, nats (outermost: all beyond)" in texts(lies)
    assert "a blind choice" in texts(hits)
    assert "mean token score, nats" in texts(places)
    assert "token loss of the utility reference minus that of the degraded reference" in chapter.before[0]
    assert re.search(r"with probability 0\.\d{3}, and such a row .* probability 0\.\d{3} \(AUROC", chapter.before[1])


@pytest.mark.parametrize("labels", [None, ["benign"] * 20, ["harmful"] * 20])
def test_scores_without_both_labels_say_nothing_of_them(tmp_path: Path, labels: list[str | None] | None) -> None:
    chapter = of_scores(made(tmp_path, labels))
    assert len(chapter.charts) == 2
    assert len(chapter.before) == 1


def test_labels_that_svg_would_take_for_its_own(tmp_path: Path) -> None:
    for picture in of_scores(made(tmp_path, ["<b>&</b>", "harmful"] * 10)).charts:
        assert "<b>&</b>" in texts(picture)


def test_rows_too_few_for_means_have_no_picture_of_places(tmp_path: Path) -> None:
    chapter = of_scores(make_scores(tmp_path, [[1.0, 2.0]] * 3))
    assert len(chapter.charts) == 1


def test_scores_that_are_all_equal_are_drawn(tmp_path: Path) -> None:
    for picture in of_scores(make_scores(tmp_path, [[0.0, 0.0]] * 20, labels=["harmful", "benign"] * 10)).charts:
        assert texts(picture)


def marks(scores: TokenScores, weights: TokenWeights) -> list[str]:
    return [one for picture in of_scores(scores, weights).charts for one in texts(picture) if one.startswith("masked")]


def test_the_threshold_of_a_mask_is_marked(tmp_path: Path) -> None:
    scores = made(tmp_path)
    weights = GlobalTopFraction(0.2).select(scores)
    score, masked = risk_score(scores), weights.flat() == 0
    assert score is not None
    assert marks(scores, weights) == [f"masked from {score.values[masked].min():.3g}"]
    assert len(of_scores(scores, weights).before) == 2


@pytest.mark.parametrize("discard", [0.2, 0.6])
def test_a_mask_that_is_no_cut_through_all_scores_has_no_mark(tmp_path: Path, discard: float) -> None:
    """Of each row the highest: what is masked in one row is kept in another."""
    scores = made(tmp_path)
    weights = PerRowTopFraction(discard).select(scores)
    assert marks(scores, weights) == []
    assert "The mask of this run does not come from one threshold on these scores." in of_scores(scores, weights).before


def test_a_threshold_on_other_scores_is_not_marked(tmp_path: Path) -> None:
    scores = made(tmp_path)
    score = risk_score(scores)
    assert score is not None
    masked = score.values > 0.5
    masked[np.flatnonzero(masked)[::2]] = False  # something else decided
    assert marks(scores, mask_weights(scores, masked, threshold=0.25)) == []


def test_a_mask_of_the_lowest_scores_has_no_mark(tmp_path: Path) -> None:
    """TokenCleaning masks what is least useful, and says its threshold on a scale of its own."""
    scores = made(tmp_path)
    assert marks(scores, TokenCleaning(0.3).select(scores)) == []


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_a_mask_of_nothing_has_no_mark(tmp_path: Path, threshold: float | None) -> None:
    scores = made(tmp_path)
    assert marks(scores, mask_weights(scores, np.zeros(120, dtype=bool), threshold=threshold)) == []


# --- the mask ---------------------------------------------------------------------------------------------------------


def test_what_is_masked_of_each_label_and_source(tmp_path: Path) -> None:
    scores = made(tmp_path)
    masked = np.zeros(120, dtype=bool)
    masked[[0, 1, 2, 6]] = True  # three tokens of a harmful row, and one of a benign one
    chapter = of_mask(scores, mask_weights(scores, masked))
    (labels, by_label), (sources, by_source) = chapter.tables
    assert labels == ["label", "tokens", "masked", "share of its tokens", "share of what is masked"]
    assert by_label == [["benign", "60", "1", "1.7%", "25.0%"], ["harmful", "60", "3", "5.0%", "75.0%"]]
    assert (sources[0], by_source) == ("source", [["made", "120", "4", "3.3%", "100.0%"]])
    assert chapter.before == ["4 of 120 response tokens masked (3.3%); 0 of 20 rows are masked in full."]
    (picture,) = chapter.charts
    assert "share of the tokens masked" in texts(picture)
    ((_, often),) = chapter.folded.values()
    assert often == [["<|im_start|>", "2", "20", "10%"], ["<|im_end|>", "1", "20", "5%"], ["system", "1", "20", "5%"]]


def test_a_mask_of_nothing_lists_no_tokens(tmp_path: Path) -> None:
    scores = made(tmp_path)
    chapter = of_mask(scores, mask_weights(scores, np.zeros(120, dtype=bool)))
    assert chapter.before == ["0 of 120 response tokens masked (0.0%); 0 of 20 rows are masked in full."]
    assert not any((chapter.charts, chapter.tables, chapter.folded))


def test_a_selection_without_its_scores_is_still_counted(tmp_path: Path) -> None:
    scores = made(tmp_path)
    chapter = chapters.masked(mask_weights(scores, np.arange(120) % 4 == 0), None, [], None)
    assert chapter.before == ["30 of 120 response tokens masked (25.0%); 0 of 20 rows are masked in full."]
    assert [len(lines) for _, lines in chapter.tables] == [2, 1]
    assert list(chapter.charts) == []


def test_tokens_that_are_weighed_in_training_are_said_to_be(tmp_path: Path) -> None:
    scores = made(tmp_path)
    weights = token_weights(scores, np.ones(120), weighed_in_training=True)
    assert of_mask(scores, weights).before == ["120 response tokens, which are weighed anew in each step."]


@pytest.mark.parametrize("report", [{}, {"flavour": "mine"}])
def test_a_selection_of_ones_own_that_counts_nothing(tmp_path: Path, report: dict[str, str]) -> None:
    scores = made(tmp_path)
    weights = mask_weights(scores, np.arange(120) % 4 == 0)
    chapter = of_mask(scores, TokenWeights(weights.weights, weights.hashes, dict(report)))
    assert list(chapter.before) == []
    assert [lines for _, lines in chapter.tables] == [[], []]
    assert len(chapter.charts) == 1


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_rounds() -> None:
    one = Summary()
    one.of_round(0).update(threshold=1.5, harmful_loss=None)
    one.of_round(1).update(
        promoted=3, promoted_per_label={"benign": 1, "harmful": 2}, harmful_loss=0.9, threshold=1.25, jaccard=0.5
    )
    one.of_round(2).update(promoted=2, promoted_per_label={}, threshold=None, jaccard=1.0)
    chapter = chapters.rounds(run(one))
    assert chapter is not None
    ((_, lines),) = chapter.tables
    assert lines == [
        ["0", "", "", "1.500", ""],
        ["1", "3 (1 benign, 2 harmful)", "0.900", "1.250", "50%"],
        ["2", "2", "", "", "100%"],
    ]
    assert len(chapter.after) == 1


def test_rounds_say_which_one_was_selected_from(tmp_path: Path) -> None:
    one = Summary()
    one.of_round(1)
    scores = made(tmp_path)
    chapter = chapters.rounds(run(one, weights=mask_weights(scores, np.zeros(120, dtype=bool))))
    assert chapter is not None
    assert chapter.after[1] == "The selection is by the scores of round 0."


def test_one_round_is_none_of_toss_pro() -> None:
    one = Summary()
    one.of_round(0).update(threshold=1.5)
    assert chapters.rounds(run(one)) is None
