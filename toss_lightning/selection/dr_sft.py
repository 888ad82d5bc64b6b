"""DR-SFT: soft token weights from the aligned base and a degraded reference (arXiv 2606.30263)."""

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


class DrSft(OnlineSelection):
    """Weighs each token by how much the base prefers it to the degraded reference, and by how far the target has moved.

    With ``pi+`` the base, ``pi-`` the degraded reference and ``pi`` the target, all at the response token::

        s   = clamp(sigmoid(log pi+ - log pi-), 0, 0.5)
        eta = 1 - 4 s                                       in [-1, 1]; 1 where only the degraded reference likes it
        w   = (1 - eta) (1 - sigmoid(0.5 beta (log pi - log pi+ - eta (log pi - log pi-)))),  at least 0.001

    A token that the degraded reference likes no better than the base does weighs about 1.

    Args:
        beta: how much the target's own movement counts; 0 leaves the two references alone to decide.

    Raises:
        ConfigError: ``beta`` is negative or not finite.
    """

    columns = ("base", "degraded")

    def __init__(self, beta: float = 0.001) -> None:
        if not 0 <= beta < math.inf:
            raise ConfigError(f"loop.selection.beta: {beta} is not a strength: give 0 or more")
        self.beta = beta

    def select(self, scores: TokenScores) -> TokenWeights:
        """Hands over the losses of base and degraded reference.

        Raises:
            StoreError: a loss is not finite.
        """
        return to_be_weighed(scores, ("loss_base", "loss_degraded"), beta=self.beta)

    def weigh(self, losses: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """The weights ``w`` ``[N]`` of the class."""
        # losses are -log p
        base, degraded = tokens["loss_base"], tokens["loss_degraded"]
        eta = 1 - 4 * torch.sigmoid(degraded - base).clamp(max=0.5)
        moved = base - losses - eta * (degraded - losses)
        return ((1 - eta) * torch.sigmoid(-0.5 * self.beta * moved)).clamp(min=FLOOR)
