from pathlib import Path

import numpy as np
import pytest
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, PerRowTopFraction, TokenWeights


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


@pytest.mark.parametrize("discard", [-0.1, 1.0, 7.0])
def test_a_discard_that_is_no_share_is_refused_before_anything_runs(discard: float) -> None:
    with pytest.raises(ConfigError, match=rf"selection.discard: {discard} is not a share: give a number in \[0, 1\)"):
        GlobalTopFraction(discard)


def test_more_than_may_be_masked(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ConfigError, match="asks for 3 of 4 tokens, but only 2 are not end-of-turn tokens"):
        GlobalTopFraction(0.9).select(scores)
