"""The numbers of a comparison: means over seeds with intervals, and which differences are beyond noise."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toss_lightning.compare.runs import Run
from toss_lightning.compare.settings import CONTROL
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.statistics import holm, paired_difference, paired_difference_over_seeds, t_interval
from toss_lightning.report.summary import LOSSES

BASE = "base model"
"""What the model before training is called."""
NOISE = 0.05
"""Differences whose adjusted p-value is below are beyond noise."""
ORDER = (
    *("harmful compliance", "refusal of harmful", "over-refusal", "right answers", "ROUGE-L", "margin of the safe"),
    "probability of a refusal",
)
"""How the names of measures begin, those of safety first."""
HELD_OUT_BETTER = {"task_loss": "lower", "harmful_loss": "higher", "refusal_loss": "lower"}

Values = Sequence[float | None]


@dataclass(frozen=True)
class Outcome:
    """What a run that is done left behind."""

    evaluation: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Time of the method alone: without evaluation and control."""
        stages = self.summary["stages"]
        return sum(one["seconds"] for name, one in stages.items() if name not in ("test", CONTROL))


Outcomes = Mapping[str, Mapping[int, Outcome]]
"""Method -> seed -> outcome."""


@dataclass(frozen=True)
class Measured:
    """A measure of all runs."""

    name: str
    better: str
    """``higher`` or ``lower``."""
    share: bool
    judge: str | None
    screening: bool
    is_utility: bool
    per_prompt: bool
    """Of each prompt, and not of a whole run."""
    of: dict[str, dict[str, dict[int, Values]]] = field(repr=False)
    """Method -> ``target`` or ``base`` -> seed -> a value per prompt; one value alone where it is of a whole run."""
    intervals: dict[str, dict[int, Mapping[str, Any]]] = field(repr=False, default_factory=dict)
    """Method, or the base's name -> seed -> the interval over the prompts."""

    @property
    def title(self) -> str:
        """Its name, with the judge."""
        judge = f" ({self.judge}{', screening' if self.screening else ''})" if self.judge else ""
        return self.name + judge


def read_outcomes(runs: Sequence[Run]) -> Outcomes:
    """What the runs that are done left behind.

    Raises:
        StoreError: none is done, or a file is damaged.
    """
    found: dict[str, dict[int, Outcome]] = {}
    for run in runs:
        if run.state() == "done":
            found.setdefault(run.method, {})[run.seed] = Outcome(_read(run.evaluation), _read(run.summary))
    if not found:
        raise StoreError(f"{runs[0].directory.parent.parent}: no run is done, so there is nothing to compare")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error}): delete it, and the same command makes it again") from error
    return content


def compare_outcomes(outcomes: Outcomes, methods: Sequence[str], baseline: str) -> dict[str, Any]:
    """Everything as plain values, for ``compare.json``.

    Args:
        outcomes: what the runs left behind.
        methods: in the order of the tables.
        baseline: the method that the others are compared with.

    Raises:
        StoreError: runs were asked different prompts.
    """
    methods = [name for name in methods if name in outcomes]
    measures = [*_of_prompts(outcomes), *_held_out(outcomes)]
    return {
        "baseline": baseline,
        "base": BASE,
        "methods": methods,
        "seeds": {name: sorted(outcomes[name]) for name in methods},
        "measures": [_facts(one, methods, baseline) for one in measures],
        "time": _times(outcomes, methods, baseline),
        "idle": {
            name: reasons
            for name in methods
            if (reasons := sorted({one for of in outcomes[name].values() for one in of.summary.get("idle", [])}))
        },
    }


# --- measures ---------------------------------------------------------------------------------------------------------


def _of_prompts(outcomes: Outcomes) -> list[Measured]:
    """Those of the evaluations, the ones of safety first."""
    found: dict[tuple[str, str | None], Measured] = {}
    for method, of_seed in outcomes.items():
        for seed, outcome in of_seed.items():
            for one in outcome.evaluation["measures"]:
                facts = {key: one[key] for key in ("name", "better", "share", "judge", "screening")}
                new = Measured(**facts, is_utility=one["set"] is not None, per_prompt=True, of={})
                measure = found.setdefault((one["name"], one["judge"]), new)
                for adapter, name in (("target", method), ("base", BASE)):
                    if adapter in one["values"]:
                        values = measure.of.setdefault(method, {}).setdefault(adapter, {})
                        values[seed] = one["values"][adapter]
                        measure.intervals.setdefault(name, {}).setdefault(seed, one["adapters"][adapter])
    for measure in found.values():
        _check_prompts(measure)
    return sorted(found.values(), key=lambda one: (_rank(one.name), one.screening))


def _rank(name: str) -> int:
    return next((at for at, start in enumerate(ORDER) if name.startswith(start)), len(ORDER))


def _check_prompts(measure: Measured) -> None:
    counts = {
        len(values): (method, seed)
        for method, of in measure.of.items()
        for of_seed in of.values()
        for seed, values in of_seed.items()
    }
    if len(counts) > 1:
        said = " and ".join(f"{count} in {method}, seed {seed}" for count, (method, seed) in counts.items())
        raise StoreError(f"{measure.title}: {said} prompts: delete the evaluation of one, and run the comparison again")


def _held_out(outcomes: Outcomes) -> list[Measured]:
    """Held-out losses, of which a run has one each and no prompts are known."""
    found = []
    for key, title in LOSSES.items():
        of: dict[str, dict[str, dict[int, Values]]] = {}
        for method, of_seed in outcomes.items():
            for seed, outcome in of_seed.items():
                for adapter in ("target", "base"):
                    value = outcome.summary["held_out"].get(adapter, {}).get(key)
                    if value is not None:
                        of.setdefault(method, {}).setdefault(adapter, {})[seed] = [value]
        if of:
            found.append(Measured(f"held-out {title}", HELD_OUT_BETTER[key], False, None, False, False, False, of))
    return found


# --- numbers ----------------------------------------------------------------------------------------------------------


def _facts(measure: Measured, methods: Sequence[str], baseline: str) -> dict[str, Any]:
    models = {name: _mean(measure, name) for name in methods if "target" in measure.of.get(name, {})}
    own_base = {name: of["base"] for name, of in measure.of.items() if "base" in of}
    if own_base:
        models = {BASE: _mean_of_base(measure, own_base.get(baseline) or next(iter(own_base.values())))} | models
    return {
        "name": measure.name,
        "title": measure.title,
        "judge": measure.judge,
        "screening": measure.screening,
        "better": measure.better,
        "share": measure.share,
        "is_utility": measure.is_utility,
        "per_prompt": measure.per_prompt,
        "models": models,
        "differences": _differences(measure, methods, baseline),
    }


def _mean(measure: Measured, method: str) -> dict[str, Any]:
    """Over the seeds; where these are one, or all the same, with the interval over the prompts."""
    by_seed = measure.of[method]["target"]
    known = {seed: [one for one in values if one is not None] for seed, values in by_seed.items()}
    counts = {
        "seeds": len(by_seed),
        "n": min(len(values) for values in known.values()),
        "undecided": sum(len(by_seed[seed]) - len(values) for seed, values in known.items()),
    }
    means = [sum(values) / len(values) for values in known.values() if values]
    # seeds that all give the same would make an interval without width, as if no prompt could go another way
    if len(set(means)) > 1:
        interval = t_interval(means)
        ends = (interval.low, interval.high)
        low, high = (min(max(end, 0.0), 1.0) for end in ends) if measure.share else ends
        return {"value": interval.mean, "low": low, "high": high, "over": "seeds", **counts}
    if (alone := next((seed for seed, values in known.items() if values), None)) is None:
        return {"value": None, "low": None, "high": None, "over": "prompts", **counts}
    return {"value": means[0], **_ends(measure, method, alone), "over": "prompts", **counts}


def _ends(measure: Measured, name: str, seed: int) -> dict[str, Any]:
    """Of the interval over the prompts of one run."""
    interval = measure.intervals.get(name, {}).get(seed, {})
    return {"low": interval.get("low"), "high": interval.get("high")}


def _mean_of_base(measure: Measured, by_seed: Mapping[int, Values]) -> dict[str, Any]:
    """The base has no seed: what it says is the same in every run, and its interval is over the prompts."""
    first = min(by_seed)
    known = [one for one in by_seed[first] if one is not None]
    return {
        "value": sum(known) / len(known) if known else None,
        **_ends(measure, BASE, first),
        "over": "prompts",
        "seeds": 0,
        "n": len(known),
        "undecided": len(by_seed[first]) - len(known),
    }


def _differences(measure: Measured, methods: Sequence[str], baseline: str) -> list[dict[str, Any]]:
    """Each method against the baseline and against the base, adjusted for how many of them there are."""
    found = []
    for name in methods:
        ours = measure.of.get(name, {})
        opponents = {baseline: measure.of.get(baseline, {}).get("target", {})} if name != baseline else {}
        for against, theirs in (opponents | {BASE: ours.get("base", {})}).items():
            found.append(
                {"of": name, "against": against, **_difference(ours.get("target", {}), theirs, measure.per_prompt)}
            )
    tested = [one for one in found if "p" in one]
    # a p-value of 1 may be above it by rounding
    for one, adjusted in zip(tested, holm([min(one["p"], 1.0) for one in tested]) if tested else [], strict=True):
        one["p_holm"] = adjusted
        one["beyond_noise"] = adjusted < NOISE
        one["better"] = (one["mean"] > 0) == (measure.better == "higher")
    return found


def _difference(ours: Mapping[int, Values], theirs: Mapping[int, Values], per_prompt: bool) -> dict[str, Any]:
    """Over the seeds of both and the prompts that are decided in all of their runs."""
    seeds = sorted(ours.keys() & theirs.keys())
    rows = [*zip(*(ours[seed] for seed in seeds), *(theirs[seed] for seed in seeds), strict=True)]
    decided = [[one for one in row if one is not None] for row in rows]
    decided = [row for row in decided if len(row) == 2 * len(seeds)]
    facts: dict[str, Any] = {"seeds": len(seeds), "n": len(decided), "undecided": len(rows) - len(decided)}
    if not per_prompt:
        # a value for the whole run: as two prompts that always agree, it makes this the paired t-test over seeds
        decided = decided * 2
    if len(decided) < 2 or (not per_prompt and len(seeds) < 2):
        return facts
    columns = [*zip(*decided, strict=True)]
    left, right = columns[: len(seeds)], columns[len(seeds) :]
    if len(seeds) > 1:
        return facts | asdict(paired_difference_over_seeds(left, right)) | {"over": "seeds"}
    return facts | asdict(paired_difference(left[0], right[0])) | {"over": "prompts"}


def _times(outcomes: Outcomes, methods: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Time of training with all that a method needs, over that of the baseline with the same seed."""
    found = {}
    for name in methods:
        plain = outcomes.get(baseline, {})
        seeds = [seed for seed in sorted(outcomes[name]) if seed in plain and plain[seed].seconds]
        ratios = [outcomes[name][seed].seconds / plain[seed].seconds for seed in seeds]
        seconds = [one.seconds for one in outcomes[name].values()]
        interval = t_interval(ratios) if ratios else None
        with_ends = interval if interval is not None and len(ratios) > 1 and name != baseline else None
        found[name] = {
            "seconds": sum(seconds) / len(seconds),
            "value": interval.mean if interval else None,
            "low": max(0.0, with_ends.low) if with_ends else None,
            "high": with_ends.high if with_ends else None,
            "seeds": len(ratios),
        }
    return found
