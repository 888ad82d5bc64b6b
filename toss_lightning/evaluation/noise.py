"""Which differences of a measure are beyond noise; one rule for a run and for a comparison."""

from collections.abc import Sequence
from typing import Any

from toss_lightning.evaluation.statistics import holm

NOISE = 0.05
"""Differences whose adjusted p-value is below are beyond noise."""


def judged(differences: Sequence[dict[str, Any]], better: str) -> list[dict[str, Any]]:
    """The differences of one measure with ``p_holm``, ``beyond_noise`` and ``better``, where they have a ``p``.

    Args:
        differences: each with ``mean`` and ``p``, or without both where there is too little to test.
        better: ``higher`` or ``lower`` values of the measure.
    """
    tested = [one for one in differences if "p" in one]
    # a p-value of 1 may be above it by rounding
    adjusted = holm([min(one["p"], 1.0) for one in tested])
    facts = iter(
        {"p_holm": p, "beyond_noise": p < NOISE, "better": (one["mean"] > 0) == (better == "higher")}
        for one, p in zip(tested, adjusted, strict=True)
    )
    return [{**one, **next(facts)} if "p" in one else one for one in differences]
