"""Lines over a setting, as an SVG: a panel for each measure, with intervals as bars and levels to compare with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toss_lightning.svg import COLOURS, DARK, GREY, PALE, head, line, polyline, round_ticks, text, width_of

WIDE, HIGH = 250, 230
"""A panel's."""
LEFT, BETWEEN, TOP, BOTTOM = 24, 66, 92, 56
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Of lines, so that they are told apart without colours too."""


@dataclass(frozen=True)
class Point:
    """A value, between ``low`` and ``high`` where there is an interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, one: Mapping[str, Any]) -> "Point":
        """As `toss compare` gives it; an interval over prompts says nothing of settings that share them."""
        return cls(one["value"], one["low"], one["high"]) if one["over"] == "seeds" else cls(one["value"])


@dataclass(frozen=True)
class Panel:
    """A measure."""

    title: str
    share: bool
    lines: Mapping[str, Mapping[float, Point]]
    """Name -> setting -> what was measured."""
    levels: Mapping[str, float]
    """Name -> a value that has no setting, drawn across."""


def draw(panels: Sequence[Panel], setting: str, said: str) -> str:
    """Draws all panels over the same settings, which stand side by side at even distances.

    Args:
        panels: lines of the same name have the same colour.
        setting: what the axis to the right is.
        said: what the picture shows, for whoever cannot see it.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    settings = sorted({at for panel in panels for of in panel.lines.values() for at in of})
    width = len(panels) * (WIDE + BETWEEN) + LEFT
    parts = [*head(width, TOP + HIGH + BOTTOM, said), *_legend(names)]
    for number, panel in enumerate(panels):
        left = LEFT + BETWEEN / 2 + number * (WIDE + BETWEEN)
        low, high = _range(panel)
        parts += _frame(left, panel, (low, high), settings, setting)
        for at, name in enumerate(names):
            shift = 3 * (at - (len(names) - 1) / 2)
            points = [
                (_x(left, settings.index(place), len(settings)) + shift, point)
                for place, point in sorted(panel.lines.get(name, {}).items())
            ]
            parts += _curve(points, (low, high), COLOURS[at % len(COLOURS)], DASHES[at % len(DASHES)])
    return "\n".join([*parts, "</svg>", ""])


def _range(panel: Panel) -> tuple[float, float]:
    """Of the values, and of intervals as far as they do not dwarf them; shares begin at 0."""
    values = [*panel.levels.values(), *(point.value for of in panel.lines.values() for point in of.values())]
    if not values:
        return 0.0, 1.0
    if panel.share:
        return 0.0, min(1.0, math.ceil(10 * max(values) + 0.5) / 10)
    room = 0.15 * (max(values) - min(values)) or 0.5
    return min(values) - room, max(values) + room


def _x(left: float, index: int, count: int) -> float:
    return left + WIDE * (index + 0.5) / count


def _y(value: float, low: float, high: float) -> float:
    return TOP + HIGH * (1 - (min(max(value, low), high) - low) / (high - low))


def _curve(points: Sequence[tuple[float, Point]], ends: tuple[float, float], colour: str, dashes: str) -> Iterator[str]:
    yield polyline([(x, _y(point.value, *ends)) for x, point in points], colour, dashes, 2)
    for x, point in points:
        if point.low is not None and point.high is not None:
            yield line(x, _y(point.low, *ends), x, _y(point.high, *ends), colour, width=1.2, opacity=0.6)
        yield f'<circle cx="{x:.1f}" cy="{_y(point.value, *ends):.1f}" r="3.5" fill="{colour}"/>'


def _frame(
    left: float, panel: Panel, ends: tuple[float, float], settings: Sequence[float], setting: str
) -> Iterator[str]:
    """Grid, ticks, titles and levels."""
    bottom = TOP + HIGH
    for value, said in round_ticks(*ends, 6):
        y = _y(value, *ends)
        yield line(left, y, left + WIDE, y, PALE)
        yield text(left - 6, y + 4.5, f"{100 * value:.0f}%" if panel.share else said, "end", size=11)
    for name, value in panel.levels.items():
        y = _y(value, *ends)
        yield line(left, y, left + WIDE, y, GREY, "4 3")
        yield text(left + WIDE - 3, y - 4, name, "end", size=10)
    for index, value in enumerate(settings):
        x = _x(left, index, len(settings))
        yield line(x, bottom, x, bottom + 5, DARK)
        yield text(x, bottom + 20, f"{value:g}", "middle", size=11)
    yield line(left, bottom, left + WIDE, bottom, DARK)
    yield line(left, TOP, left, bottom, DARK)
    yield text(left + WIDE / 2, TOP - 12, panel.title, "middle", "bold")
    yield text(left + WIDE / 2, bottom + 42, setting, "middle")


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = 16.0
    for at, name in enumerate(names):
        yield line(x, 34, x + 30, 34, COLOURS[at % len(COLOURS)], DASHES[at % len(DASHES)], 2)
        yield text(x + 37, 38.5, name)
        x += 37 + width_of(name) + 24
