"""Line charts of a run's report, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from toss_lightning.report.tokens import HARMFUL
from toss_lightning.svg import COLOURS, DARK, DASHES, GREY, PALE, head, line, polyline, round_ticks, text, width_of

WIDTH, PLOT = 460, 182
"""Of the picture, and the height of the field that lines are drawn in."""
LEFT, RIGHT, TITLE, BOTTOM = 58, 16, 44, 52
ENTRY = 22
"""Height of a line of the legend."""
MARK = 8
"""Room for what is said of a mark."""
LONGEST = 44
"""Signs of a name in the legend."""
BLUE, RED, *MORE = COLOURS


@dataclass(frozen=True)
class Style:
    """How a line is told from others, with and without colours."""

    colour: str
    dashes: str
    width: float = 2


BLIND = Style(GREY, "1 3", 1.2)
"""Of a line to compare with."""


def styles_of(names: Sequence[str]) -> list[Style]:
    """A style for each name; harmful rows have the same one in every picture."""
    others = [name for name in names if name != HARMFUL]
    colours = {name: (BLUE, *MORE)[at % (len(MORE) + 1)] for at, name in enumerate(others)} | {HARMFUL: RED}
    return [Style(colours[name], DASHES[at % len(DASHES)]) for at, name in enumerate(names)]


@dataclass(frozen=True)
class Line:
    """A line and what it is called."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Style


@dataclass(frozen=True)
class Axis:
    """What an axis shows; values between 0 and 1 in percent where it says so."""

    title: str
    share: bool = False
    low: float | None = None
    """Where it begins; by default where the values do."""
    whole: bool = False
    """It counts something."""


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
    legend, top = _legend(lines)
    top += MARK if mark is not None else 0
    bottom, right = top + PLOT, WIDTH - RIGHT

    def x_of(value: float) -> float:
        return LEFT + (right - LEFT) * (value - x_ends[0]) / (x_ends[1] - x_ends[0])

    def y_of(value: float) -> float:
        return bottom - PLOT * (value - y_ends[0]) / (y_ends[1] - y_ends[0])

    said = f"{upward.title} by {across.title}, for {', '.join(one.name for one in lines)}"
    parts = [*head(WIDTH, bottom + BOTTOM, said), text(14, 22, upward.title, "start", "bold"), *legend]
    for value, label in _ticks(x_ends, across, 8):
        parts += [line(x_of(value), bottom, x_of(value), bottom + 5, DARK)]
        parts += [text(x_of(value), bottom + 20, label, "middle")]
    for value, label in _ticks(y_ends, upward, 6):
        parts += [line(LEFT, y_of(value), right, y_of(value), PALE), text(LEFT - 8, y_of(value) + 4.5, label, "end")]
    parts += [line(LEFT, bottom, right, bottom, DARK), line(LEFT, top, LEFT, bottom, DARK)]
    parts += [text((LEFT + right) / 2, bottom + 40, across.title, "middle")]
    if mark is not None:
        is_right = x_of(mark.at) + width_of(mark.said) < WIDTH
        parts += [line(x_of(mark.at), top, x_of(mark.at), bottom, DARK, "4 3")]
        parts += [text(x_of(mark.at) + (5 if is_right else -5), top - 4, mark.said, "start" if is_right else "end")]
    for one in lines:
        placed = [(x_of(x), y_of(y)) for x, y in one.points]
        parts += [polyline(placed, one.style.colour, one.style.dashes, one.style.width)]
        if len(placed) == 1:
            parts += [f'<circle cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="2.5" fill="{one.style.colour}"/>']
    return "\n".join([*parts, "</svg>", ""])


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """The names of the lines, in as many rows as they need; and where the field below them begins."""
    parts, x, y = [], 14.0, TITLE
    for one in lines:
        name = one.name if len(one.name) <= LONGEST else f"{one.name[: LONGEST - 1]}…"
        if x > 14 and x + 32 + width_of(name) > WIDTH:
            x, y = 14.0, y + ENTRY
        parts += [line(x, y, x + 26, y, one.style.colour, one.style.dashes, one.style.width)]
        parts += [text(x + 32, y + 4.5, name)]
        x += 32 + width_of(name) + 22
    return parts, y + ENTRY


def _ends(values: Sequence[float], axis: Axis, room: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = low - room * (high - low) if axis.low is None else axis.low
    high += room * (high - low)
    if low < high:
        return low, high
    return (low, low + 0.1) if axis.share else (low - 0.5, low + 0.5)


def _ticks(ends: tuple[float, float], axis: Axis, most: int) -> list[tuple[float, str]]:
    factor, sign = (100, "%") if axis.share else (1, "")
    ticks = [(value / factor, said + sign) for value, said in round_ticks(ends[0] * factor, ends[1] * factor, most)]
    return [(value, str(round(value))) for value, _ in ticks if value == round(value)] if axis.whole else ticks
