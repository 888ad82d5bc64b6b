"""Rows of a JSON file, each as it is written.

`datasets` settles what a column holds by the first ten megabytes of a file, and refuses the file where a later row has
another column, or text where there was nothing before, as in a file that was put together from two sources.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from toss_lightning.errors import DataError

ESCAPE = "\\u"
"""How JSON writes what may be half of a character."""
UNREADABLE = (ValueError, RecursionError)
"""What Python's reader raises: also of a number of thousands of digits, and of lists in lists without end."""


class Table(Protocol):
    """As much of a `datasets.Dataset` as sources need."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    column_names: list[str]

    def select(self, indices: range) -> "Table":
        """Neighbouring rows."""
        ...

    def remove_columns(self, names: Sequence[str]) -> "Table":
        """The rows without these columns."""
        ...

    def rename_columns(self, new: Mapping[str, str]) -> "Table":
        """The rows with some columns under other names; old name -> new name."""
        ...


class JsonRows:
    """Rows in their order, as a :class:`Table`: each has all columns, with None where the file has nothing.

    Args:
        rows: column name -> value, of each row.
        columns: names of all columns.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        self.rows = rows
        self.column_names = [*columns]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return ({name: row.get(name) for name in self.column_names} for row in self.rows)

    def select(self, indices: range) -> "JsonRows":
        """Neighbouring rows."""
        return JsonRows(self.rows[indices.start : indices.stop], self.column_names)

    def remove_columns(self, names: Sequence[str]) -> "JsonRows":
        """The rows without these columns."""
        return JsonRows(self.rows, [name for name in self.column_names if name not in names])

    def rename_columns(self, new: Mapping[str, str]) -> "JsonRows":
        """The rows with some columns under other names; old name -> new name."""
        names = {name: new.get(name, name) for name in self.column_names}
        return JsonRows([{names[name]: row.get(name) for name in names} for row in self.rows], [*names.values()])


def read_json_rows(path: Path) -> JsonRows:
    """Reads a file of a JSON object per line, or of one array of objects.

    Raises:
        DataError: it is broken, or holds something else; the message names the line, or the row of an array.
        OSError: the file cannot be read.
    """
    rows = []
    for number, row in _of_array(path) if _is_array(path) else _of_lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: each row must be an object, not {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    return JsonRows(rows, [*dict.fromkeys(name for row in rows for name in row)])


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        first = next((text for line in file if (text := line.removeprefix(b"\xef\xbb\xbf").lstrip())), b"")
    return first.startswith(b"[")


def _of_array(path: Path) -> Iterator[tuple[int, Any]]:
    text = _decoded(path.read_bytes(), f"{path}")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON ({error.msg}): fix the file") from error
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}): fix the file") from error
    escaped = ESCAPE in text
    for number, row in enumerate(rows, 1):
        if escaped:
            _check_text(row, f"{path}:{number}")
        yield number, row


def _of_lines(path: Path) -> Iterator[tuple[int, Any]]:
    # as bytes, for the line separators that text may hold end no line of the file
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text, where = _decoded(line, f"{path}:{number}"), f"{path}:{number}"
            if text.strip():
                try:
                    row = json.loads(text)
                except UNREADABLE as error:
                    told = f"{where}: broken JSON ({getattr(error, 'msg', error)})"
                    if text.strip() == "{":
                        raise DataError(f"{told}: write each row on a line of its own, or all as one array") from error
                    raise DataError(f"{told}: fix or remove the line") from error
                if ESCAPE in text:
                    _check_text(row, where)
                yield number, row


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not in UTF-8: save the file as that") from error


def _check_text(row: Any, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: {half} alone is no character: remove it") from error
