"""Numbers about scores and masks: how scores lie, what they know of labels, and where in a reply the mask falls."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toss_lightning.report.tokens import HARMFUL, RiskScore
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

GROUPS = 3
"""How many labels a picture tells apart."""
FEW = 8
"""Tokens below which a mean says nothing."""
REST = "others"


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
    named = ranked if len(ranked) <= GROUPS else ranked[: GROUPS - 1]
    of_rows = [label if label in named else REST for label in labels]
    return [
        Group(name, np.repeat([one == name for one in of_rows], lengths)) for name in dict.fromkeys([*named, *of_rows])
    ]


@dataclass(frozen=True)
class Knowledge:
    """How well scores tell rows labelled harmful from the others, whose every token takes its row's label."""

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
    lengths = np.diff(scores.offsets)
    means = np.add.reduceat(score.values.astype(np.float64), scores.offsets[:-1]) / lengths
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
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ours, theirs = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - ours * (ours + 1) / 2) / (ours * theirs))


def histogram(score: RiskScore, groups: Sequence[Group], bins: int = 48) -> tuple[np.ndarray, list[np.ndarray]]:
    """Shares of each group's tokens by score; the outermost bins hold what lies beyond them.

    Returns:
        Edges, Shape ``[bins + 1]``, and Shape ``[bins]`` for each group.
    """
    low, high = np.quantile(score.values, [0.005, 0.995]).tolist()
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    edges = np.linspace(low, high, bins + 1)
    clipped = np.clip(score.values, low, high)
    return edges, [np.histogram(clipped[one.tokens], edges)[0] / one.tokens.sum() for one in groups]


def found_by_share(score: RiskScore, groups: Sequence[Group], shares: Sequence[float]) -> list[list[float]]:
    """Of each group, the share of its tokens among the riskiest ``share`` of all tokens, for each of ``shares``."""
    order = np.argsort(-score.values, kind="stable")
    cuts = [int(share * len(order)) for share in shares]
    found = []
    for one in groups:
        among = np.concatenate([[0], np.cumsum(one.tokens[order])])
        found.append([float(among[cut] / one.tokens.sum()) for cut in cuts])
    return found


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
    known, place = np.unique(ids, return_inverse=True)
    masked = np.bincount(place[weights.flat() == 0], minlength=len(known))
    every = np.bincount(place, minlength=len(known))
    ranked = np.argsort(-masked, kind="stable")[:count].tolist()
    return [(int(known[at]), int(masked[at]), int(every[at])) for at in ranked if masked[at]]
