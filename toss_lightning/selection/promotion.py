"""Which rows of the custom set a round of TOSS-Pro promotes into the harmful set (Algorithm 1 of arXiv 2603.01185)."""

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.scores.store import TokenScores

Promotion = Literal["top_tokens", "row_mean", "random"]


def promote(
    scores: TokenScores,
    count: int,
    how: Promotion = "top_tokens",
    taken: Collection[int] = (),
    seed: int | Sequence[int] = 0,
) -> list[int]:
    """Chooses ``count`` rows.

    Args:
        scores: the store, in the round that was scored last.
        count: rows to promote.
        how: ``top_tokens`` walks down the ranked tokens and takes each token's row unless it was taken (the paper);
            ``row_mean`` takes the rows of the highest mean score; ``random`` any rows (the paper's ablation).
        taken: row ids that are not to be taken.
        seed: fixes what ``random`` draws.

    Returns:
        Row ids, the first one taken first. Ties go to the earliest (row, position).

    Raises:
        ConfigError: fewer than ``count`` rows are left.
    """
    free = np.flatnonzero(~np.isin(scores.row_ids, list(taken)))
    if count > len(free):
        raise ConfigError(
            f"loop.promote: {count} rows are to be promoted, but only {len(free)} of the custom set's"
            f" {len(scores.row_ids)} rows are left: lower loop.promote or loop.rounds"
        )
    if how == "random":
        order = np.random.default_rng(seed).permutation(len(free))
    else:
        starts = scores.offsets[:-1]
        score = scores.score().astype(np.float64)
        # a row's place on the walk is that of its highest token
        value = np.maximum.reduceat(score, starts) if how == "top_tokens" else np.add.reduceat(score, starts)
        if how == "row_mean":
            value = value / np.diff(scores.offsets)
        order = np.argsort(-value[free], kind="stable")
    chosen: list[int] = scores.row_ids[free[order[:count]]].tolist()
    return chosen
