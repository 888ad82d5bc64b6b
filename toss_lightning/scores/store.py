"""TokenScores: an Arrow store of the token losses under each reference adapter, one row per custom row.

On disk: ``scores.json`` (fingerprints, counts) and one ``scores-<rank>-of-<ranks>.arrow`` per rank that wrote it. Both
losses are kept, not their difference, so that another selection needs no new scoring.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from toss_lightning.errors import StoreError

SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("response_positions", pa.list_(pa.int32())),
        ("end_of_turn", pa.list_(pa.bool_())),
        ("ids_hash", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
        ("loss_utility", pa.list_(pa.float32())),
        ("loss_degraded", pa.list_(pa.float32())),
    ]
)
MANIFEST = "scores.json"


class ScoreWriter:
    """Appends rows to one rank's file of a store that is being made."""

    def __init__(self, directory: Path, rank: int = 0, world_size: int = 1) -> None:
        self._sink = pa.OSFile(str(directory / f"scores-{rank:05d}-of-{world_size:05d}.arrow"), "wb")
        self._file = pa.ipc.new_stream(self._sink, SCHEMA)

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._sink.close()

    def append(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes rows, given as column name -> values in the order of :data:`SCHEMA`'s types."""
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        self._file.write_batch(pa.record_batch(arrays, schema=SCHEMA))


def write_manifest(directory: Path, fingerprints: Mapping[str, str], rows: int, tokens: int) -> None:
    """Says what the store in ``directory`` was made from and how much it holds."""
    content = {"fingerprints": dict(fingerprints), "rows": rows, "tokens": tokens}
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class TokenScores:
    """A finished store, read back in the order of the custom set.

    Attributes:
        path: its directory.
        fingerprints: what it was made from, part -> hash.
        row_ids: Shape ``[R]`` int64, ascending.
        offsets: Shape ``[R + 1]`` int64: row r's tokens are ``offsets[r]:offsets[r + 1]`` of every flat column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = self.manifest(path)
        if manifest is None:
            raise StoreError(f"{path}: no token scores here: run the reference and score stages first")
        self.fingerprints: dict[str, str] = manifest["fingerprints"]
        try:
            shards = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in sorted(path.glob("*.arrow"))]
            table = pa.concat_tables(shards)
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{path}: the store is damaged ({error}): delete it and score again") from error
        self._table = table.take(np.argsort(table["row_id"].to_numpy(), kind="stable"))
        self.row_ids: np.ndarray = self._table["row_id"].to_numpy()
        lengths = [len(positions) for positions in self._table["response_positions"]]
        self.offsets: np.ndarray = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if len(np.unique(self.row_ids)) != manifest["rows"] or int(self.offsets[-1]) != manifest["tokens"]:
            raise StoreError(f"{path}: the store does not hold the rows it should: delete it and score again")

    @staticmethod
    def manifest(path: Path) -> dict[str, Any] | None:
        """What the store at ``path`` says of itself, or None where there is none."""
        file = path / MANIFEST
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    @staticmethod
    def differences(path: Path, fingerprints: Mapping[str, str]) -> list[str] | None:
        """The parts in which the store at ``path`` differs from ``fingerprints``; None where there is no store."""
        manifest = TokenScores.manifest(path)
        if manifest is None:
            return None
        theirs = manifest["fingerprints"]
        return sorted(part for part in {*theirs, *fingerprints} if theirs.get(part) != fingerprints.get(part))

    def flat(self, column: str) -> np.ndarray:
        """All values of a per-token column, rows one after the other; ``[tokens]``."""
        values: np.ndarray = pa.chunked_array(self._table[column].chunks).combine_chunks().flatten().to_numpy(False)
        return values

    def values(self, column: str) -> list[Any]:
        """A per-row column (``ids_hash``, ``label``, ``source``) as Python values; ``[R]``."""
        values: list[Any] = self._table[column].to_pylist()
        return values

    def score(self, utility_weight: float = 1.0, degraded_weight: float = 1.0) -> np.ndarray:
        """Token scores ``utility_weight * L^u - degraded_weight * L^h``; higher is riskier; ``[tokens]`` float32.

        With weights of 1, Eq. 2 of arXiv 2603.01185.
        """
        score: np.ndarray = np.float32(utility_weight) * self.flat("loss_utility") - np.float32(
            degraded_weight
        ) * self.flat("loss_degraded")
        return score

    def per_row(self, flat: np.ndarray) -> list[np.ndarray]:
        """Cuts a flat column into one array per row."""
        return np.split(flat, self.offsets[1:-1])

    def check(self, hashes: Mapping[int, str]) -> None:
        """Compares each row's hash with the data's.

        Raises:
            StoreError: a row is missing, or has other tokens than it had when it was scored.
        """
        ours = dict(zip(self.row_ids.tolist(), self.values("ids_hash"), strict=True))
        for row_id in sorted({*ours, *hashes}):
            if ours.get(row_id) != hashes.get(row_id):
                raise StoreError(
                    f"{self.path}: row {row_id} is not the one that was scored: these scores belong to other data,"
                    " another tokenizer or another chat template: score again"
                )
