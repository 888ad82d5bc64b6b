"""One process at a time works in a directory."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.errors import StoreError
from toss_lightning.files import HELD, cannot_write


@contextmanager
def locked(directory: Path, busy: str) -> Iterator[None]:
    """Keeps other processes out of a directory inside the block; the lock dies with this process, however that ends.

    It is one of a process, which those that it forks do not hold on to: workers may outlive it by seconds. Where a
    machine dies, a file server may need a while to notice.

    Args:
        directory: what is to be worked in.
        busy: what a person is to do where another process works there.

    Raises:
        StoreError: another process works there, or the disk refuses.
    """
    try:
        handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(cannot_write(directory, error)) from error
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                holder = os.read(handle, 200).decode(errors="replace")
                raise StoreError(f"{directory}: another process is at work there ({holder}): {busy}") from error
            rank_zero_warn(
                f"{directory}: this file system has no locks ({error.strerror}): nothing keeps a second process from"
                " working there at the same time"
            )
        with suppress(OSError):  # a full disk keeps who it is from being said, and no lock from being held
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        os.close(handle)
