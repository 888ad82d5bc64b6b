"""Student's distribution, without SciPy."""

import math

import numpy as np


class Student:
    """Student's distribution by quadrature over ``arctan(t / sqrt(df))``, whose density is ``cos^(df - 1)``."""

    cells = 100_000

    def __init__(self, freedom: float) -> None:
        # beyond it is the normal distribution to four digits, and too narrow for the grid
        self.freedom = min(freedom, 10_000.0)
        self.angles = np.arange(self.cells + 1) * (math.pi / 2 / self.cells)
        mass = np.cos((self.angles[:-1] + self.angles[1:]) / 2) ** (self.freedom - 1)
        # summed from the far end, so that small tails keep their digits
        tail = np.cumsum(mass[::-1])[::-1]
        self.tail = np.append(tail, 0) / tail[0]

    def p(self, t: float) -> float:
        """Two-sided p-value."""
        return float(np.interp(math.atan(abs(t) / math.sqrt(self.freedom)), self.angles, self.tail))

    def quantile(self, level: float) -> float:
        """What ``|t|`` is below with probability ``level``."""
        angle = np.interp(1 - level, self.tail[::-1], self.angles[::-1])
        return math.sqrt(self.freedom) * math.tan(angle)
