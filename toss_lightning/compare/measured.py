"""What runs left behind, as measures of methods x seeds x prompts."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toss_lightning.compare.runs import Run
from toss_lightning.compare.settings import CONTROL
from toss_lightning.errors import StoreError
from toss_lightning.report.summary import LOSSES

BASE = "base model"
"""What the model before training is called."""
ORDER = (
    *("harmful compliance", "refusal of harmful", "over-refusal", "right answers", "ROUGE-L", "win rate"),
    *("task loss of a row", "margin of the safe", "probability of a refusal"),
)
"""How the names of measures begin, those of safety first; another one of utility stands beside ROUGE-L."""
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


@dataclass
class Measured:
    """A measure of all runs."""

    name: str
    better: str
    """``higher`` or ``lower``."""
    share: bool
    """Of each prompt it is 0 or 1 in every run, or 1/2 where a win rate has a tie; tables tell it in percent."""
    judge: str | None
    screening: bool
    is_utility: bool
    per_prompt: bool
    """Of each prompt, and not of a whole run."""
    of: dict[str, dict[str, dict[int, Values]]] = field(repr=False)
    """Method -> ``target`` or ``base`` -> seed -> a value per prompt; one value alone where it is of a whole run.

    None where a judge did not decide, or where it is no number.
    """
    intervals: dict[str, dict[int, Mapping[str, Any]]] = field(repr=False, default_factory=dict)
    """Method, or the base's name -> seed -> the interval over the prompts."""
    bounded: bool = False
    """Values lie between 0 and 1, but need be neither."""

    @property
    def title(self) -> str:
        """Its name, with the judge."""
        judge = f" ({self.judge}{', screening' if self.screening else ''})" if self.judge else ""
        return self.name + judge

    def without_number(self, method: str, adapter: str = "target") -> list[int]:
        """Seeds of which nothing is known, as of a run that diverged.

        The mean of the others would flatter the method, so it has none, and is not tested.
        """
        return [seed for seed, values in self.of.get(method, {}).get(adapter, {}).items() if not known(values)]

    def comparable(self, method: str, adapter: str = "target") -> Mapping[int, Values]:
        """Seed -> its values; no seed at all where one is without a number."""
        return {} if self.without_number(method, adapter) else self.of.get(method, {}).get(adapter, {})


def known(values: Values) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]


def read_outcomes(runs: Sequence[Run]) -> Outcomes:
    """What the runs that are done left behind, be it without what judges that failed would have said.

    Raises:
        StoreError: none is done, or a file is damaged.
    """
    found: dict[str, dict[int, Outcome]] = {}
    for run in runs:
        if run.is_measured:
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


def of_prompts(outcomes: Outcomes) -> list[Measured]:
    """Those of the evaluations.

    Raises:
        StoreError: runs were asked different prompts.
    """
    found: dict[tuple[str, str | None], Measured] = {}
    rows: dict[str, set[str | None]] = {}
    for method, of_seed in outcomes.items():
        for seed, outcome in of_seed.items():
            for one in outcome.evaluation["measures"]:
                facts = {key: one[key] for key in ("name", "better", "share", "judge", "screening")}
                is_utility = one.get("utility", one["set"] is not None)  # older results do not say
                new = Measured(**facts, is_utility=is_utility, per_prompt=_is_per_prompt(one), of={})
                measure = found.setdefault((one["name"], one["judge"]), new)
                # a score of a run may happen to be 0 everywhere, which alone does not make it a share
                measure.share = measure.share and one["share"]
                rows.setdefault(measure.title, set()).add(one.get("rows"))
                measure.bounded = measure.bounded or one.get("bounded", False)  # older results do not say
                for adapter, name in (("target", method), ("base", BASE)):
                    if adapter in one["values"]:
                        values = measure.of.setdefault(method, {}).setdefault(adapter, {})
                        values[seed] = one["values"][adapter]
                        measure.intervals.setdefault(name, {}).setdefault(seed, one["adapters"][adapter])
    for measure in found.values():
        if len(rows[measure.title]) > 1:
            _unpair(measure)
        _check_prompts(measure)
    _check_asked(outcomes)
    return [*found.values()]


def _is_per_prompt(one: Mapping[str, Any]) -> bool:
    """Whether a measure has a value for each prompt; one value of many is that of a whole run."""
    return not any(len(one["values"][name]) == 1 < facts["n"] for name, facts in one["adapters"].items())


def _unpair(measure: Measured) -> None:
    """Leaves a mean of each run, where runs hold out rows of their own: nothing pairs those of two runs."""
    measure.per_prompt = False
    for of in measure.of.values():
        for of_seed in of.values():
            for seed, values in of_seed.items():
                numbers = known(values)
                of_seed[seed] = [sum(numbers) / len(numbers) if numbers else None]


def in_order(measures: Iterable[Measured]) -> list[Measured]:
    """Measures as tables show them: those of safety first, and a judge's before those that only screen."""

    def rank(one: Measured) -> tuple[int, bool]:
        otherwise = ORDER.index("ROUGE-L") if one.is_utility else len(ORDER)
        return next((at for at, start in enumerate(ORDER) if one.name.startswith(start)), otherwise), one.screening

    return sorted(measures, key=rank)


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


def _check_asked(outcomes: Outcomes) -> None:
    """Refuses runs that were asked other prompts, even if as many: prompts are paired by their places.

    Raises:
        StoreError: two were.
    """
    first: dict[str, tuple[str, str]] = {}
    for method, of_seed in outcomes.items():
        for seed, outcome in of_seed.items():
            for name, digest in outcome.evaluation.get("asked", {}).items():
                theirs, where = first.setdefault(name, (digest, f"{method}, seed {seed}"))
                if digest != theirs:
                    raise StoreError(
                        f"{name}: other prompts in {method}, seed {seed} than in {where}: what they were read from has"
                        " changed between the runs: delete the evaluation of one, and run the comparison again"
                    )


def held_out(outcomes: Outcomes) -> list[Measured]:
    """Held-out losses, of which a run has one each and no prompts are known."""
    found = []
    for key, title in LOSSES.items():
        of: dict[str, dict[str, dict[int, Values]]] = {}
        for method, of_seed in outcomes.items():
            for adapter in ("target", "base"):
                losses = {seed: run.summary["held_out"].get(adapter, {}).get(key) for seed, run in of_seed.items()}
                if any(loss is not None for loss in losses.values()):
                    of.setdefault(method, {})[adapter] = {seed: [_finite(loss)] for seed, loss in losses.items()}
        if of:
            is_utility = key == "task_loss"
            found.append(Measured(f"held-out {title}", HELD_OUT_BETTER[key], False, None, False, is_utility, False, of))
    return found


def _finite(loss: float | None) -> float | None:
    """A loss that is no number, as that of a run that diverged, is unknown."""
    return loss if loss is not None and math.isfinite(loss) else None


def unlike(outcomes: Outcomes) -> list[str]:
    """In what the runs were computed where that is not the same in all of them, in words: a line each."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for method, of_seed in outcomes.items():
        for seed, outcome in of_seed.items():
            for what, value in _computed(outcome.summary).items():
                found.setdefault(what, {}).setdefault(value, {}).setdefault(method, []).append(seed)
    return [
        f"{what}: {'; '.join(f'{value} in {_runs(of)}' for value, of in values.items())}"
        for what, values in found.items()
        if len(values) > 1
    ]


def _computed(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a run says of how it was computed."""
    own = {what: str(summary[what]) for what in ("precision", "device", "threads") if what in summary}
    return own | {f"version of {name}": str(version) for name, version in summary.get("versions", {}).items()}


def _runs(of: Mapping[str, Sequence[int]]) -> str:
    return " and ".join(
        f"{method} seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"
        for method, seeds in of.items()
    )
