"""Line charts of a run's report, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from toss_lightning.report.tokens import HARMFUL
from toss_lightning.svg import COLOURS, DARK, GREY, PALE, head, line, polyline, round_ticks, text, width_of

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 66, 52
BLUE, RED, *MORE = COLOURS
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Of lines, so that they are told apart without colours too."""


@dataclass(frozen=True)
class Line:
    """A line and what it is called."""

    name: str
    points: Sequence[tuple[float, float]]
    fades: bool = False
    """It is there to compare with, and has no place in the legend."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows; values between 0 and 1 in percent where it says so."""

    title: str
    share: bool = False
    low: float | None = None
    """Where it begins; by default where the values do."""


@dataclass(frozen=True)
class Mark:
    """A place on the horizontal axis."""

    at: float
    said: str


def chart(lines: Sequence[Line], across: Axis, upward: Axis, mark: Mark | None = None) -> str:
    """Draws the lines over common axes.

    Args:
        lines: at least one, with a point.
        across: the horizontal axis.
        upward: the vertical one.
        mark: a place to point out.
    """
    points = [point for one in lines for point in one.points]
    x_ends = _ends([x for x, _ in points] + ([mark.at] if mark else []), across)
    y_ends = _ends([y for _, y in points], upward, 0.06)

    def x_of(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - x_ends[0]) / (x_ends[1] - x_ends[0])

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y_ends[0]) / (y_ends[1] - y_ends[0])

    said = f"{upward.title} by {across.title}, for {', '.join(one.name for one in lines)}"
    parts = [*head(WIDTH, HEIGHT, said), text(14, 22, upward.title, "start", "bold")]
    for value, label in _ticks(x_ends, across, 8):
        parts += [line(x_of(value), HEIGHT - BOTTOM, x_of(value), HEIGHT - BOTTOM + 5, DARK)]
        parts += [text(x_of(value), HEIGHT - BOTTOM + 20, label, "middle")]
    for value, label in _ticks(y_ends, upward, 6):
        parts += [line(LEFT, y_of(value), WIDTH - RIGHT, y_of(value), PALE)]
        parts += [text(LEFT - 8, y_of(value) + 4.5, label, "end")]
    parts += [
        line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, DARK),
        line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, DARK),
    ]
    parts += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across.title, "middle")]
    if mark is not None:
        parts += [line(x_of(mark.at), TOP, x_of(mark.at), HEIGHT - BOTTOM, DARK, "4 3")]
        is_right = x_of(mark.at) + width_of(mark.said) < WIDTH
        parts += [text(x_of(mark.at) + (5 if is_right else -5), TOP - 4, mark.said, "start" if is_right else "end")]
    legend, colours = 14.0, colours_of([one.name for one in lines])
    for at, one in enumerate(lines):
        colour, dashes = (GREY, "1 3") if one.fades else (colours[one.name], DASHES[at % len(DASHES)])
        placed = [(x_of(x), y_of(y)) for x, y in one.points]
        parts += [polyline(placed, colour, dashes, 1.2 if one.fades else 2)]
        if not one.fades:
            x, y = placed[0]
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'] if len(placed) == 1 else []
            parts += [line(legend, 44, legend + 26, 44, colour, dashes, 2), text(legend + 32, 48.5, one.name)]
            legend += 32 + width_of(one.name) + 22
    return "\n".join([*parts, "</svg>", ""])


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each; harmful rows have the same one in every picture."""
    others = [name for name in names if name != HARMFUL]
    return {HARMFUL: RED} | {name: (BLUE, *MORE)[at % (len(MORE) + 1)] for at, name in enumerate(others)}


def _ends(values: Sequence[float], axis: Axis, room: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = low - room * (high - low) if axis.low is None else axis.low
    high += room * (high - low)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _ticks(ends: tuple[float, float], axis: Axis, most: int) -> list[tuple[float, str]]:
    factor, sign = (100, "%") if axis.share else (1, "")
    return [(value / factor, said + sign) for value, said in round_ticks(ends[0] * factor, ends[1] * factor, most)]
