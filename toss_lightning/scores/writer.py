"""ScoreWriter: fills a store column by column, chunk by chunk, from any number of ranks; a killed one goes on.

A column is a directory of chunk files. It is made as ``.loss_X.part`` and takes its name when it is complete. Which
rows stand in a chunk does not depend on the number of ranks, and a chunk file appears whole or not at all: what is on
disk when a run is killed need not be scored again, by however many ranks go on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from toss_lightning.files import discard_directory, new_file, sweep, write_json
from toss_lightning.scores.store import COLUMN, MANIFEST, ROWS, degraded_column, read_json

ROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("response_positions", pa.list_(pa.int32())),
        ("end_of_turn", pa.list_(pa.bool_())),
        ("ids_hash", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
    ]
)
FEATURES = {"text": pa.string(), "embedding": pa.list_(pa.float32()), "selector": pa.float32()}
"""Kind of row feature -> its type."""
LOSS_SCHEMA = pa.schema([("row_id", pa.int64()), ("loss", pa.list_(pa.float32()))])


class ScoreWriter:
    """Writes the store at ``path``. Everything but :meth:`append` and :meth:`pending` is for one rank alone.

    Args:
        path: directory of the store.
        fingerprints: what every column depends on: base, precision, tokenizer, data.
    """

    def __init__(self, path: Path, fingerprints: Mapping[str, str]) -> None:
        self.path, self.fingerprints = path, dict(fingerprints)

    def differences(self) -> list[str]:
        """The parts in which the store that is there differs; none where there is none yet."""
        manifest = read_json(self.path / MANIFEST)
        if manifest is None:
            return []
        theirs, ours = manifest["fingerprints"], self.fingerprints
        return sorted(part for part in {*theirs, *ours} if theirs.get(part) != ours.get(part))

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows, unless they are there. A store that was made from other things is emptied first.

        Args:
            rows: the columns of :data:`ROW_SCHEMA` of each row.
        """
        if self.differences():
            discard_directory(self.path)
        sweep(self.path)
        if not (self.path / MANIFEST).exists():
            _write_arrow(self.path / ROWS, _table(rows, ROW_SCHEMA))
            self._write_manifest(len(rows), sum(len(row["response_positions"]) for row in rows), 0)

    def feature_of(self, kind: str, set: str) -> str | None:
        """What a row feature of a set was made from; None where it is not there."""
        file = self._feature(kind, set)
        if not file.is_file():
            return None
        with pa.OSFile(str(file)) as source:
            return str((pa.ipc.open_stream(source).schema.metadata or {}).get(b"made_from", b"").decode())

    def write_feature(self, kind: str, set: str, row_ids: Sequence[int], values: Sequence[Any], made_from: str) -> None:
        """Writes a value for each row of a set.

        Args:
            kind: ``text``, ``embedding`` or ``selector``.
            set: name of the set.
            row_ids: its rows.
            values: a string, a vector or a number for each.
            made_from: identifies what the values depend on.

        Raises:
            StoreError: the disk refuses.
        """
        schema = pa.schema([("row_id", pa.int64()), ("value", FEATURES[kind])], {"made_from": made_from})
        columns = [pa.array(row_ids, pa.int64()), pa.array(list(values), FEATURES[kind])]
        _write_arrow(self._feature(kind, set), pa.Table.from_arrays(columns, schema=schema))

    def finish_round(self, round: int) -> None:
        """Makes ``round`` the store's last one."""
        manifest = read_json(self.path / MANIFEST)
        assert manifest is not None
        if manifest["round"] != round:
            self._write_manifest(manifest["rows"], manifest["tokens"], round)

    def adapter_of(self, column: str) -> str | None:
        """The digest of the adapter that a complete column was made with; None where there is no such column."""
        found = read_json(self.path / f"loss_{column}" / COLUMN)
        return None if found is None else str(found["adapter"])

    def drop(self, column: str) -> None:
        """Removes a column, and those of later rounds, which followed from it unless it is the base's."""
        manifest, round = read_json(self.path / MANIFEST), _round_of(column)
        if column != "base":
            if manifest is not None and manifest["round"] >= max(round, 1):
                self.finish_round(max(round - 1, 0))
            for later in range(round + 1, len(list(self.path.glob("loss_degraded*"))) + 1):
                discard_directory(self.path / f"loss_{degraded_column(later)}")
        discard_directory(self.path / f"loss_{column}")

    def begin_column(self, column: str, adapter: str, plan: str) -> None:
        """Makes room for a column; chunks of it that were made with the same adapter and plan stay.

        Args:
            column: ``utility``, ``degraded``, ``degraded-1``, ...
            adapter: digest of the adapter that the losses are taken with.
            plan: digest of which rows stand in which chunk.
        """
        part, wanted = self._part(column), {"adapter": adapter, "plan": plan}
        if read_json(part / COLUMN) != wanted:
            discard_directory(part)
            write_json(part / COLUMN, wanted)
        sweep(part)

    def pending(self, column: str, chunks: int) -> list[int]:
        """The chunks that are still to be scored."""
        return [chunk for chunk in range(chunks) if not self._chunk(column, chunk).exists()]

    def append(self, column: str, chunk: int, losses: Mapping[int, np.ndarray]) -> None:
        """Writes one chunk.

        Args:
            column: as for :meth:`begin_column`.
            chunk: its number.
            losses: row id -> Shape ``[N]`` float32, N response tokens of the row.

        Raises:
            StoreError: the disk refuses; the chunk is then not there.
        """
        rows = [{"row_id": row_id, "loss": values} for row_id, values in losses.items()]
        _write_arrow(self._chunk(column, chunk), _table(rows, LOSS_SCHEMA))

    def end_column(self, column: str) -> None:
        """Gives a complete column its name."""
        done = self.path / f"loss_{column}"
        discard_directory(done)
        self._part(column).rename(done)

    def _feature(self, kind: str, set: str) -> Path:
        return self.path / f"feature_{kind}" / f"{set}.arrow"

    def _part(self, column: str) -> Path:
        return self.path / f".loss_{column}.part"

    def _chunk(self, column: str, chunk: int) -> Path:
        return self._part(column) / f"{chunk:05d}.arrow"

    def _write_manifest(self, rows: int, tokens: int, round: int) -> None:
        content = {"fingerprints": self.fingerprints, "rows": rows, "tokens": tokens, "round": round}
        write_json(self.path / MANIFEST, content)


def _round_of(column: str) -> int:
    return int(column.partition("-")[2] or 0)


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.table({field.name: pa.array([row[field.name] for row in rows], field.type) for field in schema})


def _write_arrow(path: Path, table: pa.Table) -> None:
    with (
        new_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as stream,
    ):
        stream.write_table(table)
