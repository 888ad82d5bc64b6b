import errno
import os
import shutil
import time
from pathlib import Path

import programs
import pytest
from kills import killed_everywhere, tree

from toss_lightning.errors import StoreError
from toss_lightning.files import (
    ABANDONED,
    cache_directory,
    digest_of_file,
    discard_directory,
    may_be_hub_id,
    new_directory,
    new_file,
    no_such_directory,
    put_in_place,
    restore_directory,
    sweep,
    sweep_abandoned,
    user_path,
    write_json,
    write_text,
)

# --- what the helpers do ----------------------------------------------------------------------------------------------


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "folder" / "file", "old")
    write_text(tmp_path / "folder" / "file", "new")
    assert tree(tmp_path) == {"folder/file": b"new"}


def test_a_new_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_file(tmp_path / "folder" / "file") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "folder" / "file").exists()
        temporary.write_text("whole")
    assert tree(tmp_path) == {"folder/file": b"whole"}


def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def half() -> None:
        with new_file(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        half()
    assert tree(tmp_path) == {"file": b"old"}


def test_a_file_that_was_written_elsewhere_is_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "written").write_text("new")
    put_in_place(tmp_path / "written", tmp_path / "file")
    assert tree(tmp_path) == {"file": b"new"}


def test_a_new_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with new_directory(tmp_path / "store") as directory:
            (directory / "file").write_text(content)
    assert tree(tmp_path) == {"store/file": b"new"}
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
    assert tree(tmp_path) == {"store/file": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_directory_is_discarded_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "store" / "inner").mkdir(parents=True)
    (tmp_path / "store" / "inner" / "file").write_text("x")
    discard_directory(tmp_path / "store")
    discard_directory(tmp_path / "never_was_there")
    assert not list(tmp_path.iterdir())


def test_a_sweep_takes_what_is_half_written_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".store.123.tmp" / "inner").mkdir(parents=True)
    (tmp_path / ".file.123.tmp").write_text("half")
    (tmp_path / "mine.tmp").write_text("a file of the user")
    (tmp_path / ".hidden").write_text("as well")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".file.5.tmp").write_text("not in this directory")
    sweep(tmp_path)
    sweep(tmp_path / "nothing_here")
    assert set(tree(tmp_path)) == {"mine.tmp", ".hidden", "folder/.file.5.tmp"}


def test_what_is_half_written_has_a_name_of_its_own(tmp_path: Path) -> None:
    # as of two machines that share a disk, on which processes may have the same number
    with new_file(tmp_path / "file") as one, new_file(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert tree(tmp_path) == {"file": b"one"}
    with new_directory(tmp_path / "store") as one, new_directory(tmp_path / "store") as other:
        (one / "file").write_text("one")
        (other / "file").write_text("other")
    assert tree(tmp_path) == {"file": b"one", "store/file": b"one"}


@pytest.mark.parametrize("when", ["before", "meanwhile", "at the last moment"])
def test_a_directory_that_is_not_to_be_replaced_stays_whenever_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    store, rename = tmp_path / "store", Path.rename

    def theirs() -> None:
        store.mkdir()
        (store / "file").write_text("theirs")

    def renamed(self: Path, target: Path) -> Path:
        theirs()
        return rename(self, target)

    if when == "before":
        theirs()
    if when == "at the last moment":
        monkeypatch.setattr(Path, "rename", renamed)
    with new_directory(store, replace=False) as directory:
        (directory / "file").write_text("mine")
        if when == "meanwhile":
            theirs()
    assert tree(tmp_path) == {"store/file": b"theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_sweep_among_others_takes_what_was_left_long_ago(tmp_path: Path) -> None:
    for name in (".model-1.77.tmp", ".model-1.78.tmp", ".other.77.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
        os.utime(tmp_path / name, (time.time() - ABANDONED - 60,) * 2)
    os.utime(tmp_path / ".model-1.78.tmp")
    sweep_abandoned(tmp_path, "model-?")
    sweep_abandoned(tmp_path / "nothing_here", "model-?")
    assert {path.name for path in tmp_path.iterdir()} == {".model-1.78.tmp", ".other.77.tmp"}


def test_paths_are_taken_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/run") == tmp_path / "run"
    assert user_path("run/~") == Path("run/~")
    assert user_path("~nosuchuser/run") == Path("~nosuchuser/run")
    monkeypatch.setenv("TOSS_CACHE", "~/cache")
    assert cache_directory() == tmp_path / "cache"
    (tmp_path / "file").write_text("content")
    assert digest_of_file("~/file") == digest_of_file(tmp_path / "file")


# --- killed at every touch of the disk --------------------------------------------------------------------------------


def test_a_killed_write_leaves_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    before = "(path / 'file').write_text('old')"
    body = "from toss_lightning.files import write_text; write_text(path / 'file', 'new')"
    *killed, done = killed_everywhere(tmp_path / "runs", body, before)
    for path in killed:
        assert (path / "file").read_text() in ("old", "new")
        sweep(path)
        assert [file.name for file in path.iterdir()] == ["file"]
    assert tree(done) == {"file": b"new"}


def test_a_killed_write_of_a_first_file_leaves_none_or_the_whole(tmp_path: Path) -> None:
    body = "from toss_lightning.files import write_text; write_text(path / 'folder' / 'file', 'new')"
    for path in killed_everywhere(tmp_path / "runs", body):
        assert not (path / "folder" / "file").exists() or (path / "folder" / "file").read_text() == "new"


NEW_DIRECTORY = """
from toss_lightning.files import new_directory
with new_directory(path / 'store') as directory:
    (directory / 'a').write_text('new')
    (directory / 'b').write_text('new')
"""


@pytest.mark.parametrize("there_was_one", [True, False])
def test_a_killed_new_directory_is_the_old_one_or_the_new_one_once_restored(
    tmp_path: Path, there_was_one: bool
) -> None:
    before = "(path / 'store').mkdir(); [(path / 'store' / name).write_text('old') for name in 'ab']"
    *killed, done = killed_everywhere(tmp_path / "runs", NEW_DIRECTORY, before if there_was_one else "")
    old = {"a": b"old", "b": b"old"} if there_was_one else {}
    outcomes = []
    for path in killed:
        restore_directory(path / "store")
        sweep(path)
        outcomes.append(tree(path / "store"))
        assert outcomes[-1] in (old, {"a": b"new", "b": b"new"})
        assert {one.name for one in path.iterdir()} <= {"store"}
    assert outcomes[0] == old
    assert tree(done) == {"store/a": b"new", "store/b": b"new"}


def test_a_killed_discard_leaves_all_of_the_directory_or_none(tmp_path: Path) -> None:
    before = "(path / 'store').mkdir(); [(path / 'store' / name).write_text('old') for name in 'abc']"
    body = "from toss_lightning.files import discard_directory; discard_directory(path / 'store')"
    *killed, done = killed_everywhere(tmp_path / "runs", body, before)
    sizes = [len(tree(path / "store")) for path in killed]
    assert set(sizes) == {0, 3}
    for path in killed:
        sweep(path)
        assert {one.name for one in path.iterdir()} <= {"store"}
    assert not list(done.iterdir())


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    old = tmp_path / ".store.old"
    old.mkdir()
    (old / "file").write_text("old")
    restore_directory(tmp_path / "store")
    assert (tmp_path / "store" / "file").read_text() == "old"
    assert not old.exists()


# --- disks that refuse ------------------------------------------------------------------------------------------------


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # Linux says so before it looks whether there is such a file
    with pytest.raises(StoreError, match=r"store: cannot be written \(Read-only file system\)"):
        new_directory(tmp_path / "store").__enter__()
    with pytest.raises(StoreError, match="Read-only file system"):
        write_json(tmp_path / "folder" / "file.json", {})
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_directory_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for attempt in (
        lambda: write_text(tmp_path / "run" / "summary.json", ""),
        lambda: new_directory(tmp_path / "run" / "store").__enter__(),
    ):
        with pytest.raises(StoreError, match=r"run/.*: cannot be written \(.*choose another --run_dir"):
            attempt()
    with pytest.raises(StoreError, match=r"free some space or choose another disk$"):
        write_json(tmp_path / "run" / "summary.json", {}, "choose another disk")
    assert tree(tmp_path) == {"run": b"a file"}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
sys.path.insert(0, {tests!r})
from scores_on_disk import make_scores
from toss_lightning.errors import StoreError
from toss_lightning.files import new_directory, write_text
from toss_lightning.scores import ScoreWriter
from toss_lightning.selection import TokenWeights

path = Path({path!r})
make_scores(path / "scores", [[1.0, 0.0]])
# from here on a file that may not grow past this size fails as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
row = {{"row_id": 0, "input_ids": [1] * 9000, "response_positions": [1] * 9000, "end_of_turn": [False] * 9000,
        "ids_hash": "x", "label": None, "source": None}}

def rows():
    ScoreWriter(path / "other", {{}}).begin([row])

def chunk():
    writer = ScoreWriter(path / "scores", {{}})
    writer.begin_column("utility", "another adapter", "plan")
    writer.append("utility", 0, {{0: np.zeros(9000, dtype=np.float32)}})

def weights():
    TokenWeights({{0: np.zeros(9000, dtype=np.float32)}}, {{0: "x"}}).save(path / "selection")

def model():
    with new_directory(path / "model") as directory:
        save_file({{"weight": np.zeros(9000)}}, directory / "model.safetensors")

def tokenizer():
    with new_directory(path / "words", "name another directory in TOSS_CACHE") as directory:
        Tokenizer(models.WordLevel({{f"w{{at}}": at for at in range(9000)}})).save(str(directory / "tokenizer.json"))

for attempt in (lambda: write_text(path / "file", "x" * 30_000), rows, chunk, weights, model, tokenizer):
    try:
        attempt()
    except StoreError as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    result = programs.run(["-c", script])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(tmp_path / name)
        for name in ("file", "other/rows.arrow", "scores/.loss_utility.part/00000.arrow", "selection", "model", "words")
    ], result.stdout + result.stderr
    assert all("cannot be written (" in line and "File too large" in line for line in lines)
    assert all("free some space or choose another --run_dir" in line for line in lines[:-1])
    assert lines[-1].endswith(
        "words: cannot be written (File too large): free some space or name another directory in TOSS_CACHE"
    )
    # the chunk is not there, and the column that was there still is
    (tmp_path / "scores/.loss_utility.part/column.json").unlink()
    assert not tree(tmp_path / "scores/.loss_utility.part")
    assert "loss_utility/00000.arrow" in tree(tmp_path / "scores")
    shutil.rmtree(tmp_path / "scores")
    assert not tree(tmp_path)


def test_what_a_kill_left_of_the_old_directory_is_in_nobody_s_way(tmp_path: Path) -> None:
    for content in ("old", "newer"):
        with new_directory(tmp_path / "store") as directory:
            (directory / "file").write_text(content)
        (tmp_path / ".store.old").mkdir()
        (tmp_path / ".store.old/file").write_text("left behind")
    with new_directory(tmp_path / "store") as directory:
        (directory / "file").write_text("newest")
    assert (tmp_path / "store/file").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["owner/name", "meta-llama/Llama-3.2-1B", "gpt2", "bert_base-uncased"])
def test_names_that_the_hub_may_know(somewhere: None, path: str) -> None:
    assert may_be_hub_id(path)


@pytest.mark.parametrize(
    "path",
    [
        *("models/llama", "./name", "../name", "/name", "~/name", "~nosuchuser", ".", "", "a folder/name"),
        *("owner/name/more", "rows.txt", ".hidden", "owner/"),
    ],
)
def test_paths_that_are_no_name_of_the_hub(somewhere: None, path: str) -> None:
    Path("models").mkdir()
    assert not may_be_hub_id(path)


def test_a_missing_directory_is_told_with_the_nearest_name(somewhere: None) -> None:
    for name in ("llama-1b", "llama-8b", "rows.jsonl"):
        (Path("models") / name).mkdir(parents=True)
    hub = "; the hub's is hf://models/{}"
    assert no_such_directory("models/llama_8b") == "no such directory (is it models/llama-8b?)" + hub.format("llama_8b")
    assert no_such_directory("./models/rows") == "no such directory (is it models/rows.jsonl?)"
    assert no_such_directory("~nosuchuser/llama") == "no such directory"
