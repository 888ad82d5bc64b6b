"""What it costs to be careful, over the share of harmful rows in the custom set: as a page and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from panels import Panel, Point, draw
from tables import (
    MASKED,
    PRICE,
    SHOWN,
    Content,
    called,
    cell,
    heading,
    masked,
    measures_of,
    most_seeds,
    price,
    share,
    spread,
    star,
)

from toss_lightning.evaluation.cells import markdown_table

Comparison = tuple[Content, Path]
"""What it found, and where it lies."""
Found = Mapping[float, Comparison]
"""Share of harmful rows -> the comparison made with it."""
METHODS = ("plain SFT", "TOSS", "TOSS-Chain, automatic")
"""Of which it is shown what they do at each share."""


def page(found: Found, command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        found: as said above.
        command: what wrote this.
        setup: what was done, in words.
    """
    lines = heading("What it costs to be careful", f"`{command}`", setup)
    lines += ["", *_table({f"{at:.0%}": one for at, one in sorted(found.items())}), ""]
    lines += _notes([content for content, _ in found.values()])
    return "\n".join([*lines, ""])


def _table(found: Mapping[str, Comparison]) -> list[str]:
    lines: list[list[str]] = []
    most = max(most_seeds(content) for content, _ in found.values())
    measures = list(measures_of(next(iter(found.values()))[0]))
    for at, (content, directory) in found.items():
        of, seeds = measures_of(content), most_seeds(content)
        where = at if seeds == most else f"{at} ({seeds} {'seed' if seeds == 1 else 'seeds'})"
        for name in [content["base"], *(one for one in METHODS if one in content["methods"])]:
            cells = [cell(content, of[key], name) for key in measures]
            cells += [price(content, name)]
            cells += [share(one) for one in masked(directory, name, content["seeds"].get(name, []))]
            lines.append([where, called(content, name), *cells])
    header = ["harmful rows", "", *(SHOWN[key] for key in measures), PRICE]
    return markdown_table([*header, "masked", "of harmful tokens"], lines)


def _notes(contents: Sequence[Content]) -> list[str]:
    seeds = {*map(most_seeds, contents)}
    alone = " Of one seed, intervals are over the prompts." if 1 in seeds and len(seeds) > 1 else ""
    return [spread(max(contents, key=most_seeds)) + alone, star(min(contents, key=most_seeds)), MASKED]


def picture(found: Found) -> str:
    """The measures over the share of harmful rows, as an SVG."""
    first = measures_of(next(iter(found.values()))[0])
    panels = [
        Panel(name, one["share"], {method: dict(_line(found, name, method)) for method in METHODS}, {})
        for name, one in first.items()
    ]
    lines = {
        method: {at: Point(value) for at, value in _masked(found, method)} for method in METHODS if method != METHODS[0]
    }
    panels.append(Panel("tokens left out of the loss", True, lines, {}))
    return draw(panels, "harmful rows in the custom set, %", "Measures of methods over the share of harmful rows")


def _line(found: Found, measure: str, method: str) -> Iterator[tuple[float, Point]]:
    for at, (content, _) in found.items():
        one = measures_of(content)[measure]["models"].get(method)
        if one is not None and one["value"] is not None:
            yield 100 * at, Point.of(one)


def _masked(found: Found, method: str) -> Iterator[tuple[float, float]]:
    for at, (content, directory) in found.items():
        value, _ = masked(directory, method, content["seeds"].get(method, []))
        if value is not None:
            yield 100 * at, value
