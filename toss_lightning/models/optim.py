"""The optimizer of a stage and its learning rate."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from toss_lightning.errors import check_settings


@dataclass(frozen=True)
class Optim:
    """AdamW."""

    lr: float = 1e-5
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    paged_8bit: bool = False
    """8-bit optimizer state (bitsandbytes, GPU only). That of matrices of 100,000 weights and more moves to host memory
    when the GPU is full; most of an adapter are smaller, and their state takes megabytes."""

    def check(self) -> None:
        """Refuses numbers that AdamW cannot work with, before a base is loaded.

        Raises:
            ConfigError: one is out of range.
        """
        rules = (
            ("lr", 0 <= self.lr < math.inf, "0 or more"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
        )
        check_settings("model.optim", self, rules)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over one stage."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: stay, or fall to 0 by the end of the stage."""
    warmup: float = 0.03
    """Share of the stage's optimizer steps in which the rate rises from 0."""

    def check(self) -> None:
        """Refuses a warm-up that is no share.

        Raises:
            ConfigError: it is outside [0, 1].
        """
        wanted = "a share of a stage's optimizer steps, in [0, 1]"
        check_settings("model.schedule", self, [("warmup", 0 <= self.warmup <= 1, wanted)])

    def factor(self, step: int, steps: int) -> float:
        """What the highest rate is multiplied by at ``step`` (from 0) of ``steps``."""
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
            self.shape
        ]


def make_optimizer(optim: Optim, parameters: Iterable[Parameter]) -> Optimizer:
    """AdamW, in 8 bits where that is asked for."""
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    if optim.paged_8bit:
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, **settings)
    return AdamW(parameters, **settings)
