"""Small stores with given losses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toss_lightning.data.tokenize import ids_hash
from toss_lightning.scores import ScoreWriter, TokenScores, degraded_column


def make_scores(
    path: Path,
    utility: Sequence[Sequence[float]],
    degraded: Sequence[Sequence[float]] | None = None,
    labels: Sequence[str] | None = None,
    protect: bool = True,
    later_rounds: Sequence[Sequence[Sequence[float]]] = (),
) -> TokenScores:
    """A store with these token losses; degraded losses are 0 by default, and the last token of each row ends a turn."""
    rows = []
    for row_id, losses in enumerate(utility):
        size = len(losses)
        ids, positions = np.arange(size + 2, dtype=np.int32), np.arange(2, size + 2, dtype=np.int32)
        rows.append(
            {
                "row_id": row_id,
                "input_ids": ids,
                "response_positions": positions,
                "end_of_turn": (np.arange(size) == size - 1) & protect,
                "ids_hash": ids_hash(ids + row_id, positions),
                "label": labels[row_id] if labels else None,
                "source": "made",
            }
        )
    writer = ScoreWriter(path, {})
    writer.begin(rows)
    zeros = [[0.0] * len(losses) for losses in utility]
    columns = {"utility": utility, "degraded": degraded or zeros}
    columns |= {degraded_column(round): losses for round, losses in enumerate(later_rounds, start=1)}
    for name, column in columns.items():
        writer.begin_column(name, f"digest of {name}", "plan")
        for chunk, at in enumerate(range(0, len(column), 2)):
            part = {row_id: np.array(column[row_id], dtype=np.float32) for row_id in range(len(column))[at : at + 2]}
            writer.append(name, chunk, part)
        writer.end_column(name)
    writer.finish_round(len(later_rounds))
    return TokenScores(path)


def add_base(scores: TokenScores, losses: Sequence[Sequence[float]]) -> TokenScores:
    """Files these token losses of the base, one sequence per row, and opens the store again."""
    writer = ScoreWriter(scores.path, scores.fingerprints)
    writer.begin_column("base", "digest of base", "plan")
    writer.append("base", 0, {row: np.array(values, dtype=np.float32) for row, values in enumerate(losses)})
    writer.end_column("base")
    return TokenScores(scores.path)
