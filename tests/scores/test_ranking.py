import numpy as np
import pytest

from toss_lightning.errors import StoreError
from toss_lightning.scores import exact_top, share_of


def stable_sort_top(scores: np.ndarray, count: int) -> np.ndarray:
    marked = np.zeros(len(scores), dtype=bool)
    marked[np.argsort(-scores, kind="stable")[:count]] = True
    return marked


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_stable_descending_sort_ties_included(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(-3, 4, generator.integers(1, 200)).astype(np.float32)
    for count in {0, 1, len(scores) // 3, len(scores) - 1, len(scores)}:
        np.testing.assert_array_equal(exact_top(scores, count), stable_sort_top(scores, count))


def test_among_equal_scores_the_earliest_is_taken() -> None:
    assert exact_top(np.array([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]


def test_infinite_scores_rank_like_any_other() -> None:
    assert exact_top(np.array([np.inf, 0.0, -np.inf]), 1).tolist() == [True, False, False]


def test_a_score_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(StoreError, match="2 token scores are not a number"):
        exact_top(np.array([1.0, np.nan, np.nan]), 1)


@pytest.mark.parametrize(
    ("share", "count", "wanted"), [(0.29, 100, 29), (0.1, 30, 3), (0.7, 10, 7), (0.0, 5, 0), (0.1, 9, 0)]
)
def test_the_share_is_the_number_that_was_written(share: float, count: int, wanted: int) -> None:
    assert share_of(share, count) == wanted
