"""How tables write what was measured: values with intervals, differences, p-values, and rows of Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

ARROWS = {"higher": "↑", "lower": "↓"}
"""Which way is better."""
DASH = "–"
"""Nothing to say."""


def number(value: float, share: bool, sign: bool = False) -> str:
    """A value, shares in percent."""
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    form = "+" if sign else ""
    text = f"{100 * value:{form}.0f}%" if share else f"{value:{form}.3f}"
    return text.replace("-", "−")


def interval(one: Mapping[str, Any] | None, share: bool) -> str:
    """``value`` between ``low`` and ``high``, and how many were ``undecided``; of nothing, a dash."""
    if one is None or one["value"] is None:
        return DASH
    ends = "" if one["low"] is None else f" [{number(one['low'], share)}, {number(one['high'], share)}]"
    undecided = f" ({one['undecided']} undecided)" if one.get("undecided") else ""
    return number(one["value"], share) + ends + undecided


def difference(one: Mapping[str, Any], share: bool) -> str:
    """A mean difference with its interval."""
    mean, low, high = (number(one[key], share, sign=True) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def p_value(p: float) -> str:
    """Three digits."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, with bars in its cells escaped."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    return [f"| {' | '.join(rows[0])} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows[1:])]
