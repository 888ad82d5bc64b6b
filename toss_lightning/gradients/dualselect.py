"""DualSelect: rows that agree with safety, and a pull towards the references that the task works against most
(arXiv 2606.09866).
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from toss_lightning.gradients.base import (
    Angle,
    Correction,
    Gradients,
    Probe,
    RowProducts,
    check_argument,
    norm,
)


class DualSelect(Correction):
    """Selects safety references and task rows by each other's gradients, and adds a reference gradient to every step.

    The first ``warmup`` updates train on the task alone; G, the direction of the task, is the sum of their gradients.
    At the first step after that, and at the first of every later epoch, each row r of ``data.safety`` is scored with
    ``mu l_r - nu cos(g_r, G)``: high where the model does badly and the task makes it worse. The gradients of the
    highest make g_ref, which stays for the epoch. In each step, row i has the score ``mu_task l_i - nu cos(g_i,
    g_ref)``; the lowest are kept, and the update is ``g_task + rho g_ref``. After an epoch, G is the mean of its
    g_task. Losses are mean token losses of a row (arXiv 2606.09866).

    Args:
        warmup: updates on the task alone.
        keep: share, in (0, 1], of the supervised tokens of a step that are trained on. Rows are kept whole, as many as
            come nearest to it, and at least one.
        reference_share: share, in (0, 1], of ``data.safety`` that makes g_ref, rounded up.
        rho: factor of g_ref, at least 0.
        reference_loss_weight: mu, of the loss in the score of a reference.
        task_loss_weight: mu_task, of the loss in the score of a row. Above 0 it favours what the model knows already.
        cosine_weight: nu, of the cosine in both scores.
        reference_weights: what the selected references count in g_ref: the same, or softmax(score / temperature).
        temperature: of that softmax, above 0.

    Raises:
        ConfigError: an argument is out of its range.
    """

    whole_step = True

    def __init__(
        self,
        warmup: int = 10,
        keep: float = 0.9,
        reference_share: float = 0.1,
        rho: float = 0.2,
        reference_loss_weight: float = 1.0,
        task_loss_weight: float = 1.0,
        cosine_weight: float = 1.0,
        reference_weights: Literal["equal", "softmax"] = "equal",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        check_argument(warmup >= 0, "warmup", warmup, "a number of updates, at least 0")
        check_argument(0 < keep <= 1, "keep", keep, "a share in (0, 1]")
        check_argument(0 < reference_share <= 1, "reference_share", reference_share, "a share in (0, 1]")
        check_argument(rho >= 0, "rho", rho, "a number that is at least 0")
        check_argument(temperature > 0, "temperature", temperature, "a number above 0")
        self.warmup, self.keep, self.reference_share, self.rho = warmup, keep, reference_share, rho
        self.reference_loss_weight, self.task_loss_weight = reference_loss_weight, task_loss_weight
        self.cosine_weight, self.reference_weights, self.temperature = cosine_weight, reference_weights, temperature
        self._task: Gradients = {}  # sum of g_task since g_ref was made last; the cosine ignores that it is not a mean
        self._reference: Gradients = {}
        self._epoch: int | None = None

    def forget(self) -> None:
        """Drops sums, directions and the epoch that they were made in."""
        super().forget()
        self._task, self._reference, self._epoch = {}, {}, None

    def begin_step(self, probe: Probe, epoch: int) -> Mapping[int, float] | None:
        """Makes g_ref where an epoch has none yet, and selects the rows of the step."""
        if self._sums["steps"] < self.warmup:
            return None
        if self._epoch != epoch:
            self._reference = self._make_reference(probe)
            self._task, self._epoch = {}, epoch
        return None if self.keep == 1 else self._select_rows(probe)

    def _make_reference(self, probe: Probe) -> Gradients:
        direction = self._task or None
        products = probe.reference_products(direction)
        cosine = cosines(products, norm(direction) if direction else 0.0)
        score = self.reference_loss_weight * products.loss.cpu().double() - self.cosine_weight * cosine
        count = math.ceil(Fraction(str(self.reference_share)) * len(score))
        # stable: ties go to the earliest row
        chosen = torch.argsort(score, descending=True, stable=True)[:count].sort().values
        if self.reference_weights == "softmax":
            weights = torch.softmax(score[chosen] / self.temperature, 0)
        else:
            weights = torch.full((count,), 1 / count)
        loss = float(products.loss.cpu()[chosen].double().mean())
        self.record(selections=1, reference_loss=loss, reference_cosine=float(cosine[chosen].mean()), chosen=count)
        return probe.mean_row_gradient(products.rows.cpu()[chosen].tolist(), weights.float())

    def _select_rows(self, probe: Probe) -> dict[int, float]:
        products = probe.task_products(self._reference)
        score = self.task_loss_weight * products.loss.cpu().double()
        score = score - self.cosine_weight * cosines(products, norm(self._reference))
        kept = keep_lowest(score, products.tokens.cpu(), self.keep)
        supervised = products.tokens.cpu() > 0
        self.record(
            tokens=float(products.tokens.sum()),
            kept_tokens=float(products.tokens.cpu()[kept].sum()),
            rows=float(supervised.sum()),
            rows_left_out=float((supervised & ~kept).sum()),
        )
        return dict(zip(products.rows.tolist(), kept.double().tolist(), strict=True))

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Adds ``rho g_ref`` in place, and remembers the direction of the task."""
        warm = self._sums["steps"] >= self.warmup
        self.record(steps=1)
        for name, value in gradients.items():
            self._task[name] = value.clone() if name not in self._task else self._task[name].to(value.device) + value
        if not warm:
            return
        # a checkpoint may have brought it to another device
        self._reference = {name: self._reference[name].to(value.device) for name, value in gradients.items()}
        angle = Angle.between(gradients, self._reference)
        self.record(compared=1, cosine=angle.cosine, conflicts=angle.conflict)
        if self.rho and angle.other:
            self.record(corrected=1, added=self.rho * angle.other / angle.norm if angle.norm else 0.0)
            for name, value in gradients.items():
                value.add_(self._reference[name], alpha=self.rho)

    def report(self) -> dict[str, Any]:
        """Adds the norm of what was added as a share of that of the gradient, the share of tokens kept and of rows left
        out over the steps that were selected in, and the mean over selections of loss and cosine of the references.
        """
        return {
            **super().report(),
            "warmup_steps": int(min(self._sums["steps"], self.warmup)),
            "mean_norm_added": self.mean("added", "corrected"),
            "kept_token_share": self.mean("kept_tokens", "tokens") if self._sums["tokens"] else 1.0,
            "rows_left_out_share": self.mean("rows_left_out", "rows"),
            "reference_selections": int(self._sums["selections"]),
            "references_per_selection": self.mean("chosen", "selections"),
            "mean_reference_loss": self.mean("reference_loss", "selections"),
            "mean_reference_cosine": self.mean("reference_cosine", "selections"),
        }

    def state(self) -> dict[str, Any]:
        """Adds both directions and the epoch of g_ref."""
        return {**super().state(), "task": dict(self._task), "reference": dict(self._reference), "epoch": self._epoch}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state` back."""
        super().load_state(state)
        self._task, self._reference, self._epoch = dict(state["task"]), dict(state["reference"]), state["epoch"]


def cosines(products: RowProducts, direction: float) -> Tensor:
    """Cosine of each row's gradient with a direction of that norm, 0 where either is 0; ``[R]`` float64."""
    lengths = products.norm.cpu().double() * direction
    return torch.where(lengths > 0, products.product.cpu().double() / lengths.clamp(min=1e-300), 0.0)


def keep_lowest(score: Tensor, tokens: Tensor, share: float) -> Tensor:
    """Marks the rows of the lowest scores whose tokens together come nearest to a share of all tokens.

    Nearest, because a floor would leave nothing of a step of one row, and a ceiling would leave nothing out of a step
    of a few; of two equally near numbers of rows it is the larger one. Ties in score go to the earliest row. Rows
    without a token are marked and count for nothing.

    Args:
        score: Shape ``[R]``.
        tokens: Shape ``[R]``: supervised tokens of each row.
        share: in (0, 1].

    Returns:
        Shape ``[R]`` bool.
    """
    kept = tokens == 0
    order = [row for row in torch.argsort(score, stable=True).tolist() if not kept[row]]
    if order:
        reached = tokens[order].cumsum(0).tolist()
        wanted = Fraction(str(share)) * int(reached[-1])
        nearest = min(range(len(order)), key=lambda last: (abs(int(reached[last]) - wanted), -last))
        kept[order[: nearest + 1]] = True
    return kept
