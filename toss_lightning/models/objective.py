"""What an optimizer step minimises: weighted token losses, and anchors to the base.

Letters in shapes: B rows of a micro-batch, N response tokens of them, K values of a token.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from toss_lightning.errors import ConfigError
from toss_lightning.models.spread import Spread
from toss_lightning.ranks import gather, widest

Batch = dict[str, Any]
Normalize = Literal["all", "kept", "row"]


class OnlineWeights(Protocol):
    """What :class:`toss_lightning.selection.OnlineSelection` offers here."""

    @property
    def whole_step(self) -> bool:
        """It weighs all tokens of a step at once."""

    def weigh(self, losses: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Current losses ``[N]`` and values of the same tokens -> weights ``[N]``."""


def check_normalize(normalize: Normalize, online: OnlineWeights) -> None:
    """Refuses a normaliser of a step that would not be known before it.

    Raises:
        ConfigError: it is such.
    """
    if not online.whole_step and normalize != "all":
        raise ConfigError(
            f"model.normalize: {normalize} divides by weights, which {type(online).__name__} makes only while a step is"
            " trained on: set it to all"
        )


class Objective:
    """``sum_ij w_ij l_ij / Z + sum_ij a_ij KL_ij / T`` over the response tokens of an optimizer step.

    w is the weight that the selection gave, times what an online selection and a correction make of it in each step; Z
    is the normaliser; a the weight of the anchor and T the step's response tokens.

    Args:
        normalize: Z: ``all`` response tokens, the sum of weights of the ``kept``, or each ``row``'s own sum of weights
            times the number of rows with any.
        online: weighs tokens by the target's current losses.

    Raises:
        ConfigError: Z would not be known before the step.
    """

    def __init__(self, normalize: Normalize = "all", online: OnlineWeights | None = None) -> None:
        if online is not None:
            check_normalize(normalize, online)
        self.normalize, self.online = normalize, online
        self.step_batches: list[Batch] = []
        self.spread = Spread()
        self._seen = Spread()
        self._at = 0
        self._totals: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """The sums over the online weights so far, as plain values."""
        return asdict(self.spread)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state` back."""
        self.spread = Spread(**state)

    @property
    def whole_step(self) -> bool:
        """The first micro-batch of a step must bring all of them."""
        return self.online is not None and self.online.whole_step

    @property
    def degenerate(self) -> str | None:
        """Why this was plain fine-tuning, or nearly, if it was, as far as what is weighed in training goes."""
        if self.online is None or self.spread.narrow is None:
            return None
        return f"{type(self.online).__name__} gave every token {self.spread.narrow}, over all steps"

    # --- the whole step -----------------------------------------------------------------------------------------------

    def begin_step(self, model: Any, batches: list[Batch]) -> None:
        """Weighs the tokens of a step, where that is done for all of them at once.

        Args:
            model: the module that trains.
            batches: the step's micro-batches on this rank, or the first one where no method asked for all.
        """
        self.step_batches, self._at, self._totals = [dict(batch) for batch in batches], 0, {}
        if self.online is not None and self.whole_step:
            self._weigh_step(model, self.online)
            self._count(model.trainer.strategy)

    def scale_rows(self, model: Any, factors: Mapping[int, float] | None) -> None:
        """Multiplies the weights of rows, by their place in the stage."""
        if factors is None:
            return
        for batch in self.step_batches:
            found = [factors.get(index, 1.0) for index in batch["index"].tolist()]
            batch["weight"] = batch["weight"] * batch["weight"].new_tensor(found)[batch["row"]]
        self._count(model.trainer.strategy)

    def _weigh_step(self, model: Any, online: OnlineWeights) -> None:
        """Weighs the tokens of all ranks together, in the order of rows and positions, and takes this rank's."""
        names = sorted(name for name, value in self.step_batches[0].items() if _per_token(name, value))
        with torch.no_grad(), model.bank.without_dropout():
            losses = [model.losses(batch) for batch in self.step_batches]
        own = torch.cat([_whole_rows(batch) for batch in self.step_batches])
        values = torch.cat(
            [
                torch.stack([loss, *(batch[name] for name in names)], 1)
                for loss, batch in zip(losses, self.step_batches, strict=True)
            ]
        )
        exact = widest(values.device)
        whole, begins = gather(model.trainer.strategy, torch.cat([own.to(exact), values.to(exact)], 1))
        index, ordinal, selected = whole[:, :3].long().unbind(1)
        order = torch.argsort(index * (1 + int(ordinal.max())) + ordinal)
        order = order[selected[order] > 0]
        tokens = {name: whole[order, 4 + at].float() for at, name in enumerate(names)}
        factors = whole.new_ones(len(whole), dtype=torch.float32)
        factors[order] = online.weigh(whole[order, 3].float(), {**tokens, "ordinal": ordinal[order]})
        self.spread.add(factors[order])
        parts = factors[begins : begins + len(own)].split([len(batch["row"]) for batch in self.step_batches])
        for batch, part in zip(self.step_batches, parts, strict=True):
            batch["weight"] = batch["weight"] * part

    def _count(self, strategy: Strategy) -> None:
        """Takes the totals of the step again, from the weights that it now has on all ranks."""
        weight, rows = 0.0, 0.0
        for batch in self.step_batches:
            own = batch["weight"] * ~batch["companion"][batch["row"]]
            per_row = own.new_zeros(len(batch["row_id"])).index_add_(0, batch["row"], own)
            weight, rows = weight + float(own.sum(dtype=widest(own.device))), rows + float((per_row > 0).sum())
        both = torch.tensor([weight, rows], dtype=torch.float32, device=self.step_batches[0]["row"].device)
        whole = torch.as_tensor(strategy.reduce(both, reduce_op="sum")).tolist()
        self._totals = {"step_weight": whole[0], "step_rows": whole[1]}

    def kept_weight(self, batch: Batch) -> float:
        """Sum of the weights of the step that ``batch`` belongs to, as far as it is known before the step."""
        return float((batch | self._totals)["step_weight"])

    # --- a micro-batch ------------------------------------------------------------------------------------------------

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """This micro-batch's part of the step's loss; scalar, with a gradient.

        Args:
            model: the module that trains.
            batch: the micro-batch that comes next.
        """
        if len(self.step_batches) > self._at:
            batch = {**batch, "weight": self.step_batches[self._at]["weight"]}
        self._at += 1
        batch = batch | self._totals
        anchor = batch.get("anchor", torch.zeros_like(batch["weight"]))
        kept = batch["weight"] != 0
        losses, divergence = model.losses_and_divergence(batch, kept, anchor != 0, model.anchor_top)
        if not len(losses) and not len(divergence):
            return losses.sum()
        model.check_finite(losses, batch["index"][batch["row"][kept]])
        weight = batch["weight"][kept]
        if self.online is not None and not self.online.whole_step:
            weight = weight * self._weigh(self.online, losses.detach(), batch, kept)
        loss = (weight * losses / self._normalizer(batch, kept)).sum()
        if len(divergence):
            model.check_finite(divergence, batch["index"][batch["row"][anchor != 0]])
            loss = loss + (anchor[anchor != 0] * divergence).sum() / float(batch["step_tokens"])
        return loss

    def _weigh(self, online: OnlineWeights, losses: Tensor, batch: Batch, kept: Tensor) -> Tensor:
        """Weights of the kept tokens; those of rows that the selection does not speak of stay."""
        selected = batch["selected"][batch["row"][kept]]
        tokens = {
            name: value[kept][selected] for name, value in batch.items() if _per_token(name, value) or name == "ordinal"
        }
        weights = torch.ones_like(losses)
        weights[selected] = online.weigh(losses[selected], tokens)
        self._seen.add(weights[selected])
        return weights

    def _normalizer(self, batch: Batch, kept: Tensor) -> Tensor | float:
        if self.normalize == "all":
            return float(batch["step_tokens"])
        if self.normalize == "kept":
            return float(batch["step_weight"])
        row, weight = batch["row"][kept], batch["weight"][kept]
        per_row = weight.new_zeros(len(batch["row_id"])).index_add_(0, row, weight)
        return per_row[row] * batch["step_rows"]

    def end_step(self, model: Any) -> None:
        """Called when the gradient of the step is there."""
        self.step_batches = []
        if self.online is not None and not self.online.whole_step:
            # what this rank's tokens say alone is not what a checkpoint, or a warning, is to say of all
            sums = torch.tensor([*asdict(self._seen).values()], dtype=widest(model.device), device=model.device)
            self.spread.take(*torch.as_tensor(model.trainer.strategy.reduce(sums, reduce_op="sum")).tolist())
            self._seen = Spread()


def _per_token(name: str, value: Any) -> bool:
    """The entry of a batch is a float for each response token."""
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() == 1


def _whole_rows(batch: Batch) -> Tensor:
    """Of each response token: its row's place in the stage, its place in the row, and whether it is selected from."""
    row = batch["row"]
    return torch.stack([batch["index"][row], batch["ordinal"], batch["selected"][row].long()], 1)
