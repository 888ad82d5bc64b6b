"""Tables of what `toss compare` and its runs left, which the pages of this experiment share."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from toss_lightning.evaluation.cells import DASH, difference, interval, markdown_table, number

Content = Mapping[str, Any]
MARGIN, REFUSAL = "margin of the safe reply, nats per token", "refusal of harmful prompts"
BENIGN, TASK = "over-refusal of benign prompts", "held-out task loss"
SHOWN = {
    REFUSAL: "refuses harmful prompts ↑",
    BENIGN: "refuses benign prompts ↓",
    MARGIN: "margin of the safe reply, nats ↑",
    TASK: "task loss ↓",
}
"""Measure -> the heading of its column."""
SETS = {"beavertails": "BeaverTails", "advbench": "AdvBench", "harmbench": "HarmBench", "xstest": "XSTest"}
"""Prompt sets as their makers call them."""
PRICE = "task loss − plain SFT's"
"""What :func:`price` is headed by."""
CLOSED_IN = ("gap closed: refusals", "gap closed: margin")
"""What the shares of the way from the baseline to the oracle are headed by."""
MASKED = "Masked: response tokens of weight 0."
CLOSED, KEPT = 0.9, 0.98
"""The goal: share of the oracle's gap in refusals, and of its gain in task loss."""


def read(directory: Path) -> Content:
    """What a comparison found."""
    found: Content = json.loads((directory / "compare.json").read_text(encoding="utf-8"))
    return found


def heading(title: str, written: str, setup: Sequence[str]) -> list[str]:
    """How a page begins: its title, what wrote it, and what was done."""
    return [f"# {title}", "", f"Written by {written}.", *setup]


def asked(file: Path) -> list[str]:
    """What is asked of every method, in words, by the configuration of an evaluation."""
    evaluation = yaml.safe_load(file.read_text(encoding="utf-8"))["loop"]["evaluation"]
    prompts = evaluation["prompts"].items()
    sets = [f"{of['rows']} {of.get('label', 'benign')} prompts of {SETS[name]}" for name, of in prompts]
    length = evaluation["sampling"]["max_new_tokens"]
    return [f"Replies are to {', '.join(sets)}; they are greedy, and cut at {length} tokens."]


def computed(content: Content, directory: Path) -> list[str]:
    """On what the runs of a comparison were computed, in words."""
    runs = [run_of(directory, name, seed) for name, seeds in content["seeds"].items() for seed in seeds]
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    kinds = " and ".join(sorted({one["precision"] for one in summaries}))
    devices = sorted({one["device"] for one in summaries if one.get("device", "cpu") != "cpu"})
    if not devices:
        return [f"Computed in {kinds} on a CPU."]
    most = max(one["peak_gpu_memory_mib"] or 0 for one in summaries) / 1024
    return [f"Computed in {kinds} on {' and '.join(devices)}, of whose memory a run took at most {most:.1f} GiB."]


def measures_of(content: Content) -> dict[str, Content]:
    """Those of :data:`SHOWN` that were taken, by name."""
    return {name: one for name in SHOWN for one in content["measures"] if one["name"] == name}


def table(content: Content, directory: Path) -> list[str]:
    """Every method: its measures, the shares of the gap that it closes, the utility it keeps, and what it masks."""
    measures = measures_of(content)
    header = ["", *(SHOWN[name] for name in measures)]
    header += [*CLOSED_IN, "utility kept", "masked", "of harmful tokens"]
    lines = []
    for name in [content["base"], *content["methods"]]:
        cells = [cell(content, one, name) for one in measures.values()]
        cells += [part(measures[key]["gap_closed"]["methods"].get(name)) for key in (REFUSAL, MARGIN)]
        cells += [part(kept(content, name))]
        cells += [share(one) for one in masked(directory, name, content["seeds"].get(name, []))]
        lines.append([called(content, name), *cells])
    return markdown_table(header, lines)


def called(content: Content, name: str) -> str:
    """The name of a method, with the number of its seeds where it has fewer than others."""
    seeds = content["seeds"].get(name, [])
    if name == content["base"] or len(seeds) == most_seeds(content):
        return name
    return f"{name} ({len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'})"


def most_seeds(content: Content) -> int:
    """Of any method."""
    return max(map(len, content["seeds"].values()))


def kept(content: Content, name: str) -> Content | None:
    """The share of the oracle's gain in task loss that a method has; of one seed without an interval."""
    measure = measures_of(content)[TASK]
    if most_seeds(content) > 1 or name in (content["base"], content["oracle"]):
        found: Content | None = measure["utility_kept"]["methods"].get(name)
        return found
    models = measure["models"]
    if name not in models or content["oracle"] not in models:
        return None
    base, oracle, ours = (models[one]["value"] for one in (content["base"], content["oracle"], name))
    if None in (base, oracle, ours) or base <= oracle:  # it has gained nothing to keep a share of
        return None
    return {"value": (base - ours) / (base - oracle), "low": None, "high": None}


def part(one: Content | None) -> str:
    """A method's share of the gap, or of the utility, with its interval."""
    if one is None or one["value"] is None:
        return DASH
    if one["low"] is None:
        # of one seed there is no interval at all
        return number(one["value"], True) + (" [unbounded]" if one.get("over") == "seeds" else "")
    return f"{number(one['value'], True)} [{number(one['low'], True)}, {number(one['high'], True)}]"


def cell(content: Content, measure: Content, name: str) -> str:
    """A method's value with its interval, marked where it differs from the baseline's beyond noise."""
    against = _against_baseline(content, measure, name)
    mark = " *" if against is not None and against.get("beyond_noise") else ""
    return interval(measure["models"].get(name), measure["share"]) + mark


def price(content: Content, name: str) -> str:
    """What a method costs in task loss against the baseline."""
    against = _against_baseline(content, measures_of(content)[TASK], name)
    return DASH if against is None else difference(against, False)


def star(content: Content) -> str:
    """What the mark of :func:`cell` says."""
    seeds = [len(of) for of in content["seeds"].values()]
    alone = " The task loss, one number of each run, is not tested with one seed." if min(seeds) == 1 else ""
    if min(seeds) == 1 < max(seeds):
        alone = " A method with one seed has none, for its differences rest on that seed."
    return (
        f"A star: differs from {content['baseline']} beyond noise, p < 0.05 after Holm's adjustment over all pairs of"
        f" the measure; there is none over measures.{alone}"
    )


def _against_baseline(content: Content, measure: Content, name: str) -> Content | None:
    """A method minus the baseline, if that was taken."""
    pair = (name, content["baseline"])
    return next((one for one in measure["differences"] if (one["of"], one["against"]) == pair and "mean" in one), None)


def run_of(directory: Path, name: str, seed: int) -> Path:
    """Where a run of a comparison lies."""
    return directory / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / f"seed-{seed}"


def masked(directory: Path, name: str, seeds: Sequence[int]) -> tuple[float | None, float | None]:
    """The mean share of all response tokens that the target was not trained on, and of those in harmful rows."""
    of_all, of_harmful = [], []
    for seed in seeds:
        summary = json.loads((run_of(directory, name, seed) / "summary.json").read_text(encoding="utf-8"))
        if labels := (summary.get("selection") or {}).get("masked_share_per_label"):
            of_all.append(sum(one["masked"] for one in labels.values()) / sum(one["tokens"] for one in labels.values()))
            if "harmful" in labels:
                of_harmful.append(labels["harmful"]["share_of_its_tokens_masked"])
    return _mean(of_all), _mean(of_harmful)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def share(value: float | None) -> str:
    """A share in percent, or a dash."""
    return DASH if value is None else number(value, True)


def spread(content: Content) -> str:
    """What the values of a table are, and their intervals."""
    seeds = most_seeds(content)
    if seeds == 1:
        return "One seed; in brackets 95 % intervals over the prompts, which say nothing of another seed."
    alone = any(len(of) == 1 for of in content["seeds"].values())
    return (
        f"Mean over {seeds} seeds; in brackets 95 % intervals over the seeds, of the base"
        f"{', of methods with one seed' if alone else ''} and of values that are the same with every seed over the"
        " prompts.\nThe base, the custom rows and the safe rows are the same with every seed: intervals speak of"
        " references and of training."
    )


def unfinished(content: Content) -> list[str]:
    """Methods of which no run is done, so that nobody takes the table for all there is to say."""
    titles = dict.fromkeys(title.rpartition(", seed ")[0] for title in content.get("missing", []))
    left = [name for name in titles if name not in content["methods"]]
    return [f"Not run yet: {', '.join(left)}."] if left else []
