"""What an optimizer step of the stage ``seal`` minimises: the bilevel loss of SEAL.

Letters in shapes: B rows of a micro-batch.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from toss_lightning.models.objective import Batch
from toss_lightning.ranks import gather, widest


class Selector(Protocol):
    """What :class:`toss_lightning.selection.SelectorTraining` offers here."""

    def factors(self, index: Tensor) -> Tensor:
        """What rows ``[B]`` count in the loss; ``[B]``."""

    def update(self, index: Tensor, losses: Tensor) -> None:
        """One step of the selector on the mean losses ``[B]`` of the step's rows ``[B]``."""

    def gamma(self, epoch: int) -> float:
        """Share of the safe loss in the model's."""


class Bilevel:
    """``gamma L_safe + (1 - gamma) mean_i p_i l_i``, l_i the mean token loss of custom row i: SEAL (arXiv 2410.07471).

    L_safe is the mean token loss of the companions. When a step's gradient is there, the selector behind p takes a step
    on the losses of all its rows.

    Args:
        selector: holds p.
    """

    whole_step = False

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self._seen: list[Tensor] = []

    def state(self) -> dict[str, Any]:
        """Nothing: the selector keeps its own."""
        return {}

    def begin_step(self, model: Any, batches: list[Batch]) -> None:
        """Forgets the rows of the last step."""
        self._seen = []

    def kept_weight(self, batch: Batch) -> float:
        """Sum of the weights of the step that ``batch`` belongs to."""
        return float(batch["step_weight"])

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """This micro-batch's part of the step's loss; scalar, with a gradient."""
        losses = model.losses(batch)
        if not len(losses):
            return losses.sum()
        row = batch["row"]
        model.check_finite(losses, batch["index"][row])
        counts = torch.bincount(row, minlength=len(batch["index"]))
        means = losses.new_zeros(len(counts)).index_add_(0, row, losses) / counts
        own, gamma = ~batch["companion"], self.selector.gamma(model.stage_epoch)
        exact = widest(losses.device)
        self._seen.append(torch.stack([batch["index"][own].to(exact), means[own].detach().to(exact)], 1))
        share = self.selector.factors(batch["index"][own].cpu()).to(means) * means[own]
        safe = losses[~own[row]].sum() / max(1.0, float(batch["companion_tokens"]))
        return gamma * safe + (1 - gamma) * share.sum() / max(1.0, float(batch["step_rows"]))

    def end_step(self, model: Any) -> None:
        """The selector's own step."""
        device = model.device
        seen = torch.cat([torch.zeros((0, 2), dtype=widest(device), device=device), *self._seen])
        whole, _ = gather(model.trainer.strategy, seen)
        whole = whole[torch.argsort(whole[:, 0])].cpu()
        self.selector.update(whole[:, 0].long(), whole[:, 1].float())
