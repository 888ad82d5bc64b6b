"""Two processes and one directory."""

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import tiny_fit

from toss_lightning.errors import StoreError
from toss_lightning.locks import locked


@contextmanager
def at_work(directory: Path) -> Iterator[None]:
    """Another process that works in the directory, until it is killed."""
    begun, begin = os.pipe()
    if not (child := os.fork()):
        try:
            with locked(directory, "wait"):
                os.write(begin, b"!")
                signal.pause()
        finally:
            os._exit(1)  # whatever happens, never into a second copy of the tests
    os.close(begin)
    try:
        assert os.read(begun, 1) == b"!"
        yield
    finally:
        os.close(begun)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_process_is_told_so_until_the_first_is_gone(tmp_path: Path) -> None:
    with at_work(tmp_path):
        with (
            pytest.raises(StoreError, match=r"another process is at work there \(\d+ on .+\): wait for it"),
            locked(tmp_path, "wait for it"),
        ):
            pytest.fail("two at once")
        beside = tmp_path / "beside"
        beside.mkdir()
        with locked(beside, "wait"):
            pass
    # it was killed, and has cleaned nothing up
    with locked(tmp_path, "wait"):
        pass


def test_a_run_does_not_begin_where_another_goes_on(tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> None:
    with at_work(tmp_path), pytest.raises(StoreError, match="wait for it, or choose another --run_dir"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target"])
    assert not (tmp_path / "adapters").exists()
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target"])
    assert (tmp_path / "adapters").exists()


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\)"), locked(tmp_path, "wait"):
        pass
