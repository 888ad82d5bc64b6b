"""What every selection is, and how one makes the weights that it gives."""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.weights import TokenWeights

NAMES = 50
"""How many labels, or sources, a report counts one by one: it goes into every checkpoint."""


class Selection(ABC):
    """A rule from scores, or from whole rows, to token weights.

    Attributes:
        columns: the token losses that it reads: of ``base`` (no adapter), ``utility``, ``degraded``.
        features: kind -> the sets whose rows' ``text``, ``embedding`` or ``selector`` value it reads.
        held_out: the sets whose token losses it reads beside the custom set's, to see what scores mean.
    """

    columns: Sequence[str] = ("utility", "degraded")
    features: Mapping[str, Sequence[str]] = {}
    held_out: Sequence[str] = ()

    @abstractmethod
    def select(self, scores: TokenScores) -> TokenWeights:
        """Weighs every response token of the custom set."""


class OnlineSelection(Selection):
    """A rule whose weights depend on the target's own token losses, and so are made anew in every step of training.

    Attributes:
        whole_step: the rule looks at all tokens of an optimizer step at once, which costs one more forward pass.
    """

    whole_step: bool = False

    @abstractmethod
    def weigh(self, losses: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Weighs tokens by the target's current losses; the weights that :meth:`select` gave are multiplied in later.

        Args:
            losses: Shape ``[N]`` float32, without a gradient.
            tokens: Shape ``[N]`` each: ``weight`` (what :meth:`select` gave), ``ordinal`` (int64: which token of its
                row's response, from 0), and every one of ``TokenWeights.columns``.

        Returns:
            Shape ``[N]`` float32.
        """


def mask_weights(scores: TokenScores, masked: np.ndarray, **facts: Any) -> TokenWeights:
    """Weight 0 where ``masked`` ``[tokens]`` is true and 1 elsewhere; otherwise as :func:`token_weights`."""
    return token_weights(scores, (~masked).astype(np.float32), **facts)


def row_weights(scores: TokenScores, weights: np.ndarray, **facts: Any) -> TokenWeights:
    """The same weight, of ``weights`` ``[R]``, for all tokens of a row, which is left out where that is 0.

    Otherwise as :func:`token_weights`.
    """
    left_out = frozenset(scores.row_ids[weights == 0].tolist())
    chosen = token_weights(scores, np.repeat(weights, np.diff(scores.offsets)), rows_left_out=len(left_out), **facts)
    return replace(chosen, left_out=left_out)


def token_weights(
    scores: TokenScores,
    weights: np.ndarray,
    anchor: np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    **facts: Any,
) -> TokenWeights:
    """Cuts flat weights into rows and reports what they do.

    Args:
        scores: the store that was selected from.
        weights: Shape ``[tokens]``.
        anchor: Shape ``[tokens]``: weights of the KL to the base; none by default.
        columns: name -> Shape ``[tokens]``: what training needs besides.
        **facts: what else the report should say.
    """
    masked = weights == 0
    rows = scores.per_row(masked)
    report = {
        "tokens": len(masked),
        "masked": int(masked.sum()),
        "kept": int((~masked).sum()),
        "rows": len(rows),
        "rows_fully_masked": sum(bool(row.all()) for row in rows),
        "round": scores.round,
        **facts,
        "masked_share_per_source": _shares(names_of(scores, "source"), rows),
        "masked_share_per_label": _shares(names_of(scores, "label"), rows),
    }
    if anchor is not None:
        report["anchored"] = int(np.count_nonzero(anchor))
    hashes = dict(zip(scores.row_ids.tolist(), scores.values("ids_hash"), strict=True))
    return TokenWeights(
        _rows(scores, weights),
        hashes,
        report,
        dict(scores.fingerprints),
        _rows(scores, anchor) if anchor is not None and anchor.any() else {},
        {name: _rows(scores, values) for name, values in (columns or {}).items()},
    )


def names_of(scores: TokenScores, column: str) -> list[str | None]:
    """The label or source of each row, for a report.

    Beyond the :data:`NAMES` with the most tokens, all are called ``(N more)``, which says how many they are.

    Args:
        scores: the store.
        column: ``label`` or ``source``.
    """
    names: list[str | None] = scores.values(column)
    tokens: Counter[str] = Counter()
    for name, count in zip(names, np.diff(scores.offsets).tolist(), strict=True):
        if name is not None:
            tokens[name] += count
    if len(tokens) <= NAMES:
        return names
    others = f"({len(tokens) - NAMES} more)"
    # what is called like the others is one of them; summaries speak of what is labelled harmful, however little it is
    ranked = sorted(tokens, key=lambda name: (name == others, name != "harmful", -tokens[name], name))
    counted = {None, *ranked[:NAMES]}
    return [name if name in counted else others for name in names]


def _rows(scores: TokenScores, flat: np.ndarray) -> dict[int, np.ndarray]:
    return dict(zip(scores.row_ids.tolist(), scores.per_row(flat.astype(np.float32)), strict=True))


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
