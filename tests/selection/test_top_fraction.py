import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import TokenScores
from toss_lightning.selection import ChainSelection, GlobalTopFraction, PerRowTopFraction, TokenWeights


def masked(weights: TokenWeights) -> np.ndarray:
    return weights.flat() == 0


def naive_mask(scores: TokenScores, discard: float, protect_end: bool) -> np.ndarray:
    """A plain stable sort over (row, position), as the paper says it."""
    score, end = scores.score().tolist(), scores.flat("end_of_turn").tolist()
    order = sorted(range(len(score)), key=lambda index: -score[index])
    free = [index for index in order if not (protect_end and end[index])]
    wanted = np.zeros(len(score), dtype=bool)
    wanted[free[: int(round(discard * 1000) * len(score) // 1000)]] = True
    return wanted


@pytest.mark.parametrize("protect_end", [True, False])
@pytest.mark.parametrize("discard", [0.0, 0.1, 0.29, 0.5])
def test_the_mask_is_that_of_a_naive_stable_sort_ties_included(
    tmp_path: Path, discard: float, protect_end: bool
) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(-2, 3, size) / 2 for size in generator.integers(2, 30, 25)]
    scores = make_scores(tmp_path / "scores", rows)
    weights = GlobalTopFraction(discard, protect_end).select(scores)
    np.testing.assert_array_equal(masked(weights), naive_mask(scores, discard, protect_end))
    assert weights.report["masked"] == int(round(discard * 1000) * len(scores.score()) // 1000)


def test_the_riskiest_tokens_of_all_rows_go(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.1, 9.0, 0.0], [0.2, 0.3, 0.0], [8.0, 7.0, 0.0]])
    weights = GlobalTopFraction(discard=0.34).select(scores).weights
    assert [weight.tolist() for weight in weights.values()] == [[1, 0, 1], [1, 1, 1], [0, 0, 1]]


def test_per_row_takes_the_same_share_of_each_row(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.1, 9.0, 0.0], [0.2, 0.3, 0.0], [8.0, 7.0, 0.0]])
    weights = PerRowTopFraction(discard=0.34).select(scores).weights
    assert [weight.tolist() for weight in weights.values()] == [[1, 0, 1], [1, 0, 1], [0, 1, 1]]


def test_end_tokens_stay_and_the_report_says_how_many_would_have_gone(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0, 0.1, 9.0], [0.2, 0.3, 8.0]])
    chosen = GlobalTopFraction(discard=0.5).select(scores)
    assert masked(chosen).tolist() == [False, True, False, True, True, False]
    assert chosen.report["end_tokens"] == 2
    assert chosen.report["end_tokens_protected"] == 2
    paper = GlobalTopFraction(discard=0.5, protect_end=False).select(scores)
    assert masked(paper).tolist() == [False, False, True, False, True, True]
    assert paper.report["end_tokens_protected"] == 0


def test_weights_of_the_two_losses_change_the_ranking(tmp_path: Path) -> None:
    utility, degraded = [[3.0, 1.0, 0.0]], [[3.0, 0.0, 0.0]]
    scores = make_scores(tmp_path / "scores", utility, degraded)
    assert masked(GlobalTopFraction(0.34).select(scores)).tolist() == [False, True, False]
    assert masked(GlobalTopFraction(0.34, degraded_weight=0.0).select(scores)).tolist() == [True, False, False]


def test_the_report_counts_by_source_and_label(tmp_path: Path) -> None:
    scores = make_scores(
        tmp_path / "scores", [[9.0, 8.0, 7.0, 0.0], [0.0, 0.0, 0.0, 0.0]], labels=["harmful", "benign"], protect=False
    )
    report = GlobalTopFraction(0.375).select(scores).report
    assert report["tokens"] == 8
    assert report["kept"] == 5
    assert report["threshold"] == 7.0
    assert report["rows_fully_masked"] == 0
    assert report["masked_share_per_label"]["harmful"] == {
        "tokens": 4,
        "masked": 3,
        "share_of_its_tokens_masked": 0.75,
        "share_of_masked_tokens": 1.0,
    }
    assert report["masked_share_per_source"]["made"]["masked"] == 3


def test_rows_that_lose_everything_are_counted(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[9.0, 8.0], [0.0, 0.0]], protect=False)
    assert GlobalTopFraction(0.5).select(scores).report["rows_fully_masked"] == 1


@pytest.mark.parametrize("protect_end", [True, False])
@pytest.mark.parametrize("discard", [0.0, 0.1, 0.29, 0.5])
def test_the_mask_of_each_row_is_that_of_a_naive_stable_sort_ties_included(
    tmp_path: Path, discard: float, protect_end: bool
) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(-2, 3, size) / 2 for size in generator.integers(2, 30, 25)]
    assert any(len(set(row.tolist())) < len(row) for row in rows), "the test is about ties"
    scores = make_scores(tmp_path / "scores", rows)
    weights = PerRowTopFraction(discard, protect_end).select(scores)
    for row_id, row in enumerate(rows):
        score = row.tolist()
        free = [at for at in range(len(score)) if not (protect_end and at == len(score) - 1)]
        going = sorted(free, key=lambda at: -score[at])[: round(discard * 1000) * len(score) // 1000]
        assert np.flatnonzero(weights.weights[row_id] == 0).tolist() == sorted(going)
    assert weights.report["masked_share"] == pytest.approx(masked(weights).mean())


def test_a_share_of_each_row_that_masks_almost_nothing_is_reported_and_said(tmp_path: Path) -> None:
    varied = np.random.default_rng(0).normal(size=(40, 9)).tolist()
    scores = make_scores(tmp_path / "short", varied)
    with pytest.warns(
        UserWarning, match=r"discard: 0.1 of each row masks only 0 of 360 .* fewer than 10 loses none: raise it, or"
    ):
        chosen = PerRowTopFraction(0.1).select(scores)
    assert chosen.report["masked_share"] == 0.0
    # of 37 tokens, a tenth of all, the 17 rows of 10 tokens lose one each
    mixed = [[*row, 0.0] if at < 17 else row for at, row in enumerate(varied)]
    with pytest.warns(UserWarning, match="masks only 17 of 377 tokens"):
        chosen = PerRowTopFraction(0.1).select(make_scores(tmp_path / "mixed", mixed))
    assert chosen.report["masked_share"] == pytest.approx(17 / 377)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = [[*row, 0.0] if at < 19 else row for at, row in enumerate(varied)]
        PerRowTopFraction(0.1).select(make_scores(tmp_path / "enough", enough))
        PerRowTopFraction(0.0).select(scores)
        assert GlobalTopFraction(0.1).select(scores).report["masked_share"] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [GlobalTopFraction, PerRowTopFraction, ChainSelection])
def test_scores_that_are_all_equal_are_no_reason_to_mask_some(tmp_path: Path, kind: type) -> None:
    losses = [[1.5, 0.5, 2.0, 9.0], [0.25, 3.0, 1.0, 1.0]]
    scores = make_scores(tmp_path / "scores", losses, losses)
    with pytest.raises(
        StoreError,
        match=r"scores: all 6 tokens that may go have the same score \(0\), .*: are both references the same",
    ):
        kind(0.5).select(scores)
    assert not masked(kind(0.0).select(scores)).any(), "nothing is to be chosen"
    assert masked(kind(0.75).select(scores)).sum() == 6, "everything that may go goes"
    # the ends differ, and are not to go
    tied = make_scores(tmp_path / "tied", [[1.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 0.0]])
    with pytest.raises(StoreError, match=r"the same score \(1\)"):
        kind(0.5).select(tied)
    assert masked(kind(0.5, protect_end=False).select(tied)).sum() == 4


@pytest.mark.parametrize("kind", [GlobalTopFraction, PerRowTopFraction])
@pytest.mark.parametrize("discard", [0.0, 0.1, 0.9])
def test_a_single_token_stays(tmp_path: Path, kind: type, discard: float) -> None:
    assert kind(discard, protect_end=False).select(make_scores(tmp_path / "scores", [[3.0]])).flat().tolist() == [1.0]


@pytest.mark.parametrize("kind", [GlobalTopFraction, PerRowTopFraction])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_refused_and_counted(tmp_path: Path, kind: type, value: float) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, value, 0.0]], [[2.0, 0.0, value]])
    with pytest.raises(
        StoreError, match=r"2 token scores are not a number: .* \(not so: 1 of loss_utility, 1 of loss_de"
    ):
        kind(0.34).select(scores)


@pytest.mark.parametrize("kind", [GlobalTopFraction, PerRowTopFraction])
@pytest.mark.parametrize("name", ["utility_weight", "degraded_weight"])
def test_weights_of_the_two_losses_that_make_no_score_are_refused(kind: type, name: str) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"loop.selection.{name}: {value} is no weight: give a finite number"):
            kind(**{name: value})
    with pytest.raises(ConfigError, match=r"loop.selection.utility_weight: with degraded_weight it is 0, which makes"):
        kind(utility_weight=0.0, degraded_weight=0.0)
    assert getattr(kind(**{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("discard", [-0.1, 1.0, 7.0, math.nan])
def test_a_discard_that_is_no_share_is_refused_before_anything_runs(discard: float) -> None:
    with pytest.raises(ConfigError, match=rf"selection.discard: {discard} is not a share: give a number in \[0, 1\)"):
        GlobalTopFraction(discard)


def test_more_than_may_be_masked(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ConfigError, match="asks for 3 of 4 tokens, but only 2 are not end-of-turn tokens"):
        GlobalTopFraction(0.9).select(scores)
