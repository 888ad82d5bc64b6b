"""Masks the first tokens of every response: the fixed rule that TOSS is compared with (arXiv 2603.01185)."""

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection, mask_weights
from toss_lightning.selection.weights import TokenWeights


class MaskFirst(Selection):
    """Masks the first ``count`` response tokens of each row, where fine-tuning moves an aligned model most.

    In a row of several replies, the first tokens of the row: those of its first reply.

    Args:
        count: tokens to mask in each row.
        protect_end: never mask an end-of-turn token, which would otherwise be lost in replies shorter than ``count``.

    Raises:
        ConfigError: ``count`` is less than 1.
    """

    columns = ()

    def __init__(self, count: int = 5, protect_end: bool = True) -> None:
        if count < 1:
            raise ConfigError(f"loop.selection.count: {count} masks nothing: give 1 or more")
        self.count, self.protect_end = count, protect_end

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks the first tokens.

        Raises:
            ConfigError: nothing but end-of-turn tokens would be left to train on.
        """
        lengths, end = np.diff(scores.offsets), scores.flat("end_of_turn")
        ordinal = np.arange(len(end)) - np.repeat(scores.offsets[:-1], lengths)
        first = ordinal < self.count
        if (first | end).all():
            raise ConfigError(
                f"loop.selection.count: {self.count} leaves no response token to train on but ends of turns (the"
                f" longest response has {lengths.max(initial=0)} tokens): lower it"
            )
        masked = first & ~end if self.protect_end else first
        return mask_weights(scores, masked, count=self.count, end_tokens_protected=int((first & ~masked).sum()))
