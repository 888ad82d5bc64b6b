"""How values of several seeds are written down."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def spread(values: Sequence[float], pattern: str = "{:.3f}") -> str:
    """Mean and, from two seeds on, the half-width of a 95 % t-interval."""
    mean = pattern.format(np.mean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {pattern.format(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))}"
