"""What one rank does for all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer

from toss_lightning.errors import TossError

Found = TypeVar("Found")
PATIENCE = timedelta(days=365)


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


@contextmanager
def patience() -> Iterator[Callable[[], None]]:
    """Gives a barrier for work that ranks do alone; to be entered by all of them before it begins.

    Those that wait in a collective of the strategy are taken for dead after its timeout, half an hour by default.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield lambda: dist.barrier(group)
    finally:
        dist.destroy_process_group(group)
