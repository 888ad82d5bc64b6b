"""How far adapters have moved from the base at each response position, as an SVG: a panel for each kind of reply."""

from collections.abc import Iterator, Mapping, Sequence

from toss_lightning.models.adapters import BASE
from toss_lightning.svg import COLOURS, DARK, DASHES, FONT, PALE, head, line, polyline, round_ticks, text, width_of

Panels = Mapping[str, Mapping[str, Sequence[float]]]
"""Kind of reply -> adapter -> mean KL(base || adapter) at each position, in nats."""
WIDE, HIGH = 250, 260
"""A panel's."""
LEFT, BETWEEN, TOP, BOTTOM = 62, 28, 92, 56
ROW = 20
"""Of the legend."""


def has_moved(panels: Panels) -> bool:
    """Whether there is a line to draw."""
    return any(name != BASE for of in panels.values() for name in of)


def draw_divergence(panels: Panels, names: Mapping[str, str]) -> str:
    """Draws a line for each adapter; the base, which has not moved, is the axis itself.

    All panels share the upward axis, so that kinds of reply can be compared. It is linear and begins at 0, so that the
    surface below a line is the sum over the positions.

    Args:
        panels: as ``divergence`` in evaluation.json; adapters beside the base among them.
        names: adapter -> what people call it.
    """
    adapters = list(dict.fromkeys(adapter for of in panels.values() for adapter in of if adapter != BASE))
    highest = max(value for of in panels.values() for values in of.values() for value in values) or 1.0
    longest = max(len(values) for of in panels.values() for values in of.values())
    width = max(
        LEFT + len(panels) * (WIDE + BETWEEN), 16 + round(max(_entry_width(names.get(one, one)) for one in adapters))
    )
    legend, below = _legend(adapters, names, width)
    shown = ", ".join(names.get(one, one) for one in adapters)
    said = f"KL from the base to {shown} at each response position of {', '.join(panels)}"
    parts = [*head(width, below + TOP + HIGH + BOTTOM, said), *legend, f'<g transform="translate(0 {below})">']
    for number, (kind, of) in enumerate(panels.items()):
        left = LEFT + number * (WIDE + BETWEEN)
        parts += _frame(left, kind, highest, longest, number == 0)
        for at, adapter in enumerate(adapters):
            if adapter in of:
                points = [(_x(left, place, longest), _y(value, highest)) for place, value in enumerate(of[adapter], 1)]
                parts += _curve(points, *_style(at))
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _x(left: float, position: float, longest: int) -> float:
    return left + WIDE * (position - 0.5) / longest


def _y(value: float, highest: float) -> float:
    return TOP + HIGH * (1 - value / (1.05 * highest))


def _curve(points: Sequence[tuple[float, float]], colour: str, dashes: str) -> Iterator[str]:
    """A line; a mark on the first position, which is the one that matters most and may be the only one."""
    yield polyline(points, colour, dashes, 2)
    x, y = points[0]
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'


def _frame(left: float, kind: str, highest: float, longest: int, is_first: bool) -> Iterator[str]:
    """Grid, ticks and titles; values stand at the first panel alone."""
    bottom = TOP + HIGH
    for value, said in round_ticks(0, 1.05 * highest, 6):
        y = _y(value, highest)
        yield line(left, y, left + WIDE, y, PALE)
        if is_first:
            yield text(left - 8, y + 4.5, said, "end")
    for position, said in _positions(longest):
        x = _x(left, position, longest)
        yield line(x, bottom, x, bottom + 5, DARK)
        yield text(x, bottom + 20, said, "middle")
    yield line(left, bottom, left + WIDE, bottom, DARK)
    yield line(left, TOP, left, bottom, DARK)
    yield text(left + WIDE / 2, TOP - 12, kind, "middle", "bold")
    yield text(left + WIDE / 2, bottom + 42, "response position", "middle")


def _positions(longest: int) -> Iterator[tuple[int, str]]:
    """The first, and round ones behind it."""
    yield 1, "1"
    for value, _ in round_ticks(1, longest, 6) if longest > 1 else ():
        if value > 1 and value == round(value):
            yield round(value), str(round(value))


def _style(at: int) -> tuple[str, str]:
    """Colour and dashes of a line; no two of the first 32 share both."""
    return COLOURS[at % len(COLOURS)], DASHES[(at + at // len(COLOURS)) % len(DASHES)]


def _legend(adapters: Sequence[str], names: Mapping[str, str], width: int) -> tuple[list[str], int]:
    """What each line stands for, in as many rows as that takes, and how far these push the panels down."""
    # upright above the axis: it is read without turning the head
    parts = [text(16, 24, "mean KL(base || adapter), nats per token", "start", "bold")]
    x, below = 16.0, 0
    for at, adapter in enumerate(adapters):
        name = names.get(adapter, adapter)
        if x > 16 and x + _entry_width(name) > width:
            x, below = 16.0, below + ROW
        parts.append(line(x, 48 + below, x + 30, 48 + below, *_style(at), 2))
        parts.append(text(x + 37, 52.5 + below, name, size=FONT))
        x += _entry_width(name)
    return parts, below


def _entry_width(name: str) -> float:
    return 37 + width_of(name) + 24
