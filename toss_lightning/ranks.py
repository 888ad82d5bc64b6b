"""What one rank does for all of them, and what all of them bring together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from toss_lightning.errors import TossError

Found = TypeVar("Found")
PATIENCE = timedelta(days=365)
NOTICED = 60.0
"""Seconds after which a file that one node has made must be seen by the others."""


def on_first_rank(trainer: Trainer, work: Callable[[], Found]) -> Found:
    """Has the first rank do something for all, which get what it returns once it is done, however long that takes.

    Raises:
        TossError: the work refuses; on every rank, of which none is left waiting for the first.
    """
    found: Found | None = None
    refusal: TossError | None = None
    with patience() as wait:
        if trainer.is_global_zero:
            try:
                found = work()
            except TossError as error:
                refusal = error
        wait()
    found, refusal = trainer.strategy.broadcast((found, refusal))
    if refusal is not None:
        raise refusal
    return found  # type: ignore[return-value]


def share_directory(trainer: Trainer, directory: Path) -> bool:
    """Whether all ranks see the same directory there; asked on all of them."""
    strategy: Any = trainer.strategy
    if trainer.world_size == 1:
        return True
    # a name that none has looked for: a client of a file server remembers for a minute what was not there
    mark = directory / strategy.broadcast(f".{uuid4().hex}.tmp")
    if trainer.is_global_zero:
        mark.touch()
    strategy.barrier("mark in place")
    latest = time.monotonic() + NOTICED
    while not (seen := mark.exists()) and time.monotonic() < latest:
        time.sleep(0.1)
    shared: bool = strategy.reduce_boolean_decision(seen, all=True)
    if trainer.is_global_zero:
        mark.unlink(missing_ok=True)
    return shared


@contextmanager
def patience() -> Iterator[Callable[[], None]]:
    """Gives a barrier for work that ranks do alone; to be entered by all of them before it begins.

    Those that wait in a collective of the strategy are taken for dead after its timeout, half an hour by default. As
    Lightning's own barrier for data that one rank downloads, this one is gloo's, whatever the strategy uses.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield lambda: dist.barrier(group)
    finally:
        dist.destroy_process_group(group)


def widest(device: torch.device) -> torch.dtype:
    """The most exact floating type of a device: GPUs of Apple have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def gather(strategy: Any, values: Tensor) -> tuple[Tensor, int]:
    """Values of all ranks, one below the other, the same on every rank.

    Args:
        strategy: knows the ranks.
        values: Shape ``[n, K]``; n may differ from rank to rank.

    Returns:
        Shape ``[sum of n, K]``, and where this rank's own begin.
    """
    ranks = int(getattr(strategy, "world_size", 1))
    if ranks == 1:
        return values, 0
    counts = strategy.all_gather(torch.tensor([len(values)], device=values.device)).flatten().tolist()
    padded = values.new_zeros((max(counts), values.shape[1]))
    padded[: len(values)] = values
    parts = strategy.all_gather(padded).reshape(ranks, max(counts), values.shape[1])
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole, sum(counts[: strategy.global_rank])
