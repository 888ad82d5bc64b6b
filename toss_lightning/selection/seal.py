"""SEAL: learn in a bilevel training which rows a model that stays safe would rather not fit (arXiv 2410.07471)."""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection
from toss_lightning.selection.checks import check_discard, check_one_of
from toss_lightning.selection.rows import keep_rows
from toss_lightning.selection.weights import TokenWeights

Safe = Literal["safety", "utility"]


class SelectorTraining:
    """A logit for each of R rows, trained beside the model.

    With factors ``p = R * softmax(s)`` and mean token losses l of the B rows of an optimizer step, the model minimises
    ``gamma * L_safe + (1 - gamma) * mean_i(p_i l_i)`` with p held fixed, and the selector ``mean_i(p_i l_i)`` with l
    held fixed. The softmax is over all rows, not over those of the step: also of one row at a time it learns something.

    Every rank holds all of it, and makes the same step from the same losses, on the CPU in float64.

    Args:
        rows: R.
        lr: learning rate of Adam, without warm-up or decay.
        init: every logit at first.
        gamma: weight of the safe loss in epoch 0.
        gamma_decay: what it loses with each further epoch.
        betas: decay of Adam's running means.

    Attributes:
        logits: Shape ``[R]`` float64.
    """

    def __init__(
        self,
        rows: int,
        lr: float = 5e-3,
        init: float = 0.1,
        gamma: float = 1.0,
        gamma_decay: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.lr, self._gamma, self._gamma_decay, self.betas = lr, gamma, gamma_decay, betas
        self.logits = torch.full((rows,), init, dtype=torch.float64)
        self._mean, self._square = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self._steps = 0

    def gamma(self, epoch: int) -> float:
        """Weight of the safe loss in an epoch, from 0 on; never below 0."""
        return max(0.0, self._gamma - self._gamma_decay * epoch)

    def factors(self, index: Tensor) -> Tensor:
        """What the loss of each row is multiplied by; their mean over all R rows is 1.

        Args:
            index: Shape ``[B]`` int64: places of the rows among the R.

        Returns:
            Shape ``[B]`` float32, on the device of ``index``.
        """
        factors = len(self.logits) * self.logits.softmax(0)
        return factors[index.cpu()].to(index.device, torch.float32)

    def gradient(self, index: Tensor, losses: Tensor) -> Tensor:
        """The gradient of ``mean_i(p_i l_i)``: ``p_k (sum_{i=k} l_i - sum_i p_i l_i / R) / B`` for logit k; ``[R]``."""
        index, losses = index.cpu(), losses.detach().cpu().double()
        factors = len(self.logits) * self.logits.softmax(0)
        of_rows = torch.zeros_like(self.logits).index_add_(0, index, losses)
        return factors * (of_rows - (factors[index] * losses).sum() / len(factors)) / len(index)

    def update(self, index: Tensor, losses: Tensor) -> None:
        """Makes one step of Adam on the logits, of all rows of the optimizer step over all ranks at once.

        Args:
            index: Shape ``[B]`` int64: places of the rows among the R; in the same order on every rank.
            losses: Shape ``[B]``: their mean token losses.
        """
        if not len(index):
            return
        gradient, (decay, square_decay) = self.gradient(index, losses), self.betas
        self._steps += 1
        self._mean.lerp_(gradient, 1 - decay)
        self._square.lerp_(gradient.square(), 1 - square_decay)
        mean, square = self._mean / (1 - decay**self._steps), self._square / (1 - square_decay**self._steps)
        self.logits = self.logits - self.lr * mean / (square.sqrt() + 1e-8)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs."""
        tensors = {"logits": self.logits, "mean": self._mean, "square": self._square}
        return {name: value.clone() for name, value in tensors.items()} | {"steps": torch.tensor(self._steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes the state back.

        Raises:
            StoreError: it is of another number of rows.
        """
        if state["logits"].shape != self.logits.shape:
            theirs, ours = len(state["logits"]), len(self.logits)
            raise StoreError(f"data.custom: the selector was trained on {theirs} rows, not on {ours}: start a new run")
        self.logits, self._mean = state["logits"].clone(), state["mean"].clone()
        self._square, self._steps = state["square"].clone(), int(state["steps"])


class Seal(Selection):
    """Keeps the rows of the highest logits that the stage ``seal`` learned; ties go to the earliest.

    Args:
        discard: share of the rows that get weight 0, in [0, 1); the published scripts keep 0.8.
        safe: the set of the safe loss: safety or utility.
        epochs: passes over the custom set in the stage ``seal``.
        lr: learning rate of the selector.
        init: its logits at first.
        gamma: weight of the safe loss in the first epoch; 1 trains the model on safe rows alone.
        gamma_decay: what that weight loses with each further epoch.

    Raises:
        ConfigError: ``discard`` is outside [0, 1), ``gamma`` outside [0, 1], or another number is too low or none.
    """

    columns = ()

    def __init__(
        self,
        discard: float = 0.2,
        safe: Safe = "safety",
        epochs: int = 3,
        lr: float = 5e-3,
        init: float = 0.1,
        gamma: float = 1.0,
        gamma_decay: float = 0.03,
    ) -> None:
        check_discard(discard)
        check_one_of("safe", safe, get_args(Safe))
        if epochs < 1:
            raise ConfigError(f"loop.selection.epochs: {epochs} would train no selector: give 1 or more")
        if not 0 < lr < math.inf:
            raise ConfigError(f"loop.selection.lr: {lr} would train no selector: give a number above 0")
        if not math.isfinite(init):
            raise ConfigError(f"loop.selection.init: {init} is no logit: give a finite number")
        for name, value in (("gamma", gamma), ("gamma_decay", gamma_decay)):
            if not 0 <= value <= 1:
                raise ConfigError(f"loop.selection.{name}: {value} is not a share: give a number in [0, 1]")
        self.discard, self.safe, self.epochs, self.lr = discard, safe, epochs, lr
        self.init, self.gamma, self.gamma_decay = init, gamma, gamma_decay
        self.features = {"selector": ("custom",)}

    def training(self, rows: int) -> SelectorTraining:
        """What the stage ``seal`` trains, for a custom set of so many rows."""
        return SelectorTraining(rows, self.lr, self.init, self.gamma, self.gamma_decay)

    def select(self, scores: TokenScores) -> TokenWeights:
        """Keeps the rows of the highest logits.

        Raises:
            StoreError: the selector was never trained.
        """
        logits = scores.feature("selector").astype(np.float64)
        if len(logits) > 1 and (logits == logits[0]).all():
            raise StoreError(
                f"{scores.path}: the selector prefers no row: put seal before score in loop.plan, and score again"
            )
        kept = exact_top(logits, len(logits) - share_of(self.discard, len(logits)))
        facts: dict[str, Any] = {"threshold": float(logits[kept].min()), "logits": _spread(logits)}
        return keep_rows(scores, kept, discard=self.discard, **facts)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"lowest": float(values.min()), "mean": float(values.mean()), "highest": float(values.max())}
