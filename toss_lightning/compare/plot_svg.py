"""A scatter of methods as an SVG: what each costs in one measure and brings in another, and which none beats."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from toss_lightning.svg import COLOURS, DARK, FONT, GREY, PALE, head, line, polyline, round_ticks, text, width_of

Content = Mapping[str, Any]
WIDTH, HEIGHT = 760, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 58, 64
MARKS = ("circle", "square", "triangle", "diamond")
STRAIGHT, SLANTED = 14.0, 11.0
"""How far from its point a label stands at least, beside it and in a corner."""


@dataclass(frozen=True)
class _Point:
    """A model on the canvas, in pixels."""

    name: str
    x: float
    y: float
    x_ends: tuple[float, float] | None
    y_ends: tuple[float, float] | None
    colour: str
    mark: str
    is_base: bool
    values: tuple[float, float]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        """Square pixels in common."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


_PLOT = _Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


class _Axis:
    """Values of a measure -> pixels, with round ticks."""

    def __init__(self, measure: Content, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
        low, high = low - room, high + room
        if measure["share"]:
            low, high = max(low, -0.02), min(high, 1.02)
        self.share, self.low, self.high, self.start, self.end = measure["share"], low, high, start, end
        self.title = f"{measure['title']}, {measure['better']} is better"

    def at(self, value: float) -> float:
        """The pixel of a value; one far outside ends just beyond the axis."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -0.05), 1.05) * (self.end - self.start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Pixels and texts at multiples of 1, 2 or 5."""
        factor, sign = (100, "%") if self.share else (1, "")
        for value, said in round_ticks(self.low * factor, self.high * factor):
            yield self.at(value / factor), said + sign


def scatter(content: Content, x: Content, y: Content) -> str:
    """Draws all models that have both measures, with error bars and the Pareto front of the methods.

    Args:
        content: the comparison, as :func:`toss_lightning.compare.numbers.compare_outcomes` makes it.
        x: the measure that goes to the right.
        y: the measure that goes upward; some model has both.
    """
    both = have_both(x, y)
    names = [name for name in (content["base"], *content["methods"]) if name in both]
    across = _Axis(x, _spread(x, names), _PLOT.left, _PLOT.right)
    upward = _Axis(y, _spread(y, names), _PLOT.bottom, _PLOT.top)
    points = [_point(name, content, (x, y), (across, upward)) for name in names]
    methods = [point for point in points if not point.is_base]
    front = pareto_front([point.values for point in methods], x["better"], y["better"])
    parts = [*_frame(across, upward), *_front_line([methods[at] for at in front])]
    for point in points:
        parts += _error_bars(point)
    for point in points:
        parts += _mark(point)
    parts += _labels(points)
    said = f"{across.title} against {upward.title}, for {', '.join(names)}"
    return "\n".join([*head(WIDTH, HEIGHT, said), *parts, "</svg>", ""])


def pareto_front(values: Sequence[tuple[float, float]], x_better: str, y_better: str) -> list[int]:
    """Which points no other one beats in both measures, from left to right.

    A point is beaten where another is at least as good in both and better in one.
    """
    signs = [1 if better == "higher" else -1 for better in (x_better, y_better)]
    good = [(signs[0] * x, signs[1] * y) for x, y in values]
    kept = [
        at
        for at, one in enumerate(good)
        if not any(other[0] >= one[0] and other[1] >= one[1] and other != one for other in good)
    ]
    return sorted(kept, key=lambda at: values[at])


def have_both(x: Content, y: Content) -> set[str]:
    """Models with a value of either measure."""
    known = [{name for name, model in one["models"].items() if model["value"] is not None} for one in (x, y)]
    return known[0] & known[1]


def _spread(measure: Content, names: Sequence[str]) -> list[float]:
    """What an axis must show: all values, and interval ends as far as they do not squeeze the values together."""
    models = [measure["models"][name] for name in names]
    values = [one["value"] for one in models]
    reach = 0.25 * (max(values) - min(values)) or math.inf
    ends = [one[end] for one in models for end in ("low", "high") if one[end] is not None]
    return [*values, *(min(max(end, min(values) - reach), max(values) + reach) for end in ends)]


def _point(name: str, content: Content, measures: tuple[Content, Content], axes: tuple[_Axis, _Axis]) -> _Point:
    found = [measure["models"][name] for measure in measures]
    x, y = (axis.at(one["value"]) for axis, one in zip(axes, found, strict=True))
    x_ends, y_ends = (
        None if one["low"] is None else (axis.at(one["low"]), axis.at(one["high"]))
        for axis, one in zip(axes, found, strict=True)
    )
    is_base = name == content["base"]
    # of its place among all methods, so that it looks the same with any axes
    at = 0 if is_base else content["methods"].index(name)
    colour, mark = COLOURS[at % len(COLOURS)], MARKS[(at + at // len(COLOURS)) % len(MARKS)]
    if is_base:
        colour, mark = DARK, "ring"
    return _Point(name, x, y, x_ends, y_ends, colour, mark, is_base, (found[0]["value"], found[1]["value"]))


# --- drawing ----------------------------------------------------------------------------------------------------------


def _frame(across: _Axis, upward: _Axis) -> Iterator[str]:
    """Grid, ticks, titles and a legend."""
    for x, said in across.ticks():
        yield line(x, _PLOT.top, x, _PLOT.bottom, PALE)
        yield line(x, _PLOT.bottom, x, _PLOT.bottom + 5, DARK)
        yield text(x, _PLOT.bottom + 20, said, "middle")
    for y, said in upward.ticks():
        yield line(_PLOT.left, y, _PLOT.right, y, PALE)
        yield line(_PLOT.left - 5, y, _PLOT.left, y, DARK)
        yield text(_PLOT.left - 9, y + 4.5, said, "end")
    yield line(_PLOT.left, _PLOT.bottom, _PLOT.right, _PLOT.bottom, DARK)
    yield line(_PLOT.left, _PLOT.top, _PLOT.left, _PLOT.bottom, DARK)
    yield text((_PLOT.left + _PLOT.right) / 2, HEIGHT - 16, across.title, "middle", "bold")
    # upright above the axis: it is read without turning the head, and a long one has the whole width
    yield text(16, 24, upward.title, "start", "bold")
    yield line(_PLOT.right - 210, 41, _PLOT.right - 182, 41, GREY, "6 4", 1.5)
    yield text(_PLOT.right - 175, 45.5, "best trade-offs", size=FONT - 1)
    yield line(_PLOT.right - 80, 41, _PLOT.right - 52, 41, GREY, "", 1.5)
    yield line(_PLOT.right - 80, 37, _PLOT.right - 80, 45, GREY, "", 1.5)
    yield line(_PLOT.right - 52, 37, _PLOT.right - 52, 45, GREY, "", 1.5)
    yield text(_PLOT.right - 45, 45.5, "95 %", size=FONT - 1)


def _front_line(points: Sequence[_Point]) -> list[str]:
    if len(points) < 2:
        return []
    return [polyline([(point.x, point.y) for point in points], GREY, "6 4", 1.5)]


def _error_bars(point: _Point) -> Iterator[str]:
    """Both intervals, cut at the frame; only an end that is inside has a cap."""
    cap = 4
    if point.x_ends is not None:
        left, right = (min(max(end, _PLOT.left), _PLOT.right) for end in point.x_ends)
        yield line(left, point.y, right, point.y, point.colour, "", 1.3, 0.75)
        for end in point.x_ends:
            if _PLOT.left <= end <= _PLOT.right:
                yield line(end, point.y - cap, end, point.y + cap, point.colour, "", 1.3, 0.75)
    if point.y_ends is not None:
        low, high = (min(max(end, _PLOT.top), _PLOT.bottom) for end in point.y_ends)
        yield line(point.x, low, point.x, high, point.colour, "", 1.3, 0.75)
        for end in point.y_ends:
            if _PLOT.top <= end <= _PLOT.bottom:
                yield line(point.x - cap, end, point.x + cap, end, point.colour, "", 1.3, 0.75)


def _mark(point: _Point) -> list[str]:
    x, y, r = point.x, point.y, 6.0
    side = 2 * r - 1
    style = f'fill="{point.colour}" stroke="white" stroke-width="1.2"'
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style}/>',
        "square": f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side}" height="{side}" {style}/>',
        "triangle": _polygon([(x, y - r - 1), (x + r + 1, y + r - 1), (x - r - 1, y + r - 1)], style),
        "diamond": _polygon([(x, y - r - 2), (x + r + 2, y), (x, y + r + 2), (x - r - 2, y)], style),
        "ring": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="white" stroke="{DARK}" stroke-width="2"/>',
    }
    return [shapes[point.mark]]


def _polygon(corners: Sequence[tuple[float, float]], style: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}" {style}/>'


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(points: Sequence[_Point]) -> list[str]:
    """A name beside each point, where it covers least; the most crowded points choose first."""
    marks = [_Box(point.x - 9, point.y - 9, point.x + 9, point.y + 9) for point in points]
    bars = [box for point in points for box in _bar_boxes(point)]
    placed: list[_Box] = []
    parts: list[str] = []
    for point in sorted(points, key=lambda point: -_crowd(point, points)):
        box, distant = min(_places(point), key=lambda place: _cost(place, marks, bars, placed))[:2]
        placed.append(box)
        if distant:
            x, y = min(max(point.x, box.left), box.right), min(max(point.y, box.top), box.bottom)
            parts.append(line(point.x, point.y, x, y, GREY, "", 0.8))
        # a white rim keeps a name readable that has to lie on a line; not every viewer knows paint-order
        rim = 'stroke="white" stroke-width="3" stroke-linejoin="round"'
        place, name = f'x="{box.left:.1f}" y="{box.bottom - 4:.1f}"', escape(point.name)
        parts += [f"<text {place} {rim}>{name}</text>", f"<text {place}>{name}</text>"]
    return parts


_Place = tuple[_Box, bool, float]


def _places(point: _Point) -> Iterator[_Place]:
    """Where a label may stand, whether a line must then lead to it, and how far out it is."""
    wide, high = width_of(point.name), FONT + 3.0
    for far in (0.0, 14.0, 30.0, 48.0, 70.0, 95.0):
        for dx, dy in ((1, 0), (1, -1), (1, 1), (-1, 0), (-1, -1), (-1, 1), (0, -1), (0, 1)):
            distance = (STRAIGHT if 0 in (dx, dy) else SLANTED) + far
            x, y = point.x + dx * distance, point.y + dy * distance
            left = x - wide * (1 - dx) / 2
            yield _Box(left, y - high / 2, left + wide, y + high / 2), far > 0, far


def _cost(place: _Place, marks: Sequence[_Box], bars: Sequence[_Box], placed: Sequence[_Box]) -> float:
    box, _, far = place
    size = (box.right - box.left) * (box.bottom - box.top)
    outside = size - box.overlap(_Box(_PLOT.left, _PLOT.top, WIDTH - 4, _PLOT.bottom))
    names, covered = sum(map(box.overlap, placed)), sum(map(box.overlap, marks))
    return 20 * (outside + names) + 8 * covered + 3 * sum(map(box.overlap, bars)) + 4 * far


def _bar_boxes(point: _Point) -> Iterator[_Box]:
    if point.x_ends is not None:
        yield _Box(min(point.x_ends), point.y - 2, max(point.x_ends), point.y + 2)
    if point.y_ends is not None:
        yield _Box(point.x - 2, min(point.y_ends), point.x + 2, max(point.y_ends))


def _crowd(point: _Point, points: Sequence[_Point]) -> float:
    return sum(1 / (20 + math.dist((point.x, point.y), (other.x, other.y))) for other in points)
