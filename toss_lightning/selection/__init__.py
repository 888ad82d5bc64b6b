"""Scores -> token weights."""

from toss_lightning.selection.base import Selection, TokenWeights, mask_weights
from toss_lightning.selection.promotion import Promotion, promote
from toss_lightning.selection.top_fraction import GlobalTopFraction, PerRowTopFraction

__all__ = [
    "GlobalTopFraction",
    "PerRowTopFraction",
    "Promotion",
    "Selection",
    "TokenWeights",
    "mask_weights",
    "promote",
]
