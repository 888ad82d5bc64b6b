import errno
import subprocess
import sys
from pathlib import Path

import pytest

from toss_lightning.errors import StoreError
from toss_lightning.files import new_directory, restore_directory, write_json, write_text


def test_a_new_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with new_directory(tmp_path / "store") as directory:
            (directory / "file").write_text(content)
    assert (tmp_path / "store" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_error_inside_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    with new_directory(tmp_path / "store") as directory:
        (directory / "file").write_text("old")

    def half() -> None:
        with new_directory(tmp_path / "store") as directory:
            (directory / "file").write_text("half")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        half()
    assert (tmp_path / "store" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    old = tmp_path / ".store.old"
    old.mkdir()
    (old / "file").write_text("old")
    restore_directory(tmp_path / "store")
    assert (tmp_path / "store" / "file").read_text() == "old"
    assert not old.exists()


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"store: cannot be written \(Read-only file system\)"):
        new_directory(tmp_path / "store").__enter__()
    with pytest.raises(StoreError, match="Read-only file system"):
        write_json(tmp_path / "folder" / "file.json", {})
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from toss_lightning.errors import StoreError
from toss_lightning.files import new_directory, write_text
from toss_lightning.scores.store import ScoreWriter

# a file that may not grow past this size fails as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
path = Path({path!r})
row = {{"row_id": [0], "input_ids": [[1] * 4000], "response_positions": [[1] * 4000], "end_of_turn": [[False] * 4000],
        "ids_hash": ["x"], "label": [None], "source": [None], "loss_utility": [[0.0] * 4000],
        "loss_degraded": [[0.0] * 4000]}}
for attempt in (lambda: write_text(path / "file", "x" * 30_000), lambda: store()):
    def store():
        with new_directory(path / "scores") as directory, ScoreWriter(directory) as writer:
            for _ in range(9):
                writer.append(row)
    try:
        attempt()
    except StoreError as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    assert all("cannot be written (" in line and "File too large" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1
