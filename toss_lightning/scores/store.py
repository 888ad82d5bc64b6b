"""TokenScores: what the reference adapters said about each response token of the custom set, in Arrow.

On disk: ``scores.json`` (what everything here was made from, how much there is), ``rows.arrow`` (the rows: ids,
response positions, label, source), and a directory for each column of token losses: ``loss_base``, ``loss_utility``,
``loss_degraded``, and for round t of TOSS-Pro ``loss_degraded-t``. All losses are kept, not their differences, so that
another selection, and a comparison of rounds, needs no new scoring. What some selections read of whole rows stands in
``feature_KIND/SET.arrow``, and where one reads held-out rows too, ``SET/`` is a store of these.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from toss_lightning.errors import StoreError

MANIFEST, ROWS, COLUMN = "scores.json", "rows.arrow", "column.json"
OF_ROWS = {"dataset", "tokens"}
"""Fingerprints of the rows themselves."""
KEYS = {MANIFEST: {"fingerprints", "rows", "tokens", "round"}, COLUMN: {"adapter", "plan"}}


def degraded_column(round: int) -> str:
    """The name of the degraded losses of a round."""
    return f"degraded-{round}" if round else "degraded"


def read_json(file: Path) -> dict[str, Any] | None:
    """What one of the store's JSON files says; None where there is none.

    Raises:
        StoreError: it does not say what it should.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: damaged ({error}): delete {file.parent} and score again") from error
    if not isinstance(content, dict) or not KEYS[file.name] <= content.keys():
        raise StoreError(f"{file}: not of this version, or damaged: delete {file.parent} and score again")
    return content


def lists_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column, each an array that must not be written to.

    Each chunk by itself: the offsets of a list have 32 bits, which all tokens of a large set together would overflow.
    """
    rows: list[np.ndarray] = []
    for chunk in column.chunks:
        ends = np.cumsum(pc.list_value_length(chunk).fill_null(0).to_numpy(), dtype=np.int64)
        rows += np.split(chunk.flatten().to_numpy(False), ends)[:-1]
    return rows


class TokenScores:
    """A store, read back in the order of the custom set.

    Args:
        path: its directory.
        round: whose degraded losses :meth:`score` and ``loss_degraded`` mean; the last round's by default.

    Attributes:
        fingerprints: what it was made from, part -> hash.
        round: the round in use.
        row_ids: Shape ``[R]`` int64, ascending.
        offsets: Shape ``[R + 1]`` int64: row r's tokens are ``offsets[r]:offsets[r + 1]`` of every flat column.

    Raises:
        StoreError: there is no store, it is damaged, or it has no such round.
    """

    def __init__(self, path: Path, round: int | None = None) -> None:
        self.path = path
        manifest = read_json(path / MANIFEST)
        if manifest is None:
            raise StoreError(f"{path}: no token scores here: run the reference and score stages first")
        self.fingerprints: dict[str, str] = manifest["fingerprints"]
        self.round: int = manifest["round"] if round is None else round
        # what nobody asks for stays on disk: sorting would read the whole file
        self._table = self._read(path / ROWS)
        if (np.diff(self._table["row_id"].to_numpy()) < 0).any():
            self._table = self._table.sort_by("row_id")
        self.row_ids: np.ndarray = self._table["row_id"].to_numpy()
        lengths = pc.list_value_length(self._table["response_positions"]).to_numpy()
        self.offsets: np.ndarray = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if len(self.row_ids) != manifest["rows"] or int(self.offsets[-1]) != manifest["tokens"]:
            raise StoreError(f"{path}: the store does not hold the rows it should: delete it and score again")
        self._losses: dict[str, np.ndarray] = {}
        if self.rounds and self.round not in self.rounds:
            have = ", ".join(map(str, self.rounds))
            raise StoreError(f"{path}: no scores of round {self.round} here (rounds: {have}): score again")

    @property
    def rounds(self) -> list[int]:
        """The rounds whose degraded losses are here."""
        found, round = [], 0
        while (self.path / f"loss_{degraded_column(round)}" / COLUMN).is_file():
            found.append(round)
            round += 1
        return found

    @property
    def adapters(self) -> dict[str, str]:
        """Column -> digest of the adapter that its losses were taken with."""
        columns = ["base", "utility", *(degraded_column(round) for round in self.rounds)]
        found = {column: read_json(self.path / f"loss_{column}" / COLUMN) for column in columns}
        return {column: facts["adapter"] for column, facts in found.items() if facts is not None}

    def flat(self, column: str) -> np.ndarray:
        """All values of a per-token column, rows one after the other; ``[tokens]``."""
        if column.startswith("loss_"):
            return self._loss(f"loss_{degraded_column(self.round)}" if column == "loss_degraded" else column)
        values: np.ndarray = pc.list_flatten(self._table[column]).to_numpy()
        return values

    def values(self, column: str) -> list[Any]:
        """A per-row column (``ids_hash``, ``label``, ``source``) as Python values; ``[R]``."""
        values: list[Any] = self._table[column].to_pylist()
        return values

    def lists(self, column: str) -> list[np.ndarray]:
        """A list of each row (``input_ids``, ``response_positions``, ``end_of_turn``), which must not be written to."""
        return lists_of(self._table[column])

    def feature(self, kind: str, set: str = "custom") -> Any:
        """What was filed of each row of a set; of the custom set in the order of ``row_ids``.

        Args:
            kind: ``text`` (what the row says, as a list of strings), ``embedding`` (Shape ``[R, D]`` float32) or
                ``selector`` (Shape ``[R]`` float32).
            set: name of the set.

        Raises:
            StoreError: it was never filed, or not for the rows of this store.
        """
        file = self.path / f"feature_{kind}" / f"{set}.arrow"
        if not file.is_file():
            raise StoreError(f"{self.path}: no {kind} of the {set} set here: score with this selection first")
        table = self._read(file)
        if set == "custom" and not np.array_equal(table["row_id"].to_numpy(), self.row_ids):
            raise StoreError(f"{file}: not of the rows that it should be: delete it and score again")
        values = table["value"]
        if pa.types.is_string(values.type):
            return values.to_pylist()
        if pa.types.is_list(values.type):
            return pc.list_flatten(values).to_numpy().reshape(len(values), -1)
        return values.to_numpy()

    def rows_of_feature(self, kind: str, set: str) -> str:
        """Identifies the rows that a feature is of, as ``RowSet.tokens_digest`` does."""
        facts = self._read(self.path / f"feature_{kind}" / f"{set}.arrow").schema.metadata or {}
        return str(facts.get(b"made_from", b"").decode()).partition(" ")[0]

    def held_out(self, set: str) -> "TokenScores":
        """What the same adapters said about a held-out set, of the same round.

        Raises:
            StoreError: it was not scored, or by other adapters or another base than the custom set; or its store is
                damaged.
        """
        if not (self.path / set / MANIFEST).is_file():
            raise StoreError(f"{self.path}: no scores of the {set} set here: score with this selection first")
        found = TokenScores(self.path / set, self.round)
        ours, theirs = ({**one.adapters, **one.fingerprints} for one in (self, found))
        if other := sorted(part for part in {*ours} & {*theirs} - OF_ROWS if ours[part] != theirs[part]):
            raise StoreError(
                f"{found.path}: scored with another {', '.join(other)} than the custom set: score with this selection"
                " again"
            )
        return found

    def missing(
        self, columns: Iterable[str], features: Mapping[str, Iterable[str]], held_out: Iterable[str] = ()
    ) -> list[str]:
        """What a selection reads and is not here, in words.

        Args:
            columns: names of token losses: ``base``, ``utility``, ``degraded``.
            features: kind of row feature -> sets.
            held_out: sets whose token losses are read beside the custom set's.
        """
        losses = [degraded_column(self.round) if name == "degraded" else name for name in columns]
        stores = {"": self.path, **{f" of the {name} set": self.path / name for name in held_out}}
        wanted_losses = {f"{name} losses{of}": path / f"loss_{name}" for name in losses for of, path in stores.items()}
        lost = [name for name, folder in wanted_losses.items() if not (folder / COLUMN).is_file()]
        wanted = [(kind, name) for kind, names in features.items() for name in names]
        files = {f"{kind} of the {name} set": self.path / f"feature_{kind}" / f"{name}.arrow" for kind, name in wanted}
        return lost + [name for name, file in files.items() if not file.is_file()]

    def score(self, utility_weight: float = 1.0, degraded_weight: float = 1.0) -> np.ndarray:
        """Token scores ``utility_weight * L^u - degraded_weight * L^h``; higher is riskier; ``[tokens]`` float32.

        With weights of 1, Eq. 2 of arXiv 2603.01185.

        Raises:
            StoreError: a score is not a number, or infinite.
        """
        return self.combine({"loss_utility": utility_weight, "loss_degraded": -degraded_weight})

    def combine(self, weights: Mapping[str, float]) -> np.ndarray:
        """The sum of columns of token losses, each times its weight; ``[tokens]`` float32.

        A column of weight 0 is not read.

        Args:
            weights: name of a column -> what it is multiplied by.

        Raises:
            StoreError: a sum is not a number, or infinite.
        """
        columns = {name: self.flat(name) for name, weight in weights.items() if weight}
        score = np.zeros(int(self.offsets[-1]), dtype=np.float32)
        for name, values in columns.items():
            score += np.float32(weights[name]) * values
        if wrong := int((~np.isfinite(score)).sum()):
            lost = {name: int((~np.isfinite(values)).sum()) for name, values in columns.items()}
            told = ", ".join(f"{count} of {name}" for name, count in lost.items() if count)
            raise StoreError(
                f"{self.path}: {wrong} token scores are not a number: score the custom set again with adapters and a"
                f" model.base.dtype whose token losses are finite (not so: {told or 'their weights are too large'})"
            )
        return score

    def hashes(self) -> dict[int, str]:
        """Row id -> hash of the row's ids and response positions."""
        return dict(zip(self.row_ids.tolist(), self.values("ids_hash"), strict=True))

    def per_row(self, flat: np.ndarray) -> list[np.ndarray]:
        """Cuts a flat column into one array per row."""
        return np.split(flat, self.offsets[1:-1])

    def check(self, hashes: Mapping[int, str]) -> None:
        """Compares each row's hash with the data's.

        Raises:
            StoreError: a row is missing, or has other tokens than it had when it was scored.
        """
        ours = self.hashes()
        for row_id in sorted({*ours, *hashes}):
            if ours.get(row_id) != hashes.get(row_id):
                raise StoreError(
                    f"{self.path}: row {row_id} is not the one that was scored: these scores belong to other data,"
                    " another tokenizer or another chat template: score again"
                )

    def _loss(self, name: str) -> np.ndarray:
        if name not in self._losses:
            chunks = [self._read(file) for file in sorted((self.path / name).glob("*.arrow"))]
            if not chunks:
                raise StoreError(f"{self.path}: no column {name} here: score with this reference first")
            table = pa.concat_tables(chunks)
            row_ids, rows = table["row_id"].to_numpy(), lists_of(table["loss"])
            order = np.argsort(row_ids, kind="stable")
            same_rows = np.array_equal(row_ids[order], self.row_ids)
            rows = [rows[at] for at in order.tolist()]
            if not same_rows or not np.array_equal([len(row) for row in rows], np.diff(self.offsets)):
                raise StoreError(f"{self.path / name}: not the rows that it should hold: delete it and score again")
            values = np.concatenate(rows)
            values.flags.writeable = False  # whoever asks is given this very array
            self._losses[name] = values
        return self._losses[name]

    def _read(self, file: Path) -> pa.Table:
        try:
            return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{file}: the store is damaged ({error}): delete it and score again") from error
