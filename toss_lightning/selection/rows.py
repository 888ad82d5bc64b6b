"""Selections that keep or leave out whole rows: random ones, and TOSS on the level of rows."""

from collections import Counter
from typing import Any, Literal, get_args

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.seeds import global_seed
from toss_lightning.selection.base import Selection, names_of, row_weights
from toss_lightning.selection.checks import (
    SAME_REFERENCES,
    check_discard,
    check_one_of,
    check_score_weights,
    check_told_apart,
)
from toss_lightning.selection.weights import TokenWeights

RowScore = Literal["mean", "max", "top_share"]


class RandomRows(Selection):
    """Leaves out ``floor(discard * R)`` of the custom set's R rows at random: a baseline of arXiv 2603.01185.

    Args:
        discard: share of the rows that get weight 0, in [0, 1).
        seed: fixes which; ``seed_everything`` by default.

    Raises:
        ConfigError: ``discard`` is outside [0, 1).
    """

    columns = ()

    def __init__(self, discard: float = 0.2, seed: int | None = None) -> None:
        check_discard(discard)
        self.discard, self.seed = discard, seed

    def select(self, scores: TokenScores) -> TokenWeights:
        """Draws the rows."""
        rows, seed = len(scores.row_ids), seed_of(self)
        kept = np.ones(rows, dtype=bool)
        kept[np.random.default_rng(seed).choice(rows, share_of(self.discard, rows), replace=False)] = False
        return keep_rows(scores, kept, discard=self.discard, seed=seed)


class TossRows(Selection):
    """Leaves out the ``floor(discard * R)`` riskiest of R rows: the ablation of arXiv 2603.01185 that masks no tokens.

    A row's score is made of its token scores ``utility_weight * L^u - degraded_weight * L^h``, its end-of-turn tokens
    included. Ties go to the earliest row.

    Args:
        discard: share of the rows that get weight 0, in [0, 1).
        by: a row's score is the ``mean`` of its token scores, their ``max``, or the mean of the highest ``top_share``.
        top_share: for ``by: top_share``: that share of the row's tokens, rounded down, but at least one token.
        utility_weight: weight of the utility loss in the score; the paper uses 1.
        degraded_weight: weight of the degraded loss in the score; the paper uses 1.

    Raises:
        ConfigError: ``discard`` is outside [0, 1), ``top_share`` is outside (0, 1], there is no such ``by``, or the
            weights of the losses are not finite or both 0.
    """

    def __init__(
        self,
        discard: float = 0.1,
        by: RowScore = "mean",
        top_share: float = 0.1,
        utility_weight: float = 1.0,
        degraded_weight: float = 1.0,
    ) -> None:
        check_discard(discard)
        check_one_of("by", by, get_args(RowScore))
        if not 0 < top_share <= 1:
            raise ConfigError(f"loop.selection.top_share: {top_share} is not a share: give a number in (0, 1]")
        check_score_weights(utility_weight, degraded_weight)
        self.discard, self.by, self.top_share = discard, by, top_share
        self.utility_weight, self.degraded_weight = utility_weight, degraded_weight

    def select(self, scores: TokenScores) -> TokenWeights:
        """Leaves out the riskiest rows.

        Raises:
            StoreError: a score is not a number, or all rows have the same.
        """
        score = self._row_scores(scores)
        count = share_of(self.discard, len(score))
        check_told_apart(score, count, scores.path, "rows", SAME_REFERENCES)
        left_out = exact_top(score, count)
        threshold = float(score[left_out].min()) if left_out.any() else None
        return keep_rows(scores, ~left_out, discard=self.discard, by=self.by, threshold=threshold)

    def _row_scores(self, scores: TokenScores) -> np.ndarray:
        flat = scores.score(self.utility_weight, self.degraded_weight).astype(np.float64)
        starts, lengths = scores.offsets[:-1], np.diff(scores.offsets)
        if self.by == "mean":
            means: np.ndarray = np.add.reduceat(flat, starts) / lengths
            return means
        if self.by == "max":
            highest: np.ndarray = np.maximum.reduceat(flat, starts)
            return highest
        tops = [np.sort(row)[-max(1, share_of(self.top_share, len(row))) :] for row in scores.per_row(flat)]
        return np.array([top.mean() for top in tops])


def keep_rows(scores: TokenScores, kept: np.ndarray, weights: np.ndarray | None = None, **facts: Any) -> TokenWeights:
    """Leaves out the rows that are not kept, with a report that counts rows too.

    Args:
        scores: the store that was selected from.
        kept: Shape ``[R]`` bool.
        weights: Shape ``[R]``, not 0 where kept: what the kept rows count; 1 by default.
        **facts: what else the report should say.
    """
    of_rows = kept.astype(np.float32) if weights is None else np.where(kept, weights, 0.0)
    labels = zip(names_of(scores, "label"), kept.tolist(), strict=True)
    left_out = Counter(label for label, is_kept in labels if label is not None and not is_kept)
    counts = {"rows_kept": int(kept.sum()), "rows_left_out_per_label": dict(sorted(left_out.items()))}
    return row_weights(scores, of_rows, **counts, **facts)


def seed_of(selection: Any) -> int:
    """The seed that a selection was given, or else the run's."""
    return global_seed() if selection.seed is None else int(selection.seed)
