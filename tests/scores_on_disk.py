"""Small stores with given losses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toss_lightning.data.tokenize import ids_hash
from toss_lightning.scores import TokenScores
from toss_lightning.scores.store import ScoreWriter, write_manifest


def make_scores(
    path: Path,
    utility: Sequence[Sequence[float]],
    degraded: Sequence[Sequence[float]] | None = None,
    labels: Sequence[str] | None = None,
    protect: bool = True,
) -> TokenScores:
    """A store with these token losses; degraded losses are 0 by default, and the last token of each row ends a turn."""
    path.mkdir()
    with ScoreWriter(path) as writer:
        for row_id, losses in enumerate(utility):
            size = len(losses)
            ids, positions = np.arange(size + 2, dtype=np.int32), np.arange(2, size + 2, dtype=np.int32)
            row = {
                "row_id": row_id,
                "input_ids": ids,
                "response_positions": positions,
                "end_of_turn": (np.arange(size) == size - 1) & protect,
                "ids_hash": ids_hash(ids + row_id, positions),
                "label": labels[row_id] if labels else None,
                "source": "made",
                "loss_utility": np.asarray(losses, dtype=np.float32),
                "loss_degraded": np.asarray(degraded[row_id] if degraded else np.zeros(size), dtype=np.float32),
            }
            writer.append({name: [value] for name, value in row.items()})
    write_manifest(path, {}, len(utility), sum(map(len, utility)))
    return TokenScores(path)
