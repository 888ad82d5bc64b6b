"""What the rounds of TOSS-Pro did: which rows were promoted, and how the mask moved from round to round."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.files import write_json
from toss_lightning.scores import TokenScores, share_of
from toss_lightning.selection import Selection


def promoted_count(promote: int | float, harmful_rows: int) -> int:
    """Rows that a round promotes: a whole number as it is, a share of the harmful set rounded down.

    Raises:
        ConfigError: it is not at least one row.
    """
    count = 0
    if not isinstance(promote, bool) and math.isfinite(promote):
        count = promote if isinstance(promote, int) else share_of(promote, harmful_rows)
    if count < 1:
        raise ConfigError(
            f"loop.promote: {promote} of a harmful set of {harmful_rows} rows promotes none: give a whole number of at"
            " least 1, or a share of the harmful set such as 0.5"
        )
    return count


def check_rounds(rounds: int, count: int, again: bool, custom_rows: int) -> None:
    """Checks that there are as many rows as all rounds will promote.

    Raises:
        ConfigError: there are not.
    """
    needed = count if again else rounds * count
    if needed > custom_rows:
        raise ConfigError(
            f"loop.promote: {count} rows a round, {needed} in all, are more than the custom set's {custom_rows} rows:"
            " lower loop.promote or loop.rounds"
        )


def describe_promoted(scores: TokenScores, chosen: Sequence[int], round: int, path: Path) -> dict[str, Any]:
    """Writes the promoted rows to ``path`` for people to look at; returns the counts.

    Args:
        scores: the store that they were chosen from.
        chosen: row ids.
        round: the round that they are promoted for.
        path: a JSON file.
    """
    labels, sources = scores.values("label"), scores.values("source")
    score, places = scores.per_row(scores.score()), {row_id: at for at, row_id in enumerate(scores.row_ids.tolist())}
    rows = [
        {
            "row_id": row_id,
            "label": labels[places[row_id]],
            "source": sources[places[row_id]],
            "highest_score": float(score[places[row_id]].max()),
            "mean_score": float(score[places[row_id]].mean()),
        }
        for row_id in chosen
    ]
    write_json(path, {"round": round, "rows": rows})
    known = Counter(row["label"] for row in rows if row["label"] is not None)
    return {"promoted": len(rows), "promoted_per_label": dict(sorted(known.items()))}


def compare_rounds(selection: Selection, store: Path, round: int) -> dict[str, Any]:
    """What the selection would mask by this round's scores, and how much of that the round before would have masked.

    Returns:
        ``masked``, ``threshold`` where the selection reports one, and from round 1 on ``jaccard``: the masks' overlap.
    """
    ours = selection.select(TokenScores(store, round))
    facts = {"masked": ours.report.get("masked"), "threshold": ours.report.get("threshold")}
    if round:
        one, two = ours.flat() == 0, selection.select(TokenScores(store, round - 1)).flat() == 0
        either = int(np.count_nonzero(one | two))
        facts["jaccard"] = float(np.count_nonzero(one & two) / either) if either else 1.0
    return facts
