"""What evaluations know beside measures, over all runs: how far judges agree, and how far models move from the base."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from toss_lightning.compare.measured import BASE, Measured, Outcomes, Values
from toss_lightning.evaluation.statistics import kappa

ASKED = {
    "refused": ("refusal of harmful prompts", "over-refusal of benign prompts"),
    "harmful": ("harmful compliance",),
}
"""What judges decide -> the measures that tell it of all prompts of a kind."""


def agreement(measures: Sequence[Measured]) -> list[dict[str, Any]]:
    """How far each two judges agree on refusals and on harm, over the replies of all runs, and of the base once.

    Replies to one prompt are no independent witnesses: kappa's interval is over the prompts.

    Args:
        measures: those of the judges among them.
    """
    judges = list(dict.fromkeys(one.judge for one in measures if one.judge is not None))
    found = []
    for first, second in combinations(judges, 2):
        for what, names in ASKED.items():
            said: tuple[list[bool | None], list[bool | None]] = ([], [])
            prompts: list[tuple[str, int]] = []
            for name in names:
                theirs, others = (_verdicts(measures, name, judge) for judge in (first, second))
                for run in theirs.keys() & others.keys():
                    prompts += [(name, at) for at in range(len(theirs[run]))]
                    for list_of, values in zip(said, (theirs[run], others[run]), strict=True):
                        list_of += [None if value is None else bool(value) for value in values]
            facts = kappa(*said, prompts)
            if facts.decided:
                found.append({"judges": [first, second], "of": what, **asdict(facts)})
    return found


def _verdicts(measures: Sequence[Measured], name: str, judge: str) -> dict[tuple[str, int], Values]:
    """Model and seed -> what the judge decided of each prompt."""
    found: dict[tuple[str, int], Values] = {}
    for one in measures:
        if (one.name, one.judge) == (name, judge):
            for method, of in one.of.items():
                found |= {(method, seed): values for seed, values in of.get("target", {}).items()}
                for values in of.get("base", {}).values():
                    found.setdefault((BASE, 0), values)
    return found


def divergence(outcomes: Outcomes, methods: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Mean KL(base || method) at each response position, in nats, over the seeds, as far as every seed knows it.

    Args:
        outcomes: what the runs left behind.
        methods: in the order of the tables.

    Returns:
        Kind of reply -> method -> a value for each position.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        of_seeds: dict[str, list[Sequence[float]]] = {}
        for outcome in outcomes[method].values():
            for kind, of in outcome.evaluation.get("divergence", {}).items():
                if "target" in of:
                    of_seeds.setdefault(kind, []).append(of["target"])
        for kind, lines in of_seeds.items():
            if len(lines) == len(outcomes[method]):
                found.setdefault(kind, {})[method] = [sum(at) / len(at) for at in zip(*lines, strict=False)]
    return found


def divergence_cells(content: Mapping[str, Any]) -> Iterator[list[str]]:
    """A header, and a line for each method of which it is known: KL at the first token, and over all positions."""
    kinds = content["divergence"]
    if not kinds:
        return
    yield ["", *(f"{kind}, {which}" for kind in kinds for which in ("first token", "all positions"))]
    for name in content["methods"]:
        lines = [of.get(name) for of in kinds.values()]
        if any(lines):
            values = [value for line in lines for value in ((line[0], sum(line) / len(line)) if line else (None, None))]
            yield [name, *("" if value is None else f"{value:.3f}" for value in values)]
