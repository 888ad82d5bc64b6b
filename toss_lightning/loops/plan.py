"""A plan: which adapters are trained, in which order, and when the custom set is scored and selected from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from toss_lightning.errors import ConfigError

TRAINS_ON = {"utility": "utility", "degraded": "harmful", "sft": "custom", "target": "custom"}
"""Stage that trains an adapter -> the set it trains on. ``sft`` is the control: the target without any weights."""
ACTIONS = ("score", "select")
TOSS_PLAN = ("utility", "degraded", "score", "select", "target")


@dataclass(frozen=True)
class Stage:
    """One adapter trained on one set."""

    name: str
    epochs: int
    actions: tuple[str, ...]
    """What is done before it."""
    weighted: bool
    """It trains with the selection's token weights."""

    @property
    def set(self) -> str:
        """The set it trains on."""
        return TRAINS_ON[self.name]


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and the actions that come after the last of them."""

    stages: tuple[Stage, ...]
    actions: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is done, in order."""
        steps = [name for stage in self.stages for name in (*stage.actions, stage.name)]
        return (*steps, *self.actions)

    def at(self, epoch: int) -> tuple[int, int]:
        """The stage that epoch ``epoch`` of the run belongs to, and the number of the epoch in it."""
        for index, stage in enumerate(self.stages):
            if epoch < stage.epochs:
                return index, epoch
            epoch -= stage.epochs
        return len(self.stages), 0


def make_plan(
    steps: Sequence[str], epochs: int, reference_epochs: int, sets: Collection[str], given: Collection[str] = ()
) -> Plan:
    """Checks the steps that a person wrote and turns them into stages.

    Args:
        steps: names of stages and actions, in order.
        epochs: epochs of the stages on the custom set.
        reference_epochs: epochs of the stages that train a reference adapter.
        sets: the sets that there are.
        given: reference adapters that need no training; their stage is left out.

    Raises:
        ConfigError: a step is unknown, stands twice, lacks its set, or comes before what it needs.
    """
    stages: list[Stage] = []
    actions: list[str] = []
    done = set(given)
    for step in steps:
        if step not in (*TRAINS_ON, *ACTIONS):
            raise ConfigError(f"loop.plan: unknown step {step!r}; known: {', '.join((*TRAINS_ON, *ACTIONS))}")
        if step in done:
            if step in given:
                continue
            raise ConfigError(f"loop.plan: {step!r} stands twice")
        needs = {"score": ("utility", "degraded"), "select": ("score",)}.get(step, ())
        if missing := [need for need in needs if need not in done]:
            raise ConfigError(
                f"loop.plan: {step!r} needs {' and '.join(missing)} before it: add the stage"
                + (f", or give the adapter in model.references.{missing[0]}" if step == "score" else "")
            )
        needed_set = TRAINS_ON.get(step, "custom")
        if needed_set not in sets:
            raise ConfigError(f"data.{needed_set}: step {step!r} of loop.plan needs this set: give a path to it")
        done.add(step)
        if step in ACTIONS:
            actions.append(step)
            continue
        count = reference_epochs if step in ("utility", "degraded") else epochs
        if count < 1:
            raise ConfigError(f"loop: {count} epochs for stage {step!r}: give at least 1")
        stages.append(Stage(step, count, tuple(actions), weighted=step == "target" and "select" in done))
        actions = []
    if not done - set(given):
        raise ConfigError("loop.plan: nothing to do: name a stage, such as target")
    return Plan(tuple(stages), tuple(actions))
