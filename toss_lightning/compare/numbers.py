"""The numbers of a comparison: means over seeds with intervals, and which differences are beyond noise."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from toss_lightning.compare.beside import agreement, divergence
from toss_lightning.compare.measured import (
    BASE,
    Measured,
    Outcome,
    Outcomes,
    Values,
    held_out,
    in_order,
    known,
    of_prompts,
    unlike,
)
from toss_lightning.compare.oracle import toward_oracle
from toss_lightning.evaluation.noise import judged
from toss_lightning.evaluation.statistics import paired_difference, paired_difference_over_seeds, t_interval


def compare_outcomes(
    outcomes: Outcomes,
    methods: Sequence[str],
    baseline: str,
    oracle: str | None = None,
    further: Sequence[Measured] = (),
    against: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything as plain values, for ``compare.json``.

    Args:
        outcomes: what the runs left behind.
        methods: in the order of the tables.
        baseline: the method that the others are compared with.
        oracle: the method that stands for the best there could be, if one does.
        further: measures beside those of the evaluations.
        against: methods that the others are compared with too.

    Raises:
        StoreError: runs were asked different prompts.
    """
    methods = [name for name in methods if name in outcomes]
    asked = of_prompts(outcomes)
    measures = [*in_order([*asked, *further]), *held_out(outcomes)]
    opponents = [baseline, *(name for name in against if name in methods and name != baseline)]
    several = any(len(outcomes[name]) > 1 for name in methods)
    return {
        "baseline": baseline,
        "oracle": oracle,
        "base": BASE,
        "methods": methods,
        "seeds": {name: sorted(outcomes[name]) for name in methods},
        "measures": [_facts(one, methods, opponents, oracle, several) for one in measures],
        "agreement": agreement(asked),
        "divergence": divergence(outcomes, methods),
        "time": _times(outcomes, methods, baseline),
        "idle": {name: reasons for name in methods if (reasons := _idle(outcomes[name]))},
        "weak": {name: reasons for name in methods if (reasons := _of_seeds(outcomes[name], "weak"))},
        "stopped": {name: reasons for name in methods if (reasons := _of_seeds(outcomes[name], "stopped"))},
        "failed_judges": {name: reasons for name in methods if (reasons := _failed_judges(outcomes[name]))},
        "unlike": unlike(outcomes),
        "runs": [_run(name, seed, outcomes, measures) for name in methods for seed in sorted(outcomes[name])],
    }


def _run(method: str, seed: int, outcomes: Outcomes, measures: Sequence[Measured]) -> dict[str, Any]:
    """What one run measured, of which the others are means."""
    numbers = {one.title: known(one.of.get(method, {}).get("target", {}).get(seed, [])) for one in measures}
    values = {title: sum(of) / len(of) if of else None for title, of in numbers.items()}
    return {"method": method, "seed": seed, "seconds": outcomes[method][seed].seconds, "values": values}


def _idle(runs: Mapping[int, Outcome]) -> list[str]:
    return sorted({reason for run in runs.values() for reason in run.summary.get("idle", [])})


def _of_seeds(runs: Mapping[int, Outcome], key: str) -> list[str]:
    """What the summaries say there of each stage."""
    of_seeds = sorted(runs.items())
    return [f"seed {seed}: {reason}" for seed, run in of_seeds for reason in run.summary.get(key, {}).values()]


def _failed_judges(runs: Mapping[int, Outcome]) -> list[str]:
    return [
        f"seed {seed}: {judge} has not judged: {why}"
        for seed, run in sorted(runs.items())
        for judge, why in run.evaluation.get("failed_judges", {}).items()
    ]


def _facts(
    measure: Measured, methods: Sequence[str], opponents: Sequence[str], oracle: str | None, several: bool
) -> dict[str, Any]:
    baseline = opponents[0]
    models = {name: _mean(measure, name) for name in methods if "target" in measure.of.get(name, {})}
    own_base = {name: of["base"] for name, of in measure.of.items() if "base" in of}
    if own_base:
        models = {BASE: _mean_of_base(measure, own_base.get(baseline) or next(iter(own_base.values())))} | models
    differences = _differences(measure, methods, opponents, several)
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
        "differences": differences,
        **(toward_oracle(measure, methods, differences, baseline, oracle) if oracle is not None else {}),
    }


def _mean(measure: Measured, method: str) -> dict[str, Any]:
    """Over the seeds; where these are one, or all the same, with the interval over the prompts.

    There is none where a seed is without a number, see :meth:`Measured.without_number`.
    """
    by_seed, without = measure.of[method]["target"], measure.without_number(method)
    numbers = {seed: known(values) for seed, values in by_seed.items()}
    counts = {
        "seeds": len(by_seed) - len(without),
        "n": min(len(values) for values in numbers.values()),
        "undecided": sum(len(by_seed[seed]) - len(values) for seed, values in numbers.items()),
        "without_number": len(without),
    }
    if without:
        return {"value": None, "low": None, "high": None, "over": None, **counts}
    means = [sum(values) / len(values) for values in numbers.values()]
    # seeds that all give the same would make an interval without width, as if no prompt could go another way
    if len(set(means)) > 1:
        interval = t_interval(means, bounded=measure.share or measure.bounded)
        return {"value": interval.mean, "low": interval.low, "high": interval.high, "over": "seeds", **counts}
    return {"value": means[0], **_ends(measure, method, next(iter(numbers))), "over": "prompts", **counts}


def _ends(measure: Measured, name: str, seed: int) -> dict[str, Any]:
    """Of the interval over the prompts of one run."""
    interval = measure.intervals.get(name, {}).get(seed, {})
    return {"low": interval.get("low"), "high": interval.get("high")}


def _mean_of_base(measure: Measured, by_seed: Mapping[int, Values]) -> dict[str, Any]:
    """The base has no seed: what it says is the same in every run, and its interval is over the prompts."""
    first = min(by_seed)
    numbers = known(by_seed[first])
    return {
        "value": sum(numbers) / len(numbers) if numbers else None,
        **_ends(measure, BASE, first),
        "over": "prompts",
        "seeds": 0,
        "n": len(numbers),
        "undecided": len(by_seed[first]) - len(numbers),
    }


def _differences(
    measure: Measured, methods: Sequence[str], opponents: Sequence[str], several: bool
) -> list[dict[str, Any]]:
    """Each method against the opponents and against the base, adjusted for how many of them there are."""
    found = []
    for name in methods:
        # of two opponents, the earlier one is what the later is compared with
        others = opponents[: opponents.index(name)] if name in opponents else opponents
        for against, theirs in ({one: (one, "target") for one in others} | {BASE: (name, "base")}).items():
            values = measure.comparable(name), measure.comparable(*theirs)
            without = len(measure.without_number(name)) + len(measure.without_number(*theirs))
            facts = {"of": name, "against": against, **_difference(*values, measure.per_prompt)}
            found.append(facts | {"without_number": without})
    of_all = judged(found, measure.better)
    # among several seeds, the prompts of one alone decide nothing
    return [one | {"beyond_noise": None} if several and one.get("over") == "prompts" else one for one in of_all]


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
