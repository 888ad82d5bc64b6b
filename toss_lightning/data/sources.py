"""Where rows come from: files, hub datasets, bundled samples, and mixtures of them."""

import csv
import errno
import glob
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from toss_lightning.data.formats import Conversation, Format, detect_format, to_conversation
from toss_lightning.data.json_rows import Table, read_json_rows
from toss_lightning.errors import DataError, TossError
from toss_lightning.files import HUB_ID, may_be_hub_id, nearest

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
LONGEST_CELL = 2**31 - 1
"""Characters of a CSV cell; by default Python's reader takes no conversation of more than 131 thousand."""
SAMPLES = Path(__file__).parent / "samples"
HUB = "hf://datasets/"
"""Stands before the name of a hub dataset that is looked for nowhere else."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit in full; it alone stands for the same rows for ever."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT)
"""What the system says of a full disk, a quota and a process limit, and Python where no directory takes a file."""


@dataclass(frozen=True)
class Source:
    """One origin of rows, and which of its rows to take."""

    path: str
    """A .jsonl, .json, .parquet or .csv file, a folder written by `save_to_disk`, a hub dataset, or sample:NAME.

    A hub dataset is OWNER/NAME, or hf://datasets/OWNER/NAME where a folder OWNER lies here.
    """
    format: Format = "auto"
    """How rows are laid out; auto recognises it from the columns."""
    columns: dict[str, str] | None = None
    """Names to read under: {prompt: my_input} reads column my_input as prompt."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset; what its branch main holds by default."""
    data_dir: str | None = None
    """Folder of a hub dataset whose files are read, where its rows lie in several: harmless-base of HH-RLHF."""
    skip: int = 0
    """Rows to pass over at the start."""
    rows: int | None = None
    """Rows to take after those; all by default."""
    share: float | None = None
    """Share of the whole set that this source makes up; it gives as many of its first rows as that needs."""
    name: str | None = None
    """What its rows' source is called where the data does not say; the file's name by default."""


SourceLike = str | Source
SetLike = SourceLike | Sequence[SourceLike]


@dataclass(frozen=True)
class Loaded:
    """The rows of one set, with what was left out of it."""

    conversations: dict[int, Conversation]
    """Row number in the set, bad rows counted in -> conversation."""
    bad: list[str]
    """The error of each row that was left out because `bad_rows` is `drop`."""


def load_set(spec: SetLike, bad_rows: Literal["error", "drop"] = "error") -> Loaded:
    """Reads a set from one or more sources, in their order.

    Args:
        spec: a path, a :class:`Source`, or a list of them.
        bad_rows: what a row that cannot be read does: stop the run, or be left out and counted.

    Raises:
        DataError: a source is missing or broken, a share cannot be met, or (with ``error``) a row cannot be read.
    """
    sources = [
        Source(item) if isinstance(item, str) else item
        for item in ([spec] if isinstance(spec, (str, Source)) else spec)
    ]
    tables = _take_shares(sources, [_slice(_conversations(source), source) for source in sources])
    conversations: dict[int, Conversation] = {}
    bad: list[str] = []
    row_id = 0
    for source, table in zip(sources, tables, strict=True):
        for number, row in _numbered(table, source):
            try:
                conversations[row_id] = to_conversation(row, source.format, f"{source.path}:{number}", _name(source))
            except DataError as error:
                if bad_rows == "error":
                    raise
                bad.append(str(error))
            row_id += 1
    return Loaded(conversations, bad)


def numbered_rows(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of one source, each with the ``file:row`` that a message names it by.

    Args:
        source: where they are; its ``share`` has no meaning here.

    Raises:
        DataError: the source is missing or broken.
    """
    for number, row in _numbered(_slice(_read(source), source), source):
        yield f"{source.path}:{number}", row


def _conversations(source: Source) -> Table:
    table = _read(source)
    if source.format == "auto":
        detect_format(table.column_names, source.path)
    return table


def _read(source: Source) -> Table:
    """Opens a source as a table, its columns renamed. Errors name the file and, where it can be found, the line."""
    if source.path.startswith("sample:"):
        _check_is_hub(source, False)
        name = source.path.removeprefix("sample:")
        path = SAMPLES / f"{name}.jsonl"
        if not path.exists():
            known = sorted(file.stem for file in SAMPLES.glob("*.jsonl"))
            raise DataError(f"{source.path}: no such bundled sample; there are {', '.join(known)}")
        return _read(replace(source, path=str(path)))
    path = Path(os.path.expanduser(source.path))  # pathlib raises where nobody has such a home
    table: Table
    try:
        _check_is_hub(source, path.suffix.lower() not in READERS and not path.exists())
        if path.suffix.lower() in READERS:
            table = _read_file(path)
        elif path.is_dir():
            table = datasets.load_from_disk(str(path))
        elif path.is_file():
            raise DataError(f"{path}: unknown kind of file; files end in {', '.join(READERS)}")
        elif source.path.startswith(HUB) or may_be_hub_id(source.path):
            table = _read_hub(source)
        else:
            hub = f"; the hub's is {HUB}{source.path}" if HUB_ID.fullmatch(source.path) else ""
            raise DataError(f"{path}: no such file{nearest(path)}; files end in {', '.join(READERS)}{hub}")
    except TossError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source.path}: neither a readable file nor a reachable hub dataset ({_reason(error)})"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise DataError(f"{source.path}: split: no {source.split!r}; there are {', '.join(table)}")
        table = table[source.split]
    if not source.columns:
        return table
    renamed = {old: new for new, old in source.columns.items()}
    if missing := sorted(set(renamed) - set(table.column_names)):
        raise DataError(f"{source.path}: columns: names {missing}, but the data has {table.column_names}")
    table = table.remove_columns([new for new in renamed.values() if new in table.column_names and new not in renamed])
    return table.rename_columns(renamed)


def _check_is_hub(source: Source, is_hub: bool) -> None:
    """Refuses options of a hub dataset beside what is read from this machine, which would not heed them.

    Raises:
        DataError: there is one.
    """
    given = {"revision": source.revision, "data_dir": source.data_dir}
    if not is_hub and (names := [name for name, value in given.items() if value is not None]):
        raise DataError(
            f"{source.path}: {names[0]}: only hub datasets have one: set it to null, or name the hub's as"
            f" {HUB}OWNER/NAME"
        )


def _read_hub(source: Source) -> datasets.Dataset:
    try:
        table = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, data_dir=source.data_dir
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise DataError(
                f"{source.path}: revision: the hub has no {source.revision!r}: give a commit, a tag or a branch of the"
                " dataset, or leave it out for the branch main"
            ) from error
        raise
    except ValueError as error:
        # what `datasets` says of a missing folder once it has read another; without the hub it finds none again
        if source.data_dir is not None and "Couldn't find cache" in str(error):
            raise DataError(
                f"{source.path}: data_dir: no files in {source.data_dir!r}, or the hub cannot be reached: correct it,"
                " or save the rows to a file where it can"
            ) from error
        raise
    if source.revision is not None:
        _check_revision(source, table)
    return table


def _check_revision(source: Source, table: datasets.Dataset) -> None:
    """Refuses the rows that `datasets` read last, of whatever revision, which it gives where it does not reach the hub.

    Raises:
        DataError: they are of another revision than the one that was asked for.
    """
    folders = {Path(file["filename"]).parent.name for file in table.cache_files}
    commits = sorted(filter(COMMIT.fullmatch, folders))
    if commits and commits != [_commit(source)]:
        raise DataError(
            f"{source.path}: revision: the hub cannot be reached, and what was read of it last is commit"
            f" {commits[0]}: name that, or try again when it can"
        )


def _commit(source: Source) -> str | None:
    """The commit that a revision stood for when the hub was last asked; None where it never was."""
    if COMMIT.fullmatch(str(source.revision)):
        return source.revision
    name = source.path.removeprefix(HUB)
    try:
        # no file is asked for: others than these may have been read of it, and are not missed
        folder = snapshot_download(
            name, repo_type="dataset", revision=source.revision, allow_patterns=[], local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder).name


def _read_file(path: Path) -> Table:
    if not path.exists():
        raise DataError(f"{path}: no such file{nearest(path)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    reader = READERS[path.suffix.lower()]
    if reader == "json":
        return read_json_rows(path)
    try:
        return _read_once(path, reader, _text_columns(path) if reader == "csv" else {})
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as {reader} ({_reason(error)})") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{path}: the file holds no rows") from error
        raise


def _read_once(path: Path, reader: str, options: dict[str, Any]) -> datasets.Dataset:
    """A file as a table in memory.

    `datasets` reads by way of a copy on disk, which it would keep for ever, and would take for the file again as long
    as that has the same time stamp. The rows become conversations, which need more memory than the table.
    """
    # load_dataset would tell the hub about every file that it reads, and wait where there is no network
    read = getattr(datasets.Dataset, f"from_{reader}")
    try:
        with tempfile.TemporaryDirectory(prefix="toss_", ignore_cleanup_errors=True) as copy:
            return read(glob.escape(str(path)), cache_dir=copy, keep_in_memory=True, **options)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise DataError(
                f"{path}: its temporary copy cannot be written ({cause.strerror}): free some space, or name another"
                " directory in TMPDIR"
            ) from error
        raise


def _text_columns(path: Path) -> dict[str, Any]:
    """Options that read a CSV file as it is written: `42` and `None` are text, and only an empty cell is null.

    Raises:
        DataError: a row has more cells than the header, which pandas would move to other columns or cut.
    """
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        for row in rows:
            if len(row) > len(header):
                raise DataError(
                    f"{path}:{rows.line_num}: {len(row)} cells, but the header names {len(header)}: put cells that hold"
                    " commas in quotation marks"
                )
    # pandas' own name for the column that its to_csv writes without one
    columns = {name or f"Unnamed: {at}": datasets.Value("string") for at, name in enumerate(header)}
    return {"features": datasets.Features(columns), "keep_default_na": False, "na_values": [""], "index_col": False}


def _slice(table: Table, source: Source) -> Table:
    stop = len(table) if source.rows is None else source.skip + source.rows
    if not 0 <= source.skip < stop <= len(table):
        raise DataError(f"{source.path}: rows {source.skip} to {stop} asked for, but it has {len(table)}")
    return table.select(range(source.skip, stop))


def _take_shares(sources: list[Source], tables: list[Table]) -> list[Table]:
    """Cuts the tables whose source names a share so that each makes up just that share of the whole set."""
    shares = {index: Fraction(str(source.share)) for index, source in enumerate(sources) if source.share is not None}
    if not shares:
        return tables
    rest = sum(len(table) for index, table in enumerate(tables) if index not in shares)
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1 or not rest:
        raise DataError("share: shares must be above 0 and add up to less than 1, beside a source without a share")
    total = rest / (1 - sum(shares.values()))
    cut = list(tables)
    for index, share in shares.items():
        needed = round(share * total)
        if not 0 < needed <= len(tables[index]):
            raise DataError(
                f"{sources[index].path}: share: {float(share)} needs {needed} rows, but it has {len(tables[index])}"
            )
        cut[index] = tables[index].select(range(needed))
    return cut


def _numbered(table: Table, source: Source) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with the number a person finds them under: the first row of the file is 1."""
    yield from enumerate(table, source.skip + 1)


def _name(source: Source) -> str:
    return source.name or Path(source.path.removeprefix("sample:")).stem


def _reason(error: Exception) -> str:
    """One line on an error; some of `datasets` say nothing themselves, but have come of one that does."""
    said: BaseException = error
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        said = error.__cause__ or error.__context__ or error
    if isinstance(said, datasets.table.CastError):
        return f"its files differ in their columns: {said.details()}"
    return (str(said).splitlines() or [type(said).__name__])[0]
