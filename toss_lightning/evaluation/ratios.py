"""Ratios of two means over the same seeds, such as the share of a gap that a method closes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.student import Student


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of means, and between what it may lie."""

    ratio: float | None
    """None where the second mean is 0."""
    low: float
    high: float


def ratio_over_seeds(ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Ratio of two means over seeds, with Fieller's interval (1954).

    With ``d(r) = ours - r theirs`` seed by seed, the interval holds every ``r`` for which Student's test does not tell
    the mean of ``d(r)`` from 0::

        mean(d(r))^2 <= t^2 var(d(r)) / S,    t the quantile with S - 1 degrees of freedom

    Where ``ours`` and ``theirs`` of a seed are jointly normal it holds exactly, however few the seeds and however much
    the two vary together; the percentile bootstrap is too narrow for three to five of them. Where the mean of
    ``theirs`` is itself not told from 0, no finite interval can hold, and this one is infinite; so is that of one seed.

    Args:
        ours: Shape ``[S]``: one value per seed.
        theirs: Shape ``[S]``: of the same seeds in the same order.
        confidence: of the interval.

    Raises:
        ConfigError: shapes differ, there is no seed, or a value is missing.
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1 or not len(left) or not np.isfinite([left, right]).all():
        raise ConfigError(
            f"ratio_over_seeds: shapes {left.shape} and {right.shape}, or values missing: give both for the same seeds"
        )
    over, under, seeds = float(left.mean()), float(right.mean()), len(left)
    ratio = over / under if under else None
    if seeds == 1:
        return Ratio(ratio, -math.inf, math.inf)
    squared = Student(seeds - 1).quantile(confidence) ** 2 / seeds
    (var_over, both), (_, var_under) = (squared * np.cov(left, right)).tolist()
    # where a r^2 - 2 b r + c <= 0; between the roots where the mean of theirs is told from 0, which is a > 0
    a, b, c = under**2 - var_under, over * under - both, over**2 - var_over
    if a <= 0:
        return Ratio(ratio, -math.inf, math.inf)
    reach = math.sqrt(max(b * b - a * c, 0.0))
    return Ratio(ratio, (b - reach) / a, (b + reach) / a)
