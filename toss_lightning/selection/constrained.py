"""Constrained SFT: tokens that the target already likes more than the base count less (arXiv 2406.05946)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from toss_lightning.errors import ConfigError
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import OnlineSelection
from toss_lightning.selection.online import to_be_weighed
from toss_lightning.selection.weights import TokenWeights

FLOOR = 1e-3


class ConstrainedSft(OnlineSelection):
    """Weighs token t of a row by ``2 (1 - sigmoid(beta_t (log pi - log pi_base)))``: 1 at the start, less as pi rises.

    A high ``beta_t`` holds the first tokens, which decide whether an aligned model refuses, close to the base's. In a
    row of several replies, t counts the tokens of all of them.

    Args:
        beta: ``beta_t`` of later tokens.
        beta_first: ``beta_t`` of the first token, whose loss starts high.
        beta_early: ``beta_t`` of the second to the ``early_tokens``-th token.
        early_tokens: tokens that count as early, the first among them; 0 for ``beta`` everywhere.

    Raises:
        ConfigError: an argument is negative, or not finite.
    """

    columns = ("base",)

    def __init__(
        self, beta: float = 0.1, beta_first: float = 0.5, beta_early: float = 2.0, early_tokens: int = 5
    ) -> None:
        for name, value in (("beta", beta), ("beta_first", beta_first), ("beta_early", beta_early)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"loop.selection.{name}: {value} is not a strength: give 0 or more")
        if early_tokens < 0:
            raise ConfigError(f"loop.selection.early_tokens: {early_tokens} is not a number of tokens: give 0 or more")
        self.beta, self.beta_first, self.beta_early, self.early_tokens = beta, beta_first, beta_early, early_tokens

    def select(self, scores: TokenScores) -> TokenWeights:
        """Hands over the losses of the base.

        Raises:
            StoreError: a loss is not finite.
        """
        return to_be_weighed(scores, ("loss_base",), beta=self.beta, early_tokens=self.early_tokens)

    def weigh(self, losses: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """The weights of the class, ``[N]``, at least 0.001."""
        ordinal = tokens["ordinal"]
        beta = torch.full_like(losses, self.beta)
        beta[ordinal < self.early_tokens] = self.beta_early
        beta[(ordinal == 0) & (ordinal < self.early_tokens)] = self.beta_first
        # losses are -log p, and 1 - sigmoid(x) is sigmoid(-x)
        return (2 * torch.sigmoid(beta * (losses - tokens["loss_base"]))).clamp(min=FLOOR)
