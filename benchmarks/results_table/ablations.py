"""The ablations as a page and a picture, and what they choose."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from panels import Panel, Point, draw
from tables import (
    CLOSED,
    KEPT,
    MARGIN,
    REFUSAL,
    Content,
    heading,
    kept,
    measures_of,
    read,
    spread,
    star,
    table,
    unfinished,
)

TITLE = re.compile(r"(.+?), (?:d = ([\d.]+)|automatic.*)")
"""Of a method whose discard ratio is varied, or found by itself."""


def page(work: Path, command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        work: where the experiment lies.
        command: what wrote this.
        setup: what was done, in words.
    """
    content = read(work / "ablations")
    found = families(content)
    lines = [
        *heading("What each part of TOSS is worth", f"`{command}`", setup),
        "That is the validation split: other pairs, rows and prompts than those of the results table.",
        "",
        *table(content, work / "ablations"),
        "",
        spread(content),
        star(content),
        *unfinished(content),
        "",
        "Chosen, for each way to select, is what comes closest to the goal: whose smaller one of gap closed, as a",
        f"share of {CLOSED:.0%}, and utility kept, as a share of {KEPT:.0%}, is largest. Gap closed is the mean of",
        "that in refusals and of that in the margin, since so few prompts tell settings apart too roughly.",
        "",
    ]
    for family, settings in found.items():
        if reached := _reached(content, settings):
            best = max(reached, key=reached.__getitem__)
            lines.append(f"- {family}: {best.removeprefix(f'{family}, ')}, at {reached[best]:.0%} of the goal.")
    varied = {name for settings in found.values() for name in settings} | {content["baseline"], content["oracle"]}
    others = _reached(content, [name for name in content["methods"] if name not in varied])
    alone = ", ".join(f"{name} {worse:.0%}" for name, worse in others.items())
    return "\n".join([*lines, "", f"Of the goal, with a single setting: {alone}.", ""])


def _reached(content: Content, names: Iterable[str]) -> dict[str, float]:
    """How far methods come, of those whose measures were taken; see :func:`standing`."""
    return {name: worse for name in names if (worse := standing(content, name)) is not None}


def families(content: Content) -> dict[str, dict[str, float | None]]:
    """Way to select -> name of the method -> its discard ratio; None where it finds that by itself."""
    found: dict[str, dict[str, float | None]] = {}
    for name in content["methods"]:
        if match := TITLE.fullmatch(name):
            found.setdefault(match[1], {})[name] = float(match[2]) if match[2] else None
    return found


def standing(content: Content, name: str) -> float | None:
    """How much of the goal a method reaches, by the measure in which it is further from it."""
    measures = measures_of(content)
    found = [measures[key]["gap_closed"]["methods"].get(name) for key in (REFUSAL, MARGIN)] + [kept(content, name)]
    values = [one["value"] for one in found if one is not None and one["value"] is not None]
    if len(values) < len(found):
        return None
    return float(min((values[0] + values[1]) / 2 / CLOSED, values[2] / KEPT))


def picture(work: Path) -> str:
    """The measures over the discard ratio, as an SVG."""
    content = read(work / "ablations")
    panels = [
        Panel(name, one["share"], dict(_lines(content, one)), _levels(content, one))
        for name, one in measures_of(content).items()
    ]
    return draw(panels, "discard ratio d", "Measures of each way to select, over the discard ratio")


def _lines(content: Content, measure: Content) -> Iterator[tuple[str, Mapping[float, Point]]]:
    for family, settings in families(content).items():
        values = {d: measure["models"][name] for name, d in settings.items() if d is not None}
        if points := {d: Point.of(one) for d, one in values.items() if one["value"] is not None}:
            yield family, points


def _levels(content: Content, measure: Content) -> dict[str, float]:
    """Of what has no discard ratio: where fine-tuning goes without a method, and where it goes at best."""
    names = (content["baseline"], content["oracle"])
    values = {name: measure["models"][name]["value"] for name in names if name in measure["models"]}
    return {name: value for name, value in values.items() if value is not None}
