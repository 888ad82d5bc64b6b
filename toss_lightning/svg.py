"""Plain SVG: what pictures have in common. Places are in pixels, from the upper left corner."""

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

FONT = 13
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#785EF0", "#7F7F7F")
"""Those of Okabe and Ito (2008) that stand out on white, and two: told apart with any colour vision."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Of lines, so that they are told apart without colours too."""
DARK, GREY, PALE = "#1a1a1a", "#595959", "#e3e3e3"


def head(width: int, height: int, said: str) -> list[str]:
    """The beginning of a picture on white; ``</svg>`` ends it.

    Args:
        width: of the whole.
        height: of the whole.
        said: what it shows, for whoever cannot see it.
    """
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="Helvetica, Arial, sans-serif" font-size="{FONT}" fill="{DARK}" role="img">',
        f"<title>{escape(said)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def text(x: float, y: float, said: str, anchor: str = "start", weight: str = "normal", size: float = FONT) -> str:
    """A text on one line."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}">'
        f"{escape(said)}</text>"
    )


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "", width: float = 1, opacity: float = 1
) -> str:
    """A straight line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"'
        f' stroke-opacity="{opacity}"{_dashed(dashes)}/>'
    )


def polyline(points: Sequence[tuple[float, float]], colour: str, dashes: str = "", width: float = 1) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{_dashed(dashes)}/>'


def _dashed(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def width_of(said: str) -> float:
    """Of a text in a usual sans-serif, about."""
    return FONT * sum(
        0.3 if sign in "ijl.,:;'|! " else 0.82 if sign in "mwMW" or sign.isupper() else 0.56 for sign in said
    )


def round_ticks(low: float, high: float, most: int = 8) -> Iterator[tuple[float, str]]:
    """Values from ``low`` to ``high`` at multiples of 1, 2 or 5, about ``most`` of them, and how they are written."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield number * step, f"{number * step:.{digits}f}".replace("-", "−")
