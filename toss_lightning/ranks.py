"""What one rank does for all of them."""

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch import Trainer

from toss_lightning.errors import TossError

Found = TypeVar("Found")


def on_first_rank(trainer: Trainer, work: Callable[[], Found]) -> Found:
    """Has the first rank do something for all, which get what it returns once it is done.

    Raises:
        TossError: the work refuses; on every rank, of which none is left waiting for the first.
    """
    found: Found | None = None
    refusal: TossError | None = None
    if trainer.is_global_zero:
        try:
            found = work()
        except TossError as error:
            refusal = error
    found, refusal = trainer.strategy.broadcast((found, refusal))
    if refusal is not None:
        raise refusal
    return found  # type: ignore[return-value]
