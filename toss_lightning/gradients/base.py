"""What every correction of the task gradient is, and what it may ask of the model in training."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from toss_lightning.errors import ConfigError

Kind = Literal["loss", "kl", "rounding"]
Gradients = dict[str, Tensor]
"""Parameter name -> gradient of a whole optimizer step, accumulation and ranks included; float32, the same on all
ranks."""


@dataclass(frozen=True)
class RowProducts:
    """What single rows say about a direction; an entry for each of R rows, in the order they were asked about.

    Attributes:
        rows: Shape ``[R]`` int64: position in the reference set, or the row's index in the stage.
        tokens: Shape ``[R]``: response tokens that count, those of a weight other than 0.
        loss: Shape ``[R]`` float32: weighted mean token loss of the row.
        norm: Shape ``[R]``: norm of the gradient of that loss.
        product: Shape ``[R]``: inner product of that gradient with the direction; 0 where none is given.
    """

    rows: Tensor
    tokens: Tensor
    loss: Tensor
    norm: Tensor
    product: Tensor


class Probe(Protocol):
    """What a correction may ask of the model in training. The answers are the same on all ranks.

    The reference set is ``data.safety``; its rows are addressed by their position in it, from 0.
    """

    @property
    def size(self) -> int:
        """Rows of the reference set."""

    def gradient(self, rows: Sequence[int], kind: Kind = "loss") -> tuple[float, Gradients]:
        """Mean over the response tokens of these reference rows, and its gradient.

        Args:
            rows: positions in the reference set.
            kind: ``loss``: the token loss. ``kl``: KL(base || target) of the next-token distributions at temperature 1.
                ``rounding``: that KL with the target's layers rounded otherwise. Asked where the target still is the
                base, before the first step, it is what rounding alone makes of a KL of 0, and of its gradient.
        """

    def mean_row_gradient(self, rows: Sequence[int], weights: Tensor) -> Gradients:
        """``sum_r weights_r * g_r``, g_r the gradient of reference row r's mean token loss; ``weights`` ``[R]``."""

    def reference_products(self, direction: Gradients | None) -> RowProducts:
        """Over all rows of the reference set, streamed."""

    def task_products(self, direction: Gradients | None) -> RowProducts:
        """Over the rows of the coming optimizer step, of all ranks."""


class Correction(ABC):
    """Changes the gradient of every optimizer step before it is clipped.

    Public attributes of a correction are its settings, which identify a run; what it learns on the way is private.
    """

    whole_step: bool = False
    """:meth:`begin_step` asks about the rows of the coming step, which then costs a forward and backward pass more."""
    divergence: bool = False
    """It asks for the KL to the base, of which rounding leaves little where the base computes in less than float32."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._restored = False

    def check(self, size: int, rank: int) -> None:
        """Refuses arguments that do not fit the run, before anything is trained.

        Args:
            size: rows of the reference set.
            rank: LoRA rank of the adapters.

        Raises:
            ConfigError: the reference set has too few rows, or the rank does not do.
        """
        check_reference(size, 1)

    def begin_stage(self, probe: Probe, rank: int) -> None:
        """Forgets what an earlier stage left, unless :meth:`load_state` came before.

        Args:
            probe: the model about to be trained.
            rank: LoRA rank of its adapter.
        """
        if not self._restored:
            self.forget()
        self._restored = False

    def forget(self) -> None:
        """Drops everything that a stage has left."""
        self._sums.clear()

    def begin_step(self, probe: Probe, epoch: int) -> Mapping[int, float] | None:
        """Called before the rows of an optimizer step are trained on.

        Returns:
            Row's index in the stage -> factor on its token weights, 1 for a row that is not named; None: all 1.
        """
        return None

    @abstractmethod
    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Changes the gradient in place; one that needs no correction keeps its bits."""

    def record(self, **amounts: float) -> None:
        """Adds to the sums that :meth:`report` tells of.

        Known to all: ``steps``, ``compared`` (steps in which there was a gradient to compare the task gradient with),
        ``conflicts`` (those in which the inner product of the two is negative), ``cosine`` of the two, ``corrected``.
        """
        for name, amount in amounts.items():
            self._sums[name] += amount

    def mean(self, name: str, over: str) -> float:
        """One recorded sum divided by another; 0 where nothing was recorded."""
        return self._sums[name] / self._sums[over] if self._sums[over] else 0.0

    def report(self) -> dict[str, Any]:
        """Counts over the stage so far, for people."""
        return {
            "steps": int(self._sums["steps"]),
            "compared": int(self._sums["compared"]),
            "conflicts": int(self._sums["conflicts"]),
            "conflict_share": self.mean("conflicts", "compared"),
            "corrected": int(self._sums["corrected"]),
            "corrected_share": self.mean("corrected", "steps"),
            "mean_cosine": self.mean("cosine", "compared"),
        }

    def state(self) -> dict[str, Any]:
        """Plain values and tensors that :meth:`load_state` goes on from exactly."""
        return {"sums": dict(self._sums)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state` back; the stage that begins next is the one that it came from."""
        self._sums = defaultdict(float, state["sums"])
        self._restored = True


@dataclass(frozen=True)
class Angle:
    """How a task gradient lies to another gradient, over all parameters together."""

    product: float
    norm: float
    """Of the task gradient."""
    other: float
    """Norm of the other one."""

    @property
    def cosine(self) -> float:
        """In [-1, 1]; 0 where a gradient is 0."""
        return self.product / (self.norm * self.other) if self.norm and self.other else 0.0

    @property
    def conflict(self) -> bool:
        """A step down one gradient goes up the loss of the other, to first order."""
        return self.product < 0

    @classmethod
    def between(cls, gradients: Gradients, other: Gradients) -> "Angle":
        """Measures it."""
        return cls(inner(gradients, other), norm(gradients), norm(other))


def inner(first: Gradients, second: Gradients) -> float:
    """Inner product over all parameters, summed in float64."""
    return float(torch.stack([(exact(value) * exact(second[name])).sum() for name, value in first.items()]).sum())


def norm(gradients: Gradients) -> float:
    """Norm over all parameters, summed in float64."""
    return float(inner(gradients, gradients) ** 0.5)


def exact(value: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def check_reference(size: int, needed: int, key: str = "") -> None:
    """Refuses a reference set that is too small.

    Args:
        size: rows that it has.
        needed: rows that the correction asks for.
        key: the argument that says so, if one does.

    Raises:
        ConfigError: it has fewer rows.
    """
    if size < needed:
        raise ConfigError(
            f"model.correction{f'.{key}' if key else ''}: {needed} reference rows are needed, but data.safety has"
            f" {size}: give more rows{', or lower it' if key and size else ''}"
        )


def check_argument(valid: bool, key: str, value: object, wanted: str) -> None:
    """Refuses an argument.

    Raises:
        ConfigError: it is not ``valid``.
    """
    if not valid:
        raise ConfigError(f"model.correction.{key}: {value} cannot be used: give {wanted}")
