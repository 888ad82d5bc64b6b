"""Numbers about scores and masks: how scores are distributed, what they know of labels, where in a reply they lie."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toss_lightning.report.tokens import HARMFUL, RiskScore, one_line, row_means
from toss_lightning.scores import TokenScores, share_of
from toss_lightning.selection import TokenWeights

GROUPS = 3
"""How many labels a picture tells apart."""
FEW = 8
"""Tokens below which a mean says nothing."""
UNLABELLED = "no label"


@dataclass(frozen=True)
class Group:
    """Rows of one label."""

    name: str
    tokens: np.ndarray
    """Shape ``[tokens]`` bool."""


def groups_of(scores: TokenScores) -> list[Group]:
    """Rows by their labels, harmful ones first, then those with most tokens; all in one where none has a label."""
    labels, lengths = scores.values("label"), np.diff(scores.offsets)
    counts: Counter[str] = Counter()
    for label, length in zip(labels, lengths.tolist(), strict=True):
        if label is not None:
            counts[label] += length
    if not counts:
        return [Group("all rows", np.ones(int(scores.offsets[-1]), dtype=bool))]
    ranked = sorted(counts, key=lambda label: (label != HARMFUL, -counts[label], label))
    rest = ranked[GROUPS - 1 :] if len(ranked) > GROUPS else []
    called = {label: f"({len(rest)} more)" if label in rest else label for label in ranked}
    of_rows = [UNLABELLED if label is None else called[label] for label in labels]
    names = dict.fromkeys([*called.values(), *of_rows])
    return [Group(one_line(name), np.repeat([one == name for one in of_rows], lengths)) for name in names]


@dataclass(frozen=True)
class Knowledge:
    """How well scores tell rows labelled harmful from others with a label; every token counts as its row."""

    tokens: float
    """AUROC of token scores."""
    rows: float
    """AUROC of the rows' mean scores."""


def knowledge(scores: TokenScores, score: RiskScore) -> Knowledge | None:
    """What the scores know of the label ``harmful``; None where not both kinds of rows have labels."""
    labels = np.array(scores.values("label"), dtype=object)
    known, harmful = labels != np.array(None), labels == HARMFUL
    if not harmful.any() or harmful[known].all():
        return None
    lengths, means = np.diff(scores.offsets), row_means(scores, score.values)
    of_tokens = np.repeat(known, lengths)
    return Knowledge(
        auroc(score.values[of_tokens], np.repeat(harmful, lengths)[of_tokens]), auroc(means[known], harmful[known])
    )


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive one has a higher value than a negative one; equal ones count half.

    Args:
        values: Shape ``[N]``.
        positive: Shape ``[N]`` bool, some true and some false.
    """
    ours, theirs = np.sort(values[positive]), np.sort(values[~positive])
    below, not_above = (np.searchsorted(theirs, ours, side).sum(dtype=np.float64) for side in ("left", "right"))
    return float((below + not_above) / 2 / (len(ours) * len(theirs)))


def histogram(score: RiskScore, groups: Sequence[Group], bins: int = 48) -> tuple[np.ndarray, list[np.ndarray]]:
    """Shares of each group's tokens by score; the outermost bins hold what lies beyond them.

    Returns:
        Edges, Shape ``[bins + 1]``, and Shape ``[bins]`` for each group.
    """
    values = score.values.astype(np.float64)  # as edges are, beyond which rounding would push what is clipped
    low, high = np.quantile(values, [0.005, 0.995]).tolist()
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    edges = np.linspace(low, high, bins + 1)
    clipped = np.clip(values, low, high)
    return edges, [np.histogram(clipped[one.tokens], edges)[0] / one.tokens.sum() for one in groups]


def found_by_share(score: RiskScore, groups: Sequence[Group], shares: Sequence[float]) -> list[list[float]]:
    """Of each group, the share of its tokens that a mask of the riskiest ``share`` of all would take, for ``shares``.

    Tokens whose score equals that of the last one are counted in.
    """
    ranked = np.sort(score.values)
    cuts = [ranked[len(ranked) - count] if (count := share_of(share, len(ranked))) else np.inf for share in shares]
    return [[float((score.values[one.tokens] >= cut).mean()) for cut in cuts] for one in groups]


def by_place(scores: TokenScores, values: np.ndarray, groups: Sequence[Group], most: int = 40) -> list[list[float]]:
    """Means of ``values`` ``[tokens]`` at the first, second, ... response token, for each group.

    As far as a group has :data:`FEW` tokens at a place, and ``most`` places at most.
    """
    lengths = np.diff(scores.offsets)
    place = np.arange(scores.offsets[-1]) - np.repeat(scores.offsets[:-1], lengths)
    means = []
    for one in groups:
        inside = one.tokens & (place < most)
        counts = np.bincount(place[inside], minlength=most)
        sums = np.bincount(place[inside], values[inside].astype(np.float64), minlength=most)
        enough = int(np.argmax(counts < FEW)) if (counts < FEW).any() else most
        means.append((sums[:enough] / counts[:enough]).tolist())
    return means


def masked_tokens(scores: TokenScores, weights: TokenWeights, count: int) -> list[tuple[int, int, int]]:
    """The token ids that are masked most often: id, how often it is, and how often it occurs in responses."""
    ids = np.concatenate(
        [row[at] for row, at in zip(scores.lists("input_ids"), scores.lists("response_positions"), strict=True)]
    )
    every = np.bincount(ids)
    masked = np.bincount(ids[weights.flat() == 0], minlength=len(every))
    ranked = np.argsort(-masked, kind="stable")[:count].tolist()
    return [(token, int(masked[token]), int(every[token])) for token in ranked if masked[token]]
