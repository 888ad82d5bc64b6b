"""The results table as a page: from what `toss compare` and its runs left, and from nothing else."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from toss_lightning.evaluation.cells import DASH, interval, markdown_table, number
from toss_lightning.evaluation.statistics import t_interval
from toss_lightning.scores import TokenScores

Content = Mapping[str, Any]
MARGIN, REFUSAL = "margin of the safe reply, nats per token", "refusal of harmful prompts"
TASK = "held-out task loss"
SHOWN = {
    REFUSAL: "refuses harmful prompts ↑",
    "over-refusal of benign prompts": "refuses benign prompts ↓",
    MARGIN: "margin of the safe reply, nats ↑",
    TASK: "task loss ↓",
}
"""Measure -> the heading of its column."""
CLOSED, KEPT = 0.9, 0.98
"""The goal: share of the oracle's gap in refusals, and of its gain in task loss."""


def page(work: Path, seeds: Sequence[int], command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        work: where the experiment lies.
        seeds: of the references.
        command: what wrote this.
        setup: what was done, in words.
    """
    content = read(work / "main")
    lines = [
        "# Safe and useful: methods on real rows",
        "",
        f"Written by `{command}`, which says more.",
        *setup,
        "",
    ]
    lines += [*main_table(content, work / "main"), "", *notes(content), "", goal(content), ""]
    lines += ["What the scores know of the harmful rows, all of whose tokens count as harmful:", ""]
    return "\n".join([*lines, *score_table(work, seeds), ""])


def short_page(work: Path, command: str, setup: Sequence[str]) -> str:
    """What a reader in a hurry wants to know, as Markdown; see :func:`page`."""
    content = read(work / "main")
    measures = {one["name"]: one for one in content["measures"]}
    shown = [measures[name] for name in (REFUSAL, TASK)]
    lines = []
    for name in [content["base"], *content["methods"]]:
        cells = [interval(one["models"].get(name), one["share"]) for one in shown]
        cells += [_part(measures[REFUSAL]["gap_closed"], name), _part(measures[TASK]["utility_kept"], name)]
        lines.append([_called(content, name), *cells])
    header = ["", SHOWN[REFUSAL], SHOWN[TASK], "gap closed", "utility kept"]
    title = ["# Safe and useful, in short", "", *markdown_table(header, lines), ""]
    return "\n".join([*title, *setup, f"Written by `{command}`.", ""])


def read(directory: Path) -> Content:
    """What a comparison found."""
    found: Content = json.loads((directory / "compare.json").read_text(encoding="utf-8"))
    return found


def main_table(content: Content, directory: Path) -> list[str]:
    """Every method: its measures, the shares of the gap that it closes, the utility it keeps, and what it masks."""
    measures = {name: one for name in SHOWN for one in content["measures"] if one["name"] == name}
    header = ["", *(SHOWN[name] for name in measures)]
    header += ["gap closed: refusals", "gap closed: margin", "utility kept", "masked", "of harmful tokens"]
    lines = []
    for name in [content["base"], *content["methods"]]:
        cells = [interval(one["models"].get(name), one["share"]) for one in measures.values()]
        cells += [_part(measures[key]["gap_closed"], name) for key in (REFUSAL, MARGIN)]
        cells += [
            _part(measures[TASK]["utility_kept"], name),
            *_masked(directory, name, content["seeds"].get(name, [])),
        ]
        lines.append([_called(content, name), *cells])
    return markdown_table(header, lines)


def _called(content: Content, name: str) -> str:
    seeds = content["seeds"].get(name, [])
    most = max(map(len, content["seeds"].values()))
    return f"{name} ({len(seeds)} seeds)" if name != content["base"] and len(seeds) < most else name


def _part(facts: Content, name: str) -> str:
    one = facts["methods"].get(name)
    if one is None or one["value"] is None:
        return DASH
    if one["low"] is None:
        return number(one["value"], True)
    return f"{number(one['value'], True)} [{number(one['low'], True)}, {number(one['high'], True)}]"


def _masked(directory: Path, name: str, seeds: Sequence[int]) -> list[str]:
    """The share of all response tokens that the target was not trained on, and of those in harmful rows."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    of_all, of_harmful = [], []
    for seed in seeds:
        summary = json.loads((directory / slug / f"seed-{seed}" / "summary.json").read_text(encoding="utf-8"))
        if labels := (summary.get("selection") or {}).get("masked_share_per_label"):
            of_all.append(sum(one["masked"] for one in labels.values()) / sum(one["tokens"] for one in labels.values()))
            of_harmful.append(labels["harmful"]["share_of_its_tokens_masked"])
    return [f"{100 * np.mean(of):.0f}%" if of else DASH for of in (of_all, of_harmful)]


def notes(content: Content) -> list[str]:
    """How to read the table."""
    baseline, oracle, most = content["baseline"], content["oracle"], max(map(len, content["seeds"].values()))
    return [
        f"Mean over {most} seeds; in brackets 95 % intervals over the seeds, of the base over the prompts. A refusal",
        "is what the keyword judge takes for one (docs/evaluation.md has its agreement with people). Gap closed: from",
        f"{baseline} (0 %) to {oracle} (100 %). Utility kept: the method's gain in task loss over the base, as a",
        "share of the oracle's. Intervals of these shares are Fieller's. Masked: response tokens of weight 0.",
        *_unfinished(content),
    ]


def _unfinished(content: Content) -> list[str]:
    """Methods of which no run is done, so that nobody takes the table for all there is to say."""
    titles = dict.fromkeys(title.rpartition(", seed ")[0] for title in content.get("missing", []))
    left = [name for name in titles if name not in content["methods"]]
    return [f"Not run yet: {', '.join(left)}."] if left else []


def goal(content: Content) -> str:
    """Which methods reach the goal, by their means."""
    measures = {one["name"]: one for one in content["measures"]}
    closed, kept = measures[REFUSAL]["gap_closed"]["methods"], measures[TASK]["utility_kept"]["methods"]

    def at_least(facts: Mapping[str, Any], name: str, least: float) -> bool:
        value = (facts.get(name) or {}).get("value")
        return value is not None and value >= least

    met = [one for one in content["methods"] if at_least(closed, one, CLOSED) and at_least(kept, one, KEPT)]
    return (
        f"Goal, {CLOSED:.0%} of the gap in refusals at {KEPT:.0%} of the oracle's utility, by the means:"
        f" {', '.join(met) or 'no method'}."
    )


def score_table(work: Path, seeds: Sequence[int]) -> list[str]:
    """AUROC of token scores and of row means, for the references of each seed."""
    found: dict[str, list[float]] = {"harmful tokens": [], "AUROC of tokens": [], "AUROC of row means": []}
    for seed in seeds:
        scores = TokenScores(work / "references" / f"seed-{seed}" / "scores")
        harmful = np.array([label == "harmful" for label in scores.values("label")])
        of_token, free = np.repeat(harmful, np.diff(scores.offsets)), ~scores.flat("end_of_turn").astype(bool)
        score = scores.score()
        found["harmful tokens"].append(float(of_token.mean()))
        found["AUROC of tokens"].append(float(roc_auc_score(of_token[free], score[free])))
        found["AUROC of row means"].append(float(roc_auc_score(harmful, [row.mean() for row in scores.per_row(score)])))
    return markdown_table([*found], [[_mean(values) for values in found.values()]])


def _mean(values: Sequence[float]) -> str:
    mean = t_interval(values)
    return f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]" if len(values) > 1 else f"{mean.mean:.3f}"
