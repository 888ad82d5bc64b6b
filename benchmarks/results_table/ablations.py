"""The ablations as a page and a picture, and what they choose."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from panels import Panel, Point, draw
from tables import CLOSED, KEPT, REFUSAL, TASK, Content, measures_of, read, spread, table, unfinished

TITLE = re.compile(r"(.+), d = ([\d.]+)")
"""Of a method whose discard ratio is varied."""


def page(work: Path, command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        work: where the experiment lies.
        command: what wrote this.
        setup: what was done, in words.
    """
    content = read(work / "ablations")
    lines = [
        "# What each part of TOSS is worth",
        "",
        f"Written by `{command}`.",
        *setup,
        "Measured on the validation split: other pairs, rows and prompts (HarmBench) than those of the results table.",
        "",
        *table(content, work / "ablations"),
        "",
        spread(content),
        *unfinished(content),
        "",
        "Chosen, for each way to select, is the d that is closest to the goal: whose smaller one of gap closed in",
        f"refusals, as a share of {CLOSED:.0%}, and utility kept, as a share of {KEPT:.0%}, is largest.",
        "",
    ]
    for family, settings in families(content).items():
        reached = {d: worse for d, name in settings.items() if (worse := standing(content, name)) is not None}
        if reached:
            best = max(reached, key=reached.__getitem__)
            lines.append(f"- {family}: d = {best:g}, at {reached[best]:.0%} of the goal.")
    return "\n".join([*lines, ""])


def families(content: Content) -> dict[str, dict[float, str]]:
    """Way to select -> discard ratio -> name of the method."""
    found: dict[str, dict[float, str]] = {}
    for name in content["methods"]:
        if match := TITLE.fullmatch(name):
            found.setdefault(match[1], {})[float(match[2])] = name
    return found


def standing(content: Content, name: str) -> float | None:
    """How much of the goal a method reaches, by the measure in which it is further from it."""
    measures = measures_of(content)
    closed = measures[REFUSAL]["gap_closed"]["methods"].get(name)
    kept = measures[TASK]["utility_kept"]["methods"].get(name)
    if closed is None or kept is None or closed["value"] is None or kept["value"] is None:
        return None
    return float(min(closed["value"] / CLOSED, kept["value"] / KEPT))


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
        values = {d: measure["models"][name] for d, name in settings.items()}
        yield family, {d: Point(one["value"], one["low"], one["high"]) for d, one in values.items()}


def _levels(content: Content, measure: Content) -> dict[str, float]:
    """Of what has no discard ratio: where fine-tuning goes without a method, and where it goes at best."""
    names = (content["baseline"], content["oracle"])
    return {name: measure["models"][name]["value"] for name in names}
