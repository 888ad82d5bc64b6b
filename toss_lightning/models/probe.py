"""What a gradient correction asks of the model in training."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from toss_lightning.gradients import Gradients, RowGradients, RowProducts
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.objective import Batch, gather


class ModelProbe:
    """Gradients and losses under the slot's current weights; every answer is the same on all ranks.

    Nothing here goes through the wrapper that averages gradients over ranks, nor touches the parameters' ``.grad``.

    Args:
        model: the module that trains.
        batches: gives this rank's batches of rows of the reference set, ``index`` being a row's place in it.
        size: rows of that set.
    """

    def __init__(self, model: Any, batches: Callable[[Sequence[int]], list[Batch]], size: int) -> None:
        self.model, self.size = model, size
        self._batches = batches
        self._step: list[Batch] = []

    def begin_step(self, step: list[Batch]) -> None:
        """Names this rank's micro-batches of the coming optimizer step."""
        self._step = step

    def gradient(self, rows: Sequence[int], kind: Literal["loss", "kl"] = "loss") -> tuple[float, Gradients]:
        """Mean token loss, or mean KL(base || slot), of the response tokens of reference rows, and its gradient."""

        def value(batch: Batch) -> Tensor:
            everything = torch.ones_like(batch["row"], dtype=torch.bool)
            if kind == "loss":
                return self.model.losses(batch).sum()
            losses, divergence = self.model.losses_and_divergence(batch, ~everything, everything)
            return losses.sum() + divergence.sum()

        batches = list(self._there(rows))
        count, total = self._sum(torch.tensor([sum(len(batch["row"]) for batch in batches), 0.0])), 0.0
        tokens = float(count[0])
        gradients = self._zeros()
        for batch in batches:
            with torch.enable_grad():
                part = value(batch) / tokens
            total += float(part)
            self._add(gradients, part)
        mean = self._sum(torch.tensor([total]))
        return float(mean[0]), self._reduced(gradients)

    def mean_row_gradient(self, rows: Sequence[int], weights: Tensor) -> Gradients:
        """``sum_r weights_r g_r``, g_r the gradient of reference row r's mean token loss."""
        of_row = dict(zip(rows, weights.tolist(), strict=True))
        gradients = self._zeros()
        for batch in self._there(rows):
            with torch.enable_grad():
                means = self._means(self.model.losses(batch), batch, torch.ones_like(batch["weight"]))
                weight = means.new_tensor([of_row[index] for index in batch["index"].tolist()])
                self._add(gradients, (weight * means).sum())
        return self._reduced(gradients)

    def reference_products(self, direction: Gradients | None) -> RowProducts:
        """Losses, norms and inner products of all rows of the reference set."""
        return self._products(self._there(range(self.size)), direction)

    def task_products(self, direction: Gradients | None) -> RowProducts:
        """The same of the rows of the coming step, with the weights that their tokens have."""
        return self._products(iter(self._step), direction)

    def _products(self, batches: Iterator[Batch], direction: Gradients | None) -> RowProducts:
        found = []
        for batch in batches:
            if not len(batch["index"]):
                continue
            weight = batch["weight"]
            with torch.enable_grad(), RowGradients(self.model.net, SLOT, direction) as measured:
                means = self._means(self.model.losses(batch), batch, weight)
                norms, products = measured.backward(means)
            tokens = torch.bincount(batch["row"][weight != 0], minlength=len(means))
            found.append(torch.stack([batch["index"], tokens, means.detach(), norms, products], 1).double())
        own = torch.cat([torch.zeros((0, 5), dtype=torch.float64, device=self.model.device), *found])
        whole, _ = gather(self.model.trainer.strategy, own)
        whole = whole[torch.argsort(whole[:, 0])]
        rows, tokens, loss, norm, product = whole.unbind(1)
        return RowProducts(rows.long(), tokens.long(), loss.float(), norm.float(), product.float())

    @staticmethod
    def _means(losses: Tensor, batch: Batch, weight: Tensor) -> Tensor:
        """Weighted mean token loss of each row; 0 for a row without any weight. ``[B]``."""
        zeros = losses.new_zeros(len(batch["index"]))
        total = zeros.index_add(0, batch["row"], weight)
        return zeros.index_add(0, batch["row"], weight * losses) / total.masked_fill(total == 0, 1.0)

    def _there(self, rows: Sequence[int]) -> Iterator[Batch]:
        for batch in self._batches(rows):
            if len(batch["index"]):
                yield self.model.trainer.strategy.batch_to_device(batch)

    def _zeros(self) -> Gradients:
        return {name: torch.zeros_like(value) for name, value in self.model.bank.parameters(SLOT)}

    def _add(self, gradients: Gradients, value: Tensor) -> None:
        parameters = [parameter for _, parameter in self.model.bank.parameters(SLOT)]
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        for total, part in zip(gradients.values(), found, strict=True):
            if part is not None:
                total.add_(part)

    def _reduced(self, gradients: Gradients) -> Gradients:
        """The sum over ranks, in one message."""
        flat = self._sum(torch.cat([value.flatten() for value in gradients.values()]))
        parts = flat.split([value.numel() for value in gradients.values()])
        return {name: part.view_as(value) for (name, value), part in zip(gradients.items(), parts, strict=True)}

    def _sum(self, values: Tensor) -> Tensor:
        summed: Tensor = self.model.trainer.strategy.reduce(values.to(self.model.device), reduce_op="sum")
        return summed
