"""The exact top of any number of scores."""

from fractions import Fraction

import numpy as np

from toss_lightning.errors import StoreError


def share_of(share: float, count: int) -> int:
    """``floor(share * count)`` of the number a person wrote: 0.29 of 100 is 29, though 0.29 * 100 is 28.999..."""
    return int(Fraction(str(share)) * count)


def exact_top(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks the ``count`` highest scores; among equals the earliest come first.

    Equal to a stable descending sort, in linear time.

    Args:
        scores: Shape ``[N]``, finite.
        count: how many to mark, at most N.

    Returns:
        Shape ``[N]`` bool.

    Raises:
        StoreError: a score is not a number.
    """
    if np.isnan(scores).any():
        raise StoreError(f"{int(np.isnan(scores).sum())} token scores are not a number: score the custom set again")
    top = np.zeros(len(scores), dtype=bool)
    if count == 0:
        return top
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    top[scores > threshold] = True
    ties = np.flatnonzero(scores == threshold)
    top[ties[: count - int(top.sum())]] = True
    return top
