"""What it costs to be careful, over the share of harmful rows in the custom set: as a page and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from panels import Panel, Point, draw
from rows import SHARE
from tables import SHOWN, TASK, Content, called, heading, masked, measures_of, most_seeds, share, spread, unfinished

from toss_lightning.evaluation.cells import DASH, difference, interval, markdown_table, number
from toss_lightning.scores import TokenScores
from toss_lightning.selection import ChainSelection

Comparison = tuple[Content, Path]
"""What it found, and where it lies."""
Found = Mapping[float, Comparison]
"""Share of harmful rows -> the comparison made with it."""
METHODS = ("plain SFT", "TOSS", "TOSS-Chain, automatic")
"""Of which it is shown what they do at each share."""


def page(found: Found, risky: Comparison | None, command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        found: as said above.
        risky: the comparison on harmless rows that were ranked as eroding safety most; None: not made.
        command: what wrote this.
        setup: what was done, in words.
    """
    lines = heading("What it costs to be careful", f"`{command}`", setup)
    if found:
        lines += ["", *_table({f"{at:.0%}": one for at, one in sorted(found.items())}, METHODS), ""]
        lines += _notes([content for content, _ in found.values()])
    if risky is not None:
        lines += [
            "",
            "## Harmless rows that erode safety most",
            "",
            "Custom rows are those of Stanford Alpaca that He et al. (2024) ranked as eroding safety most; none is",
            "harmful. The task loss is that of held-out rows of the same kind.",
            "",
            *_table({"risky": risky}, risky[0]["methods"]),
            "",
            spread(risky[0]),
            *unfinished(risky[0]),
            "",
            "What the scores say of these rows, and of the custom set of the results table: quartiles of the rows'",
            "mean scores, in nats, and the temperature by which TOSS-Chain, having fitted it, divides scores: the",
            "higher it is, the less a score tells.",
            "",
            *_scores_table(risky),
        ]
    return "\n".join([*lines, ""])


def _table(found: Mapping[str, Comparison], methods: Sequence[str]) -> list[str]:
    lines: list[list[str]] = []
    most = max(most_seeds(content) for content, _ in found.values())
    measures = list(measures_of(next(iter(found.values()))[0]))
    for at, (content, directory) in found.items():
        of, seeds = measures_of(content), most_seeds(content)
        where = at if seeds == most else f"{at} ({seeds} {'seed' if seeds == 1 else 'seeds'})"
        for name in [content["base"], *(one for one in methods if one in content["methods"])]:
            cells = [interval(of[key]["models"].get(name), of[key]["share"]) for key in measures]
            cells += [_against_baseline(content, name)]
            cells += [share(one) for one in masked(directory, name, content["seeds"].get(name, []))]
            lines.append([where, called(content, name), *cells])
    header = ["harmful rows", "", *(SHOWN[key] for key in measures), "task loss − plain SFT's"]
    return markdown_table([*header, "masked", "of harmful tokens"], lines)


def _against_baseline(content: Content, name: str) -> str:
    """The price in task loss, marked where it is beyond noise."""
    for one in measures_of(content)[TASK]["differences"]:
        if (one["of"], one["against"]) == (name, content["baseline"]) and "mean" in one:
            sign = " *" if one.get("beyond_noise") else ""
            return difference(one, False) + sign
    return DASH


def _scores_table(risky: Comparison) -> list[str]:
    content, directory = risky
    seeds = max(content["seeds"].values(), key=len)
    lines = []
    for title, where in (("risky", "scores/risky"), (f"{SHARE:.0%} harmful", "references")):
        found = []
        for seed in seeds:
            scores = TokenScores(directory.parent / where / f"seed-{seed}" / "scores")
            quartiles = np.quantile([row.mean() for row in scores.per_row(scores.score())], [0.25, 0.5, 0.75])
            found.append([*quartiles, ChainSelection(discard=None).select(scores).report["chain"]["temperature"]])
        *means, temperature = np.mean(found, axis=0)
        lines.append([title, *(number(value, False, True) for value in means), f"{temperature:.1f}"])
    return markdown_table(["custom rows", "lower quartile", "median", "upper quartile", "temperature"], lines)


def _notes(contents: Sequence[Content]) -> list[str]:
    alone = " Of one seed, intervals are over the prompts." if 1 in map(most_seeds, contents) else ""
    return [
        spread(max(contents, key=most_seeds)) + alone,
        "A star: beyond noise, p < 0.05 after Holm's adjustment over all pairs of the comparison. Masked: response",
        "tokens of weight 0.",
    ]


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
        if one is not None:
            yield 100 * at, Point.of(one)


def _masked(found: Found, method: str) -> Iterator[tuple[float, float]]:
    for at, (content, directory) in found.items():
        value, _ = masked(directory, method, content["seeds"].get(method, []))
        if value is not None:
            yield 100 * at, value
