"""Keep the tokens that a model finds harder than the utility reference does: Rho-1 and token cleaning.

Both use one reference and no harmful set. Beside TOSS they are controls: what selecting by utility alone does.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import OnlineSelection, Selection, mask_weights
from toss_lightning.selection.checks import check_discard, check_told_apart, masked_count
from toss_lightning.selection.online import to_be_weighed
from toss_lightning.selection.weights import TokenWeights


class TokenCleaning(Selection):
    """Masks the ``floor(discard * N)`` of all N response tokens whose loss the utility reference lowered least.

    The score is ``L^base - L^u``; among equals the earliest (row, position) are kept. The fixed-model variant of Token
    Cleaning (ICML 2025).

    Args:
        discard: share of the response tokens that get weight 0, in [0, 1). Published: 0.4, written as 0.6 kept.
        protect_end: never mask an end-of-turn token; the next lowest tokens take their place.

    Raises:
        ConfigError: ``discard`` is outside [0, 1).
    """

    columns = ("base", "utility")

    def __init__(self, discard: float = 0.4, protect_end: bool = True) -> None:
        check_discard(discard)
        self.discard, self.protect_end = discard, protect_end

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks the tokens of the lowest score.

        Raises:
            ConfigError: ``discard`` is more than there are tokens that may be masked.
            StoreError: a score is not a number, or all tokens that may be masked have the same.
        """
        score = scores.combine({"loss_base": 1.0, "loss_utility": -1.0})
        end = scores.flat("end_of_turn")
        protected = end & self.protect_end
        masked = self._lowest(score, protected)
        check_told_apart(
            score[~protected],
            int(masked.sum()),
            scores.path,
            "tokens that may go",
            "is the utility reference an adapter that learned nothing? Give another, and score again",
        )
        return mask_weights(
            scores,
            masked,
            discard=self.discard,
            threshold=float(score[masked].max()) if masked.any() else None,
            end_tokens=int(end.sum()),
            end_tokens_protected=int((self._lowest(score, np.zeros_like(end)) & protected).sum()),
        )

    def _lowest(self, score: np.ndarray, protected: np.ndarray) -> np.ndarray:
        free = np.flatnonzero(~protected)
        count = masked_count(self.discard, len(score), len(free))
        masked = np.zeros(len(score), dtype=bool)
        masked[free[~exact_top(score[free], len(free) - count)]] = True
        return masked


class Rho1(OnlineSelection):
    """Leaves out, in each optimizer step, the ``floor(discard * N)`` of its N tokens with the lowest excess loss.

    The excess loss is the target's current loss minus the utility reference's (selective language modelling, arXiv
    2404.07965). Among equals the earliest of the step are kept. A step with fewer tokens than that beside its ends of
    turns leaves those few out.

    Args:
        discard: share of an optimizer step's response tokens that get weight 0, in [0, 1).
        protect_end: never leave out an end-of-turn token; the next lowest tokens take their place.

    Raises:
        ConfigError: ``discard`` is outside [0, 1).
    """

    columns = ("utility",)
    whole_step = True

    def __init__(self, discard: float = 0.4, protect_end: bool = True) -> None:
        check_discard(discard)
        self.discard, self.protect_end = discard, protect_end

    def select(self, scores: TokenScores) -> TokenWeights:
        """Hands over the losses of the utility reference, and which tokens end a turn.

        Raises:
            StoreError: a loss is not finite.
        """
        end = int(scores.flat("end_of_turn").sum())
        return to_be_weighed(scores, ("loss_utility", "end_of_turn"), discard=self.discard, end_tokens=end)

    def weigh(self, losses: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Weight 0 for the tokens of the lowest excess loss, 1 for the others; ``[N]``."""
        excess = losses - tokens["loss_utility"]
        free = torch.arange(len(losses), device=losses.device)
        if self.protect_end:
            free = free[tokens["end_of_turn"] == 0]
        count = min(share_of(self.discard, len(losses)), len(free))
        order = torch.sort(excess[free], descending=True, stable=True).indices
        weights = torch.ones_like(losses)
        weights[free[order[len(free) - count :]]] = 0.0
        return weights
