"""How tables write what was measured: values with intervals, differences, p-values, and rows of Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Cells = tuple[list[str], list[list[str]]]
"""The header of a table, and its lines."""
ARROWS = {"higher": "↑", "lower": "↓"}
"""Which way is better."""
DASH = "–"
"""Nothing to say."""
NARROW = 0.03
"""Shares whose interval is narrower than this have a decimal."""


def number(value: float, share: bool, sign: bool = False, decimals: int = 0) -> str:
    """A value, shares in percent."""
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    form = "+" if sign else ""
    text = f"{100 * value:{form}.{decimals}f}%" if share else f"{value:{form}.3f}"
    return text.replace("-", "−")


def interval(one: Mapping[str, Any] | None, share: bool) -> str:
    """``value`` between ``low`` and ``high``, and how many were ``undecided``; of nothing, a dash."""
    if one is None or one["value"] is None:
        return DASH
    undecided = f" ({one['undecided']} undecided)" if one.get("undecided") else ""
    if one["low"] is None:
        return number(one["value"], share) + undecided
    decimals = _decimals(one)
    value, low, high = (number(one[key], share, decimals=decimals) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]{undecided}"


def difference(one: Mapping[str, Any], share: bool) -> str:
    """A mean difference with its interval."""
    decimals = _decimals(one)
    # no two shares are further apart; Student's interval does not know that
    ends = {key: min(1.0, max(-1.0, one[key])) if share else one[key] for key in ("mean", "low", "high")}
    mean, low, high = (number(end, share, sign=True, decimals=decimals) for end in ends.values())
    return f"{mean} [{low}, {high}]"


def _decimals(one: Mapping[str, Any]) -> int:
    return 1 if 0 < one["high"] - one["low"] < NARROW else 0


def p_value(p: float) -> str:
    """Three digits."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, with bars in its cells escaped."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    return [f"| {' | '.join(rows[0])} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows[1:])]
