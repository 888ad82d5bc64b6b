"""What a gradient correction asks of the model in training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from toss_lightning.data.rowset import name_rows
from toss_lightning.errors import TrainingError
from toss_lightning.gradients import Gradients, Kind, RowGradients, RowProducts
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.objective import Batch
from toss_lightning.models.rounding import rounded_otherwise
from toss_lightning.ranks import gather, widest

REFERENCE = "safety"
"""The set that corrections look at."""


def check_probed(model: Any, size: int) -> None:
    """Refuses, before anything is trained, a correction whose questions the model cannot answer.

    Args:
        model: the module that is to train, with its correction.
        size: rows of the reference set.

    Raises:
        ConfigError: the correction does not fit rank or reference set, or asks about single rows of layers that are
            not linear.
    """
    model.correction.check(size, model.lora.r)
    if model.correction.whole_step:
        RowGradients(model.bank.net, SLOT)


class ModelProbe:
    """Gradients and losses under the slot's current weights; every answer is the same on all ranks, and finite.

    Nothing here goes through the wrapper that averages gradients over ranks, nor touches the parameters' ``.grad``. The
    adapter's dropout is off: what is asked about is the network, not one thinning of it.

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

    def gradient(self, rows: Sequence[int], kind: Kind = "loss") -> tuple[float, Gradients]:
        """Mean token loss, or mean divergence, of the response tokens of reference rows, and its gradient.

        Args:
            rows: positions in the reference set.
            kind: see :class:`toss_lightning.gradients.Probe`.

        Raises:
            TrainingError: it is not finite.
        """
        batches = list(self._there(rows))
        tokens = self._sum(torch.tensor([float(sum(len(batch["row"]) for batch in batches))])).item()

        def mean(batch: Batch) -> tuple[Tensor, Tensor]:
            if kind == "loss":
                values = self.model.losses(batch)
            else:
                everything = torch.ones_like(batch["row"], dtype=torch.bool)
                values = self.model.losses_and_divergence(batch, ~everything, everything)[1]
            return values, values.sum() / tokens

        with rounded_otherwise(self.model.net) if kind == "rounding" else nullcontext():
            return self._collected(batches, mean)

    def mean_row_gradient(self, rows: Sequence[int], weights: Tensor) -> Gradients:
        """``sum_r weights_r g_r``, g_r the gradient of reference row r's mean token loss.

        Raises:
            TrainingError: it is not finite.
        """
        of_row = dict(zip(rows, weights.tolist(), strict=True))

        def weighted(batch: Batch) -> tuple[Tensor, Tensor]:
            losses = self.model.losses(batch)
            means = self._means(losses, batch, torch.ones_like(batch["weight"]))
            weight = means.new_tensor([of_row[index] for index in batch["index"].tolist()])
            return losses, (weight * means).sum()

        return self._collected(self._there(rows), weighted)[1]

    def _collected(
        self, batches: Iterable[Batch], value: Callable[[Batch], tuple[Tensor, Tensor]]
    ) -> tuple[float, Gradients]:
        """Sums a number and its gradient over batches and ranks, in one message.

        Args:
            batches: this rank's.
            value: batch -> values of its response tokens ``[N]``, and its part of the number.

        Raises:
            TrainingError: the sum is not finite; it is the same on all ranks, so all of them raise.
        """
        named = self.model.bank.parameters(SLOT)
        parameters = [parameter for _, parameter in named]
        sums, total, wrong = [torch.zeros_like(parameter) for parameter in parameters], 0.0, []
        with torch.enable_grad(), self.model.bank.without_dropout():
            for batch in batches:
                values, part = value(batch)
                for whole, found in zip(sums, torch.autograd.grad(part, parameters, allow_unused=True), strict=True):
                    if found is not None:
                        whole.add_(found)
                total += part.item()
                wrong.append(batch["row_id"][batch["row"][~values.detach().isfinite()]])
        flat = self._sum(torch.cat([sums[0].new_tensor([total]), *(whole.flatten() for whole in sums)]))
        if not flat.isfinite().all():
            own = torch.cat([torch.zeros(0, dtype=torch.int64, device=self.model.device), *wrong])
            row_ids = gather(self.model.trainer.strategy, own.unsqueeze(1))[0].unique().tolist()
            # the sum alone may overflow
            raise self._not_finite(name_rows(row_ids, REFERENCE) if row_ids else f"data.{REFERENCE}")
        parts = flat[1:].split([parameter.numel() for parameter in parameters])
        return flat[0].item(), {name: part.view_as(value) for (name, value), part in zip(named, parts, strict=True)}

    def reference_products(self, direction: Gradients | None) -> RowProducts:
        """Losses, norms and inner products of all rows of the reference set.

        Raises:
            TrainingError: one of a row is not finite.
        """
        return self._products(
            self._there(range(self.size)), direction, lambda wrong: name_rows(wrong[:, 0].tolist(), REFERENCE)
        )

    def task_products(self, direction: Gradients | None) -> RowProducts:
        """The same of the rows of the coming step, with the weights that their tokens have.

        Raises:
            TrainingError: one of a row is not finite.
        """
        datamodule: Any = self.model.trainer.datamodule
        return self._products(self._step, direction, lambda wrong: datamodule.named(wrong[:, 1].tolist()))

    def _products(
        self, batches: Iterable[Batch], direction: Gradients | None, named: Callable[[Tensor], str]
    ) -> RowProducts:
        found, exact = [], widest(self.model.device)
        for batch in batches:
            if not len(batch["index"]):
                continue
            weight, steady = batch["weight"], self.model.bank.without_dropout()
            with torch.enable_grad(), steady, RowGradients(self.model.net, SLOT, direction) as measured:
                means = self._means(self.model.losses(batch), batch, weight)
                norms, products = measured.backward(means)
            tokens = torch.bincount(batch["row"][weight != 0], minlength=len(means))
            of_rows = [batch["row_id"], batch["index"], tokens, means.detach(), norms, products]
            found.append(torch.stack(of_rows, 1).to(exact))
        own = torch.cat([torch.zeros((0, 6), dtype=exact, device=self.model.device), *found])
        whole, _ = gather(self.model.trainer.strategy, own)
        if not (finite := whole.isfinite().all(1)).all():
            raise self._not_finite(named(whole[~finite, :2].long()))
        whole = whole[torch.argsort(whole[:, 1])]
        _, rows, tokens, loss, norm, product = whole.unbind(1)
        return RowProducts(rows.long(), tokens.long(), loss.float(), norm.float(), product.float())

    def _not_finite(self, which: str) -> TrainingError:
        return TrainingError(
            f"stage {self.model.stage_name}, step {self.model.trainer.global_step}: a loss or gradient that"
            f" model.correction asks for is not finite on {which}: look there, or lower model.optim.lr"
        )

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

    def _sum(self, values: Tensor) -> Tensor:
        summed: Tensor = self.model.trainer.strategy.reduce(values.to(self.model.device), reduce_op="sum")
        return summed
