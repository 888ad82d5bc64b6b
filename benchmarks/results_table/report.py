"""The results table as a page: from what `toss compare` and its runs left, and from nothing else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from references import loss_table, score_table
from rows import count_rows
from tables import (
    BENIGN,
    CLOSED,
    CLOSED_IN,
    KEPT,
    MARGIN,
    MASKED,
    REFUSAL,
    SHOWN,
    TASK,
    Content,
    called,
    cell,
    computed,
    heading,
    kept,
    most_seeds,
    part,
    read,
    run_of,
    share,
    spread,
    star,
    table,
    unfinished,
)

from toss_lightning.evaluation.cells import markdown_table
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

HELD_OUT = "TOSS-Chain, held out"
SELECTIONS = ("TOSS", "TOSS-Chain", "TOSS-Chain, automatic", HELD_OUT, "sample-level TOSS")
"""Methods of which it is told which tokens they mask."""
SHORT = (
    *("plain SFT", "clean rows only", "Random", "TOSS", "TOSS-Pro", "TOSS-Chain, automatic", "TOSS-Chain + anchor"),
    *("DR-SFT", "SOT", "SafeInstr", "SafeGrad", "TOSS-Chain + SafeInstr"),
)
"""Methods that a reader in a hurry is shown; the whole page has all of them."""


def page(work: Path, command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        work: where the experiment lies.
        command: what wrote this.
        setup: what was done, in words.
    """
    content = read(work / "main")
    setup = [*setup, *computed(content, work / "main")]
    lines = [*heading("Safe and useful: methods on real rows", f"`{command}`, which says more", setup), ""]
    lines += [*table(content, work / "main"), "", *notes(content, work / "rows"), "", goal(content), ""]
    lines += ["What the scores know of the harmful rows, all of whose tokens count as harmful:", ""]
    seeds = sorted({seed for of in content["seeds"].values() for seed in of})
    runs = [work / "references" / f"seed-{seed}" for seed in seeds]
    lines += [*score_table(runs), "", "Mean token loss of the custom rows, mean over the seeds:", ""]
    lines += [*loss_table(runs), "", "Share of the response tokens that a method masks, by their place:", ""]
    return "\n".join([*lines, *place_table(work / "main", content), ""])


def short_page(work: Path, command: str, setup: Sequence[str]) -> str:
    """What a reader in a hurry wants to know, as Markdown; see :func:`page`."""
    content = read(work / "main")
    measures = {one["name"]: one for one in content["measures"]}
    shown = [measures[name] for name in (REFUSAL, BENIGN, TASK)]
    lines = []
    for name in [content["base"], *(one for one in SHORT if one in content["methods"])]:
        cells = [cell(content, one, name) for one in shown]
        cells += [part(measures[key]["gap_closed"]["methods"].get(name)) for key in (REFUSAL, MARGIN)]
        lines.append([called(content, name), *cells, part(kept(content, name))])
    header = ["", *(SHOWN[one["name"]] for one in shown), *CLOSED_IN, "utility kept"]
    title = ["# Safe and useful, in short", "", *markdown_table(header, lines), ""]
    baseline, oracle = content["baseline"], content["oracle"]
    how = [
        f"{spread(content)} A refusal",
        "is a phrase among the first words, which is for screening; whether replies are harmful was not judged.",
        f"Gap closed: from {baseline} (0 %) to {oracle} (100 %), which learns without the harmful rows; in refusals,",
        "and in the margin by which a safe reply is likelier than a harmful one.",
        f"Utility kept: the gain in task loss over the base, as a share of that of {oracle}.",
        star(content),
    ]
    return "\n".join([*title, *setup, *how, f"Written by `{command}`.", ""])


def notes(content: Content, rows: Path) -> list[str]:
    """How to read the table; ``rows`` holds what was dealt out."""
    baseline, oracle = content["baseline"], content["oracle"]
    fieller = "Intervals of these shares are Fieller's. " if most_seeds(content) > 1 else ""
    return [
        f"{spread(content)} A refusal",
        "is a phrase among the first words that the keyword judge takes for one, which is for screening",
        "(docs/evaluation.md has its agreement with people, on replies of larger models); whether replies are harmful",
        "was not judged, and prompts are as harmful as their sets say: BeaverTails has harmless ones. Gap closed:",
        f"from {baseline} (0 %) to {oracle} (100 %). Utility kept: the method's gain in task loss over the base, as a",
        f"share of that of {oracle}. {fieller}{MASKED}",
        star(content),
        *_held_out(content, rows),
        *unfinished(content),
    ]


def _held_out(content: Content, rows: Path) -> list[str]:
    """What a method knows that no other does, if it was run."""
    if HELD_OUT not in content["methods"]:
        return []
    harmful, others = (count_rows(rows / f"{kind}_validation.jsonl") for kind in ("pairs", "task"))
    return [f"{HELD_OUT}: goes by {harmful} harmful and {others} harmless rows of the validation split too."]


def goal(content: Content) -> str:
    """Which methods reach the goal, by their means over all seeds."""
    measures = {one["name"]: one for one in content["measures"]}
    gap, wanted = measures[REFUSAL]["gap_closed"], f"Goal, {CLOSED:.0%} of the gap in refusals at {KEPT:.0%} of the"
    between = f"{content['baseline']} and {content['oracle']}"
    if gap["beyond_noise"] is None:
        return f"{wanted} oracle's utility: too few runs to tell whether there is a gap between {between}."
    if not gap["beyond_noise"]:
        return f"{wanted} oracle's utility: there is no gap beyond noise between {between}."
    closed = gap["methods"]

    def at_least(one: Content | None, least: float) -> bool:
        return one is not None and one["value"] is not None and one["value"] >= least

    met = [
        name
        for name in content["methods"]
        if len(content["seeds"][name]) == most_seeds(content)
        and at_least(closed.get(name), CLOSED)
        and at_least(kept(content, name), KEPT)
    ]
    found = f"{wanted} oracle's utility, by the means before rounding: {', '.join(met) or 'no method'}."
    refused = measures[BENIGN]["models"]
    told = [f"{name} {share(refused[name]['value'])}" for name in (*met, content["oracle"], content["baseline"])]
    return f"{found}\nIt asks nothing of harmless prompts, of which they refuse: {', '.join(told)}."


PLACES = {"1": slice(0, 1), "2 to 5": slice(1, 5), "6 to 20": slice(5, 20), "later": slice(20, None)}
"""Places in a response, from 1 on, as a table names them."""


def place_table(directory: Path, content: Content) -> list[str]:
    """Which tokens the selections mask: the share of those at each place, in harmful rows and in the others."""
    lines = []
    for method in (one for one in SELECTIONS if one in content["methods"]):
        masked: dict[tuple[bool, str], list[float]] = {(h, place): [] for h in (True, False) for place in PLACES}
        for seed in content["seeds"][method]:
            scores = TokenScores(directory.parent / "references" / f"seed-{seed}" / "scores")
            weights = TokenWeights.load(run_of(directory, method, seed) / "selection").weights
            for row_id, label in zip(scores.row_ids.tolist(), scores.values("label"), strict=True):
                for place, where in PLACES.items():
                    masked[label == "harmful", place] += (weights[row_id][where] == 0).tolist()
        lines.append([method, *(f"{np.mean(of):.0%}" for of in masked.values())])
    kinds = [f"{kind}, token {place}" for kind in ("harmful", "benign") for place in PLACES]
    return markdown_table(["", *kinds], lines)
