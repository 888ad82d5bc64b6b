"""Scores, or whole rows -> token weights."""

from toss_lightning.selection.anchor import Anchored, Everything
from toss_lightning.selection.base import OnlineSelection, Selection, mask_weights, row_weights, token_weights
from toss_lightning.selection.chain import ChainSelection
from toss_lightning.selection.constrained import ConstrainedSft
from toss_lightning.selection.dr_sft import DrSft
from toss_lightning.selection.dsir import Dsir
from toss_lightning.selection.excess_loss import Rho1, TokenCleaning
from toss_lightning.selection.mask_first import MaskFirst
from toss_lightning.selection.promotion import Promotion, promote
from toss_lightning.selection.rows import RandomRows, TossRows
from toss_lightning.selection.seal import Seal, SelectorTraining
from toss_lightning.selection.sot import Sot
from toss_lightning.selection.top_fraction import GlobalTopFraction, PerRowTopFraction
from toss_lightning.selection.weights import TokenWeights

__all__ = [
    "Anchored",
    "ChainSelection",
    "ConstrainedSft",
    "DrSft",
    "Dsir",
    "Everything",
    "GlobalTopFraction",
    "MaskFirst",
    "OnlineSelection",
    "PerRowTopFraction",
    "Promotion",
    "RandomRows",
    "Rho1",
    "Seal",
    "Selection",
    "SelectorTraining",
    "Sot",
    "TokenCleaning",
    "TokenWeights",
    "TossRows",
    "mask_weights",
    "promote",
    "row_weights",
    "token_weights",
]
