"""What each response token of the custom set counts, in memory and on disk."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from toss_lightning.errors import StoreError
from toss_lightning.files import new_directory
from toss_lightning.scores.store import lists_of

WEIGHTS_FILE, REPORT_FILE = "weights.arrow", "selection.json"
OF_ROWS = {"row_id": (int, "a whole number"), "ids_hash": (str, "a text"), "left_out": (int | None, "true or false")}
"""Columns that say something of a row, and what; all others are of its tokens."""
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """What each response token counts: in the task loss (0 is masked), and in the KL that holds it to the base.

    Attributes:
        weights: row id -> Shape ``[N]`` float32, N response tokens of the row.
        hashes: row id -> hash of the tokens that the weights belong to.
        report: counts for people.
        made_from: what those tokens depend on: tokenizer, template, dataset, limits.
        anchor: row id -> Shape ``[N]`` float32, weight of ``KL(p_base || p_target)``; empty where it is 0 everywhere.
        columns: name -> row id -> Shape ``[N]`` float32: what an
            :class:`~toss_lightning.selection.base.OnlineSelection` reads during training.
        left_out: ids of rows, all of weight 0, that are not even in a batch, as if they were not in the dataset.
    """

    weights: dict[int, np.ndarray]
    hashes: dict[int, str]
    report: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)
    anchor: dict[int, np.ndarray] = field(default_factory=dict)
    columns: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()

    def save(self, path: Path) -> None:
        """Writes ``weights.arrow`` and ``selection.json`` into the directory ``path``.

        Raises:
            StoreError: it cannot be written; what was there before still is.
        """
        table = pa.table(
            {
                "row_id": pa.array(list(self.weights), pa.int64()),
                "ids_hash": pa.array([self.hashes[row_id] for row_id in self.weights], pa.string()),
                "left_out": pa.array([row_id in self.left_out for row_id in self.weights], pa.bool_()),
                **{
                    name: pa.array([values[row_id] for row_id in self.weights], pa.list_(pa.float32()))
                    for name, values in self.values().items()
                },
            }
        )
        with new_directory(path) as directory:
            with pa.OSFile(str(directory / WEIGHTS_FILE), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
                file.write_table(table)
            content = {**self.report, "made_from": self.made_from}
            (directory / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TokenWeights":
        """Reads what :meth:`save` wrote.

        Raises:
            StoreError: nothing readable is there, or a column does not hold what it should.
        """
        file, report_file = path / WEIGHTS_FILE, path / REPORT_FILE
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        except (OSError, ValueError) as error:
            raise StoreError(_not_to_be_had(file, error)) from error
        try:
            report = json.loads(report_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(_not_to_be_had(report_file, error)) from error
        if not isinstance(report, dict) or not isinstance(report.get("made_from", {}), dict):
            raise StoreError(f"{report_file}: not the report of a selection: run the select stage again")
        if missing := [name for name in ("row_id", "ids_hash", "weight") if name not in table.column_names]:
            raise StoreError(f"{file}: no column {missing[0]}: run the select stage again")
        columns = {name: table[name] for name in table.column_names if name not in OF_ROWS}
        for name, column in columns.items():
            if not _is_of_tokens(column.type):
                raise StoreError(f"{file}: {name} holds no list of numbers for each row: leave it out")
        of_rows = {name: table[name].to_pylist() for name in OF_ROWS if name in table.column_names}
        for name, values in of_rows.items():
            kind, said = OF_ROWS[name]
            if not all(isinstance(value, kind) for value in values):
                raise StoreError(f"{file}: {name} does not hold {said} for each row: run the select stage again")
        row_ids = of_rows["row_id"]
        per_token = {
            name: {row_id: values.astype(np.float32) for row_id, values in zip(row_ids, lists_of(column), strict=True)}
            for name, column in columns.items()
        }
        hashes = dict(zip(row_ids, of_rows["ids_hash"], strict=True))
        made_from = report.pop("made_from", {})
        weights, anchor = per_token.pop("weight"), per_token.pop("anchor", {})
        # files that other programs write need not say it
        flags = of_rows.get("left_out", [False] * len(row_ids))
        left_out = frozenset(row_id for row_id, is_left_out in zip(row_ids, flags, strict=True) if is_left_out)
        return cls(weights, hashes, report, made_from, anchor, per_token, left_out)

    def flat(self) -> np.ndarray:
        """All weights, rows one after the other as scores are; ``[tokens]`` float32."""
        return np.concatenate([self.weights[row_id] for row_id in sorted(self.weights)])

    def values(self) -> dict[str, dict[int, np.ndarray]]:
        """Everything that training reads of a token: name -> row id -> ``[N]``."""
        return {"weight": self.weights, **({"anchor": self.anchor} if self.anchor else {}), **self.columns}

    def digest(self) -> str:
        """Identifies the weights."""
        digest = hashlib.blake2b(digest_size=12)
        for row_id in sorted(self.weights):
            digest.update(f"{row_id}:{self.hashes[row_id]}:{row_id in self.left_out};".encode())
            for name, values in sorted(self.values().items()):
                digest.update(name.encode())
                digest.update(values[row_id].tobytes())
        return digest.hexdigest()

    def check(
        self,
        hashes: Mapping[int, str],
        where: Path,
        made_from: Mapping[str, str] | None = None,
        tokens: Mapping[int, int] | None = None,
    ) -> None:
        """Compares with the rows that are about to be trained on. The base may be another; the tokens may not.

        Args:
            hashes: row id -> hash of the row's tokens.
            where: what a message names as the place of this selection.
            made_from: what the rows' tokens depend on, so that a message can say what differs.
            tokens: row id -> how many response tokens it has, for files that other programs write.

        Raises:
            StoreError: the weights belong to other rows, or to other tokens of them; a row has not one for each token,
                or one that cannot be used; or they are all 0, and so is every anchor.
        """
        for row_id in sorted({*hashes, *self.hashes}):
            if hashes.get(row_id) != self.hashes.get(row_id):
                parts = [name for name, value in (made_from or {}).items() if self.made_from.get(name) != value]
                other = [name for name in parts if name != "tokens"] if self.made_from else []
                raise StoreError(
                    f"{where}: row {row_id} has other tokens than the row that was selected from"
                    + (f" (another {', '.join(other)})" if other else "")
                    + ": use the same data, tokenizer, template and limits, or score and select again"
                )
        for name, values in self.values().items():
            for row_id, of_row in values.items():
                if tokens is not None and len(of_row) != tokens[row_id]:
                    raise StoreError(
                        f"{where}: row {row_id}: {len(of_row)} values of {name} for {tokens[row_id]} response tokens:"
                        " give one for each"
                    )
                if name in ("weight", "anchor") and not np.isfinite(of_row).all():
                    raise StoreError(f"{where}: row {row_id}: a {name} is not a finite number: give one for each token")
        if not self.anchor and not any(values.any() for values in self.weights.values()):
            raise StoreError(
                f"{where}: this selection gives every token the weight 0, which leaves no token to train on: select"
                " again with a loop.selection that keeps some"
            )


def _not_to_be_had(file: Path, error: Exception) -> str:
    return f"{file.parent}: no selection to be had ({file.name}: {error}): run the select stage again"


def _is_of_tokens(kind: pa.DataType) -> bool:
    """A column holds a list of numbers for each row."""
    inside = getattr(kind, "value_type", None) if pa.types.is_nested(kind) else None
    return inside is not None and any(is_kind(inside) for is_kind in NUMBERS)
