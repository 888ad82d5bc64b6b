"""Harmless rows that erode safety, as a page: what methods do on them, and how little scores say of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rows import SHARE
from tables import (
    MASKED,
    PRICE,
    SHOWN,
    Content,
    called,
    cell,
    computed,
    heading,
    masked,
    measures_of,
    price,
    read,
    share,
    spread,
    star,
    unfinished,
)

from toss_lightning.evaluation.cells import markdown_table, number
from toss_lightning.scores import TokenScores
from toss_lightning.selection import ChainSelection


def page(work: Path, command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        work: where the experiment lies.
        command: what wrote this.
        setup: what was done, in words.
    """
    content = read(work / "risky")
    lines = [
        *heading("Harmless rows that erode safety", f"`{command}`", [*setup, *computed(content, work / "risky")]),
        "Custom rows are those of Stanford Alpaca that He et al. (2024) ranked as eroding safety most; none is",
        "harmful. The task loss is that of held-out rows of the same kind.",
        "",
        *_table(content, work / "risky"),
        "",
        spread(content),
        star(content),
        MASKED,
        *unfinished(content),
        "",
        "What the scores say of these rows, and of the custom set of the results table: quartiles of the rows'",
        "mean scores, in nats, mean over the seeds; and the temperature by which TOSS-Chain, having fitted it,",
        "divides scores, least to greatest of the seeds: the higher it is, the less a score tells.",
        "",
        *_scores_table(work, max(content["seeds"].values(), key=len)),
    ]
    return "\n".join([*lines, ""])


def _table(content: Content, directory: Path) -> list[str]:
    of, lines = measures_of(content), []
    for name in [content["base"], *content["methods"]]:
        cells = [cell(content, one, name) for one in of.values()]
        of_all, _ = masked(directory, name, content["seeds"].get(name, []))
        lines.append([called(content, name), *cells, price(content, name), share(of_all)])
    return markdown_table(["", *(SHOWN[name] for name in of), PRICE, "masked"], lines)


def _scores_table(work: Path, seeds: Sequence[int]) -> list[str]:
    lines = []
    for title, where in (("these", "scores/risky"), (f"{SHARE:.0%} harmful", "references")):
        stores = [TokenScores(work / where / f"seed-{seed}" / "scores") for seed in seeds]
        means = [[row.mean() for row in scores.per_row(scores.score())] for scores in stores]
        quartiles = np.mean([np.quantile(one, [0.25, 0.5, 0.75]) for one in means], axis=0)
        temperatures = sorted(
            ChainSelection(discard=None).select(scores).report["chain"]["temperature"] for scores in stores
        )
        told = ", ".join(f"{one:,.1f}" for one in temperatures)
        lines.append([title, *(number(value, False, True) for value in quartiles), told])
    return markdown_table(["custom rows", "lower quartile", "median", "upper quartile", "temperatures"], lines)
