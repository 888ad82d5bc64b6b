"""A selection that knows which rows are harmful: what no method can know, to tell what perfect scores would bring."""

import numpy as np

from toss_lightning.scores import TokenScores
from toss_lightning.selection import Selection, TokenWeights, mask_weights


class HarmfulRows(Selection):
    """Masks every token of the rows that are labelled harmful.

    Args:
        protect_end: never mask an end-of-turn token, as the other selections do.
    """

    columns = ()

    def __init__(self, protect_end: bool = True) -> None:
        self.protect_end = protect_end

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks them."""
        harmful = np.array([label == "harmful" for label in scores.values("label")])
        masked = np.repeat(harmful, np.diff(scores.offsets))
        if self.protect_end:
            masked &= ~scores.flat("end_of_turn").astype(bool)
        return mask_weights(scores, masked)
