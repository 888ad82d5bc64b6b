"""How far apart the weights of many tokens lie: weights that are nearly equal do what plain fine-tuning does."""

import math
from dataclasses import dataclass

from torch import Tensor

NARROW = 0.01
"""Standard deviation, as a share of the mean, below which weights are nearly equal."""
ROUNDING = 1e-6
"""The same of weights that are equal: what sums of float32 weights leave."""


@dataclass
class Spread:
    """Sums over weights that come a few at a time; plain numbers, so that a checkpoint holds them exactly."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, weights: Tensor) -> None:
        """Takes in more weights, of any shape."""
        exact = weights.detach().cpu().double()
        self.take(exact.numel(), float(exact.sum()), float(exact.square().sum()))

    def take(self, count: float, total: float, squares: float) -> None:
        """Takes in the sums over more weights."""
        self.count, self.total, self.squares = self.count + int(count), self.total + total, self.squares + squares

    @property
    def narrow(self) -> str | None:
        """That the weights are equal or nearly so, in words; None where they are not, or are all 0."""
        if not self.total:
            return None
        mean = self.total / self.count
        deviation = math.sqrt(max(0.0, self.squares / self.count - mean**2))
        if deviation >= NARROW * abs(mean):
            return None
        if deviation <= ROUNDING * abs(mean):
            return f"the same weight ({mean:g})"
        return f"nearly the same weight, {mean:.3g} ± {deviation:.1g}"
