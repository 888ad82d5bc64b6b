"""Files that are either the old one or the new one, whatever happens while they are written, and missing ones."""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import Any

from toss_lightning.errors import StoreError

RUN_DIR = "choose another --run_dir"
"""What helps where a run's own directory cannot be written."""
CACHE = "choose another loop.evaluation.cache, or where none is set another --run_dir"
"""What helps where replies, and what is said of them, cannot be kept: in the run's own directory if nowhere else."""
ABANDONED = 24 * 3600.0
"""Seconds after which what is half-written is nobody's work, for a directory takes minutes."""
HELD = (errno.EACCES, errno.EAGAIN)
"""What the system says of a lock that another process holds."""
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers, which are written in Rust, say what the system refused; they raise no OSError."""
HUB_MARK = "hf://"
"""Stands before the id of a model or an adapter that is looked for on the hub alone."""
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
"""`owner/name`."""


@contextmanager
def new_file(path: Path, instead: str = RUN_DIR) -> Iterator[Path]:
    """Yields a path to write to; what is there when the block ends without an error takes the place of ``path``.

    Args:
        path: the file.
        instead: what a person may do who has no space to free.

    Raises:
        StoreError: the disk is full, read-only or otherwise refuses; the old file is still there.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        put_in_place(temporary, path)
    except OSError as error:
        raise StoreError(cannot_write(path, error, instead)) from error
    finally:
        with suppress(OSError):  # where nothing can be written there is nothing to remove
            temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Lets a written file take the place of ``path``, for good even if the machine then stops."""
    _to_disk(temporary)
    temporary.replace(path)
    _to_disk(path.parent)


def write_text(path: Path, text: str, instead: str = RUN_DIR) -> None:
    """Replaces ``path`` by ``text`` in one step. Arguments and errors as of :func:`new_file`."""
    with new_file(path, instead) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any], instead: str = RUN_DIR) -> None:
    """Replaces ``path`` by ``content`` as indented JSON. Arguments and errors as of :func:`new_file`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", instead)


@contextmanager
def new_directory(path: Path, instead: str = RUN_DIR, replace: bool = True) -> Iterator[Path]:
    """Yields an empty directory that takes the place of ``path`` when the block ends without an error.

    Args:
        path: the directory.
        instead: what a person may do who has no space to free.
        replace: what stands at ``path`` by then gives way; False where it would be the same, and others may read it.

    Raises:
        StoreError: writing failed; nothing half-written remains and what stood at ``path`` before is untouched.
    """
    restore_directory(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if replace and path.exists():
            path.rename(_old(path))
        try:
            temporary.rename(path)
        except OSError:
            if replace or not path.is_dir():
                raise
        shutil.rmtree(_old(path), ignore_errors=True)
    except Exception as error:
        if (refusal := _system_error(error)) is None:
            raise
        restore_directory(path)
        raise StoreError(cannot_write(path, refusal, instead)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore_directory(path: Path) -> None:
    """Undoes a :func:`new_directory` that was killed between its two renames."""
    if _old(path).exists():
        if path.exists():
            shutil.rmtree(_old(path), ignore_errors=True)
        else:
            _old(path).rename(path)


def discard_directory(path: Path) -> None:
    """Removes a directory so that no half of it remains under its name, whenever this is killed."""
    if path.exists():
        trash = _temporary(path)
        path.rename(trash)
        shutil.rmtree(trash)


def sweep(directory: Path) -> None:
    """Removes what killed processes left half-written in ``directory``."""
    for path in directory.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sweep_abandoned(directory: Path, pattern: str) -> None:
    """As :func:`sweep`, where others may be writing: only what is named so and has been left alone for long.

    Args:
        directory: where to look.
        pattern: begins the names of what may have been left there.
    """
    for path in directory.glob(f".{pattern}.*.tmp"):
        with suppress(OSError):  # gone by now, or another person's
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path)


def digest_of(text: str) -> str:
    """Identifies a text."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def digest_of_file(name: str | Path) -> str:
    """Identifies a file's content."""
    path = user_path(name)
    found = path.stat()
    return _digest_of_version(path, found.st_mtime_ns, found.st_size)


@cache
def _digest_of_version(path: Path, modified: int, size: int) -> str:
    """Of a large file taken once, as long as it is not written to."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def cache_directory() -> Path:
    """Where converted models are kept: ``$TOSS_CACHE``, or ``toss_lightning`` in the user's cache directory."""
    if chosen := os.environ.get("TOSS_CACHE"):
        return user_path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toss_lightning"


def user_path(name: str | Path) -> Path:
    """A path as people write it, ``~`` for their home included."""
    return Path(os.path.expanduser(name))  # pathlib raises where nobody has such a home


def _temporary(path: Path) -> Path:
    """Where to write what is to stand at ``path``; process numbers are not unique where machines share a disk."""
    return path.with_name(f".{path.name}.{token_hex(6)}.tmp")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            _to_disk(file)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_writable(directory: Path) -> None:
    """Makes a directory and a file in it, which does not stay.

    Raises:
        OSError: that cannot be done.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=directory):
        pass


def cannot_write(path: Path, error: OSError, instead: str = RUN_DIR) -> str:
    """What to tell a person whose disk refuses."""
    return f"{path}: cannot be written ({error.strerror or error}): free some space or {instead}"


def _system_error(error: Exception) -> OSError | None:
    if isinstance(error, OSError):
        return error
    found = SYSTEM_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def may_be_hub_id(path: str) -> bool:
    """Whether what is not here may be on the hub: `owner/name` where no folder `owner` lies here, or a bare name."""
    if HUB_ID.fullmatch(path):
        return not Path(path).parent.is_dir()
    return re.fullmatch(r"\w[\w-]*", path) is not None


def no_such_directory(path: str) -> str:
    """What to tell a person who names a directory that is not here, and that is no hub id."""
    hub = f"; the hub's is {HUB_MARK}{path}" if HUB_ID.fullmatch(path) else ""
    return f"no such directory{nearest(user_path(path))}{hub}"


def nearest(path: Path) -> str:
    """The name beside a missing ``path`` that may have been meant, as a question; nothing where there is none."""
    names = sorted(item.name for item in path.parent.iterdir()) if path.parent.is_dir() else []
    unfinished = [name for name in names if Path(name).stem == path.name]
    found = [*unfinished, *difflib.get_close_matches(path.name, names, 1)]
    return f" (is it {path.parent / found[0]}?)" if found else ""
