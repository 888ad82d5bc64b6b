"""Files that are either the old one or the new one, whatever happens while they are written."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toss_lightning.errors import StoreError


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step.

    Raises:
        StoreError: the disk is full, read-only or otherwise refuses; the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(_cannot_write(path, error)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces ``path`` by ``content`` as indented JSON. Raises as :func:`write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory that takes the place of ``path`` when the block ends without an error.

    Raises:
        StoreError: writing failed; nothing half-written remains and what stood at ``path`` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if path.exists():
            path.rename(_old(path))
        temporary.rename(path)
        shutil.rmtree(_old(path), ignore_errors=True)
    except OSError as error:
        restore_directory(path)
        raise StoreError(_cannot_write(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore_directory(path: Path) -> None:
    """Undoes a :func:`new_directory` that was killed between its two renames."""
    if _old(path).exists():
        if path.exists():
            shutil.rmtree(_old(path), ignore_errors=True)
        else:
            _old(path).rename(path)


def cache_directory() -> Path:
    """Where converted models are kept: ``$TOSS_CACHE``, or ``toss_lightning`` in the user's cache directory."""
    if chosen := os.environ.get("TOSS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toss_lightning"


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _cannot_write(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror or error}): free some space or choose another --run_dir"
