"""What every selection gives: a weight for each response token of the custom set."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from toss_lightning.errors import StoreError
from toss_lightning.files import new_directory
from toss_lightning.scores.store import TokenScores

WEIGHTS_FILE, REPORT_FILE = "weights.arrow", "selection.json"


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """How much each response token counts in the task loss; 0 is masked.

    Attributes:
        weights: row id -> Shape ``[N]`` float32, N response tokens of the row.
        report: counts for people.
        hashes: row id -> hash of the tokens that the weights belong to.
        made_from: what those tokens depend on: tokenizer, template, dataset, limits.
    """

    weights: dict[int, np.ndarray]
    hashes: dict[int, str]
    report: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes ``weights.arrow`` and ``selection.json`` into the directory ``path``.

        Raises:
            StoreError: it cannot be written; what was there before still is.
        """
        table = pa.table(
            {
                "row_id": pa.array(list(self.weights), pa.int64()),
                "weight": pa.array(list(self.weights.values()), pa.list_(pa.float32())),
                "ids_hash": pa.array([self.hashes[row_id] for row_id in self.weights], pa.string()),
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
            StoreError: nothing readable is there.
        """
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path / WEIGHTS_FILE))).read_all()
            report = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: no selection to be had ({error}): run the select stage again") from error
        row_ids = table["row_id"].to_pylist()
        weights = [np.array(weight.as_py(), dtype=np.float32) for weight in table["weight"]]
        hashes = table["ids_hash"].to_pylist()
        made_from = report.pop("made_from", {})
        return cls(dict(zip(row_ids, weights, strict=True)), dict(zip(row_ids, hashes, strict=True)), report, made_from)

    def flat(self) -> np.ndarray:
        """All weights, rows one after the other as in :class:`TokenScores`; ``[tokens]`` float32."""
        return np.concatenate([self.weights[row_id] for row_id in sorted(self.weights)])

    def digest(self) -> str:
        """Identifies the weights."""
        digest = hashlib.blake2b(digest_size=12)
        for row_id in sorted(self.weights):
            digest.update(f"{row_id}:{self.hashes[row_id]};".encode())
            digest.update(self.weights[row_id].tobytes())
        return digest.hexdigest()

    def check(self, hashes: Mapping[int, str], where: Path, made_from: Mapping[str, str] | None = None) -> None:
        """Compares with the rows that are about to be trained on. The base may be another; the tokens may not.

        Args:
            hashes: row id -> hash of the row's tokens.
            where: what a message names as the place of this selection.
            made_from: what the rows' tokens depend on, so that a message can say what differs.

        Raises:
            StoreError: the weights belong to other rows, or to other tokens of them.
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


class Selection(ABC):
    """A rule from scores to token weights."""

    @abstractmethod
    def select(self, scores: TokenScores) -> TokenWeights:
        """Weighs every response token of the custom set."""


def mask_weights(scores: TokenScores, masked: np.ndarray, **facts: Any) -> TokenWeights:
    """Weight 0 where ``masked`` ``[tokens]`` is true and 1 elsewhere, with a report of what that does.

    Args:
        scores: the store that was selected from.
        masked: Shape ``[tokens]`` bool.
        **facts: what else the report should say.
    """
    rows = scores.per_row(masked)
    weights = {row_id: (~row).astype(np.float32) for row_id, row in zip(scores.row_ids.tolist(), rows, strict=True)}
    report = {
        "tokens": len(masked),
        "masked": int(masked.sum()),
        "kept": int((~masked).sum()),
        "rows": len(rows),
        "rows_fully_masked": sum(bool(row.all()) for row in rows),
        "round": scores.round,
        **facts,
        "masked_share_per_source": _shares(scores.values("source"), rows),
        "masked_share_per_label": _shares(scores.values("label"), rows),
    }
    hashes = dict(zip(scores.row_ids.tolist(), scores.values("ids_hash"), strict=True))
    return TokenWeights(weights, hashes, report, dict(scores.fingerprints))


def _shares(names: list[str | None], rows: list[np.ndarray]) -> dict[str, dict[str, float]]:
    tokens: dict[str, int] = defaultdict(int)
    masked: dict[str, int] = defaultdict(int)
    for name, row in zip(names, rows, strict=True):
        if name is not None:
            tokens[name] += len(row)
            masked[name] += int(row.sum())
    total = sum(masked.values())
    return {
        name: {
            "tokens": tokens[name],
            "masked": masked[name],
            "share_of_its_tokens_masked": masked[name] / tokens[name] if tokens[name] else 0.0,
            "share_of_masked_tokens": masked[name] / total if total else 0.0,
        }
        for name in sorted(tokens)
    }
