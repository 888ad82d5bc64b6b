"""A plan: which adapters are trained, in which order, and when the custom set is scored, promoted and selected from."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.errors import ConfigError
from toss_lightning.scores import degraded_column

TRAINS_ON = {"utility": "utility", "degraded": "harmful", "seal": "custom", "sft": "custom", "target": "custom"}
"""Stage that trains an adapter -> the set it trains on.

``sft`` is the control: the target without any plug-in. ``seal`` trains SEAL's selector beside an adapter.
"""
ACTIONS = ("score", "select", "test")
GIVEN = {"score": "scores_from", "select": "selection_from"}
"""Action -> the key that gives what it would make."""
TOSS_PLAN = ("utility", "degraded", "score", "select", "target")


@dataclass(frozen=True)
class Stage:
    """One adapter trained on one set."""

    adapter: str
    epochs: int
    weighted: bool = False
    """It trains with the selection's token weights."""
    round: int = 0
    """The round whose promoted rows it trains on, for the degraded adapter."""

    @property
    def name(self) -> str:
        """``utility``, ``degraded``, ``degraded-1``, ..."""
        return degraded_column(self.round) if self.adapter == "degraded" else self.adapter

    @property
    def set(self) -> str:
        """The set it trains on."""
        return TRAINS_ON[self.adapter]


@dataclass(frozen=True)
class Action:
    """What is done between stages: ``score`` and ``promote`` in each round, ``select``, and ``test``."""

    kind: str
    round: int = 0

    @property
    def name(self) -> str:
        """``score``, ``promote-1``, ``score-1``, ..., ``select``."""
        return f"{self.kind}-{self.round}" if self.round else self.kind


@dataclass(frozen=True)
class Plan:
    """The steps of a run, in order."""

    steps: tuple[Stage | Action, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each step."""
        return tuple(step.name for step in self.steps)

    @property
    def epochs(self) -> list[int]:
        """The epochs of each step; an action has none."""
        return [step.epochs if isinstance(step, Stage) else 0 for step in self.steps]


@dataclass(frozen=True)
class Given:
    """What a run need not make itself."""

    sets: Collection[str]
    """The sets that there are."""
    references: Collection[str] = ()
    """Reference adapters; their first training is left out."""
    scores: bool = False
    selection: bool = False
    needs: Sequence[str] = ("utility", "degraded")
    """What the selection reads, and so must be made before scoring: reference adapters, ``seal``."""
    seal_epochs: int = 3
    """Epochs of the stage ``seal``."""


def make_plan(steps: Sequence[str], epochs: int, reference_epochs: int, given: Given, rounds: int = 0) -> Plan:
    """Checks the steps that a person wrote and puts the rounds of TOSS-Pro behind the first scoring.

    Args:
        steps: names of stages and actions, in order.
        epochs: epochs of the stages on the custom set.
        reference_epochs: epochs of the stages that train a reference adapter.
        given: what there is already.
        rounds: how often rows are promoted, the degraded adapter retrained, and the custom set scored again.

    Raises:
        ConfigError: a step is unknown, stands twice, lacks its set, or comes before what it needs.
    """
    plan: list[Stage | Action] = []
    done = set(given.references)
    done |= {name for name, there in (("score", given.scores), ("select", given.selection)) if there}
    made = False
    for step in steps:
        if step not in (*TRAINS_ON, *ACTIONS):
            raise ConfigError(f"loop.plan: unknown step {step!r}; known: {', '.join((*TRAINS_ON, *ACTIONS))}")
        if step in done:
            if step in given.references:
                continue
            if step in GIVEN and not any(isinstance(one, Action) and one.kind == step for one in plan):
                key = GIVEN[step]
                raise ConfigError(f"loop.plan: {step!r} would make what loop.{key} gives: leave one of them out")
            raise ConfigError(f"loop.plan: {step!r} stands twice")
        _check_needs(step, done, given)
        if step == "target" and "score" in done and "select" not in done:
            idle = "loop.plan: the target would be trained on every token, whatever scores say: put select before it"
            if not given.scores:
                raise ConfigError(f"{idle}, or name the stage sft for plain fine-tuning")
            rank_zero_warn(f"{idle}, or leave loop.scores_from out")
        done.add(step)
        made = True
        if step in ACTIONS:
            plan.append(Action(step))
            if step == "score":
                plan += _rounds(rounds, reference_epochs, given.sets)
            continue
        count = {"utility": reference_epochs, "degraded": reference_epochs, "seal": given.seal_epochs}.get(step, epochs)
        if count < 1:
            raise ConfigError(f"loop: {count} epochs for stage {step!r}: give at least 1")
        plan.append(Stage(step, count, weighted=step == "target" and "select" in done))
    if rounds < 0:
        raise ConfigError(f"loop.rounds: {rounds}: give 0 or more")
    if rounds and not ({"score", "select"} & done):
        raise ConfigError(f"loop.rounds: {rounds} rounds need a score step in loop.plan: add it, or set rounds to 0")
    if not made:
        raise ConfigError("loop.plan: nothing to do: name a stage, such as target")
    return Plan(tuple(plan))


def _check_needs(step: str, done: Collection[str], given: Given) -> None:
    needs = {"score": given.needs, "select": ("score",)}.get(step, ())
    if missing := [need for need in needs if need not in done]:
        key = f"model.references.{missing[0]}" if step == "score" else "loop.scores_from"
        otherwise = "" if missing[0] == "seal" else f", or give what it makes in {key}"
        raise ConfigError(f"loop.plan: {step!r} needs {' and '.join(missing)} before it: add it{otherwise}")
    needed_set = None if step == "test" else TRAINS_ON.get(step, "custom")
    if needed_set is not None and needed_set not in given.sets:
        raise ConfigError(f"data.{needed_set}: step {step!r} of loop.plan needs this set: give a path to it")


def _rounds(rounds: int, epochs: int, sets: Collection[str]) -> Iterator[Stage | Action]:
    if rounds and "harmful" not in sets:
        raise ConfigError(
            f"data.harmful: {rounds} rounds (loop.rounds) promote rows into the harmful set, and there is none: give a"
            " path to it, or set loop.rounds to 0"
        )
    for round in range(1, rounds + 1):
        yield Action("promote", round)
        yield Stage("degraded", epochs, round=round)
        yield Action("score", round)
