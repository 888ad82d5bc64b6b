"""A colour for each token score."""

import numpy as np

from toss_lightning.report.tokens import RiskScore

COOL, WARM = (86, 180, 233), (230, 125, 20)
"""Of scores below and above 0: red, green and blue."""
DEPTHS = (0.0, 0.25, 0.45, 0.7, 0.95)
"""How much of its colour a score has, from those about 0 to those at :data:`FULL`."""
FULL = 0.975
"""Quantile of the absolute scores from which on a token has all of its colour."""


class Shade:
    """A colour for each score: the bluer, the better the first of the two sides likes a token; the other way, orange.

    Args:
        score: of all tokens.
    """

    def __init__(self, score: RiskScore | None) -> None:
        self.full = float(np.quantile(np.abs(score.values), FULL)) if score is not None else 0.0
        steps = range(1, len(DEPTHS))
        of = {f"c{step}": (COOL, step) for step in reversed(steps)} | {f"w{step}": (WARM, step) for step in steps}
        self.colours = {name: _mixed(colour, DEPTHS[step]) for name, (colour, step) in of.items()}
        """Class -> colour, from the lowest scores to the highest."""

    def __call__(self, score: float | None) -> str:
        """The class of a score; none for one about 0."""
        if score is None or not self.full:
            return ""
        step = round(min(1.0, abs(score) / self.full) * (len(DEPTHS) - 1))
        return f"{'w' if score > 0 else 'c'}{step}" if step else ""


def _mixed(colour: tuple[int, int, int], depth: float) -> str:
    return "#" + "".join(f"{round(255 + (part - 255) * depth):02x}" for part in colour)
