"""One look for all progress bars, and lines to people from the first rank only."""

import sys

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


def progress_bar(
    description: str, total: int, unit: str, enabled: bool = True, done: int = 0, delay: float = 0.0
) -> "tqdm[None]":
    """A bar on a terminal; in a log file a line every half minute.

    Args:
        description: stands before it.
        total: what there is to do.
        unit: of what.
        enabled: false shows nothing, as on all ranks but the first.
        done: what is done already.
        delay: seconds before it is shown; what takes less is not worth a line.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        disable=not enabled,
        dynamic_ncols=terminal,
        delay=delay,
        mininterval=0.2 if terminal else 30.0,
        file=sys.stderr,
    )


@rank_zero_only
def say(line: str) -> None:
    """Prints a line, whatever bar is on the screen."""
    tqdm.write(line, file=sys.stdout)
