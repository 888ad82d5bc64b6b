"""How far methods come toward an oracle: the share they close of its gap to the baseline, the utility they keep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from toss_lightning.compare.measured import BASE, Measured, Values
from toss_lightning.evaluation.ratios import ratio_over_seeds

Columns = Sequence[Mapping[int, Values]]
"""Of some models, seed -> a value per prompt."""


def toward_oracle(
    measure: Measured, methods: Sequence[str], differences: Sequence[Mapping[str, Any]], baseline: str, oracle: str
) -> dict[str, Any]:
    """What a measure says of the methods between baseline and oracle, for ``compare.json``.

    Args:
        measure: the measure.
        methods: in the order of the tables.
        differences: what is known of the measure's differences, the oracle's among them.
        baseline: the method at 0 %.
        oracle: the method at 100 %.

    Returns:
        ``gap_closed``, and ``utility_kept`` where it is a measure of utility; ``methods`` in them is empty where what
        it would be a share of is not beyond noise.
    """
    found = {"gap_closed": _gap_closed(measure, methods, differences, baseline, oracle)}
    return found | (
        {"utility_kept": _utility_kept(measure, methods, differences, oracle)} if measure.is_utility else {}
    )


def _gap_closed(
    measure: Measured, methods: Sequence[str], differences: Sequence[Mapping[str, Any]], baseline: str, oracle: str
) -> dict[str, Any]:
    gap = _find(differences, oracle, baseline)
    found = {}
    for name in methods:
        if gap.get("beyond_noise") and name not in (baseline, oracle):
            seeds = _seeds_of([measure.comparable(one) for one in (name, baseline, oracle)])
            found[name] = _ratio([(ours - zero, full - zero) for ours, zero, full in seeds])
    return {"beyond_noise": gap.get("beyond_noise"), "oracle_better": gap.get("better"), "methods": found}


def _utility_kept(
    measure: Measured, methods: Sequence[str], differences: Sequence[Mapping[str, Any]], oracle: str
) -> dict[str, Any]:
    """The oracle's value is 100 %; of a loss, which has no meaningful 0, what it gains over the base."""
    others = [name for name in methods if name != oracle]
    if measure.better == "higher":
        pairs = {name: _seeds_of([measure.comparable(one) for one in (name, oracle)]) for name in others}
        kept = {name: _ratio([(ours, full) for ours, full in seeds]) for name, seeds in pairs.items()}
        return {"of": "value", "methods": kept}
    gain = _find(differences, oracle, BASE)
    found = {}
    for name in others:
        if gain.get("beyond_noise") and gain["better"]:
            columns = [measure.comparable(name), measure.comparable(oracle, "base"), measure.comparable(oracle)]
            seeds = _seeds_of(columns)
            found[name] = _ratio([(zero - ours, zero - full) for ours, zero, full in seeds])
    facts = {"beyond_noise": gain.get("beyond_noise"), "oracle_better": gain.get("better")}
    return {"of": "gain over the base", **facts, "methods": found}


def _find(differences: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> Mapping[str, Any]:
    return next((one for one in differences if (one["of"], one["against"]) == (ours, theirs)), {})


def _seeds_of(columns: Columns) -> list[list[float]]:
    """For each seed that all have, the mean of each over the prompts that are decided in all of their runs."""
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in columns)))
    values = [of_seed[seed] for seed in seeds for of_seed in columns]
    decided = [row for row in zip(*values, strict=True) if None not in row]
    if not decided:
        return []
    means = [sum(column) / len(decided) for column in zip(*decided, strict=True)]
    return [means[at : at + len(columns)] for at in range(0, len(means), len(columns))]


def _ratio(seeds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The ratio of the means of two numbers per seed; ``over`` is None where seeds make no interval."""
    if not seeds:
        return {"value": None, "low": None, "high": None, "over": None, "seeds": 0}
    found = ratio_over_seeds([ours for ours, _ in seeds], [full for _, full in seeds])
    # seeds that all give the same would make an interval without width
    over = "seeds" if len({*seeds}) > 1 else None
    ends = (found.low, found.high) if over and math.isfinite(found.low) else (None, None)
    return {"value": found.ratio, "low": ends[0], "high": ends[1], "over": over, "seeds": len(seeds)}
