"""TOSS: mask the riskiest share of all response tokens (arXiv 2603.01185), and its per-row ablation."""

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection, mask_weights
from toss_lightning.selection.checks import (
    SAME_REFERENCES,
    check_discard,
    check_score_weights,
    check_told_apart,
    masked_count,
)
from toss_lightning.selection.weights import TokenWeights


class GlobalTopFraction(Selection):
    """Masks the ``floor(discard * N)`` riskiest of all N response tokens of the custom set; the paper's selection.

    The token score is ``utility_weight * L^u - degraded_weight * L^h``; ties go to the earliest (row, position).

    Args:
        discard: share of the response tokens that get weight 0, in [0, 1). The paper uses 0.1.
        protect_end: never mask an end-of-turn token, so that the model still learns to stop; the next riskiest tokens
            take their place. ``false`` is the paper's letter.
        utility_weight: weight of the utility loss in the score; the paper uses 1.
        degraded_weight: weight of the degraded loss in the score; the paper uses 1.

    Raises:
        ConfigError: ``discard`` is outside [0, 1), or the weights of the losses are not finite or both 0.
    """

    def __init__(
        self,
        discard: float = 0.1,
        protect_end: bool = True,
        utility_weight: float = 1.0,
        degraded_weight: float = 1.0,
    ) -> None:
        check_discard(discard)
        check_score_weights(utility_weight, degraded_weight)
        self.discard, self.protect_end = discard, protect_end
        self.utility_weight, self.degraded_weight = utility_weight, degraded_weight

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks the riskiest tokens.

        Raises:
            ConfigError: ``discard`` is more than there are tokens that may be masked.
            StoreError: a score is not a number, or all tokens that may be masked have the same.
        """
        score = scores.score(self.utility_weight, self.degraded_weight)
        end = scores.flat("end_of_turn")
        protected = end if self.protect_end else np.zeros_like(end)
        masked, unprotected = self._mask(scores, score, protected), self._mask(scores, score, np.zeros_like(end))
        check_told_apart(score[~protected], int(masked.sum()), scores.path, "tokens that may go", SAME_REFERENCES)
        return mask_weights(
            scores,
            masked,
            discard=self.discard,
            masked_share=float(masked.mean()),
            threshold=float(score[masked].min()) if masked.any() else None,
            end_tokens=int(end.sum()),
            end_tokens_protected=int((unprotected & protected).sum()),
        )

    def _mask(self, scores: TokenScores, score: np.ndarray, protected: np.ndarray) -> np.ndarray:
        return _riskiest(score, protected, self.discard)


class PerRowTopFraction(GlobalTopFraction):
    """Masks the ``floor(discard * N_i)`` riskiest of the N_i response tokens of each row: the paper's ablation of the
    global ranking. Arguments as for :class:`GlobalTopFraction`; the reported threshold is the lowest of all rows.

    A row of fewer than ``1 / discard`` tokens loses none, so that less than ``discard`` of all tokens is masked.
    """

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks the riskiest tokens of each row, and warns where short rows leave less than half of the share masked.

        Raises:
            ConfigError: ``discard`` is more than there are tokens of a row that may be masked.
            StoreError: a score is not a number, or all tokens that may be masked have the same.
        """
        chosen = super().select(scores)
        masked, tokens = chosen.report["masked"], chosen.report["tokens"]
        if masked < share_of(self.discard, tokens) / 2:
            rank_zero_warn(
                f"loop.selection.discard: {self.discard} of each row masks only {masked} of {tokens} tokens, for a row"
                f" of fewer than {1 / self.discard:.4g} loses none: raise it, or choose GlobalTopFraction"
            )
        return chosen

    def _mask(self, scores: TokenScores, score: np.ndarray, protected: np.ndarray) -> np.ndarray:
        rows = zip(scores.per_row(score), scores.per_row(protected), strict=True)
        return np.concatenate([_riskiest(row, kept, self.discard) for row, kept in rows])


def _riskiest(score: np.ndarray, protected: np.ndarray, discard: float) -> np.ndarray:
    """The ``floor(discard * N)`` highest of N scores that are not protected; ``[N]`` bool."""
    free = np.flatnonzero(~protected)
    count = masked_count(discard, len(score), len(free))
    masked = np.zeros(len(score), dtype=bool)
    masked[free[exact_top(score[free], count)]] = True
    return masked
