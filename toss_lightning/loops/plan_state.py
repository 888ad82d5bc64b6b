"""PlanState: where a run stands in its plan, and what a plan's steps ask of the class that does them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from toss_lightning.loops.checkpoints import PlanCheckpoint
from toss_lightning.loops.plan import Action, Plan, Stage
from toss_lightning.loops.stopping import StopOnSignal


class PlanState(_FitLoop, ABC):
    """What :class:`toss_lightning.loops.plan_loop.PlanLoop` walks along, and asks for on its way.

    Attributes:
        plan: the steps.
        cursor: the step that is running or comes next.
        entered_at: epochs that were done when the running stage began; None between stages.
        ends_after: epochs of the running stage, the last one in part, where it ends early; None where it does not.
        last_round: steps of later rounds are left out.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, min_epochs=0, max_epochs=0)
        self.epoch_loop = trainer.fit_loop.epoch_loop  # keeps the Trainer's max_steps and its validation loop
        self.plan = Plan()
        self.cursor = 0
        self.entered_at: int | None = None
        self.ends_after: int | None = None
        self.last_round: int | None = None

    # --- what a plan's steps do ---------------------------------------------------------------------------------------

    @abstractmethod
    def make_plan(self) -> Plan:
        """Checks the settings against the data and the adapters at hand."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What the optimizer steps of this run depend on; a checkpoint of another one is refused."""

    @abstractmethod
    def begin(self) -> None:
        """Called once in each process, before the first step or where a checkpoint left off."""

    @abstractmethod
    def arm(self, stage: Stage) -> None:
        """Points the datamodule and the module at a stage, a new one or one that is resumed."""

    @abstractmethod
    def begin_stage(self, stage: Stage) -> None:
        """Called when an armed stage has its data and the number of its steps."""

    @abstractmethod
    def end_stage(self, stage: Stage) -> None:
        """Files what a stage brought."""

    def between_epochs(self, stage: Stage, epochs: int) -> None:
        """Called before another epoch of the stage that is running; once more where a run resumes in that epoch.

        Args:
            stage: which one.
            epochs: how many it has had.
        """

    @abstractmethod
    def act(self, action: Action) -> None:
        """Does what stands between stages."""

    @abstractmethod
    def end(self, complete: bool) -> None:
        """Called behind the last step, or where the Trainer's own limits cut the run short."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides, as plain values that load with ``weights_only``."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes :meth:`state` back."""

    # --- where the run is -------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage | None:
        """The stage that is running."""
        if self.entered_at is None:
            return None
        step = self.plan.steps[self.cursor]
        assert isinstance(step, Stage)
        return step

    @property
    def place(self) -> str:
        """The step of the plan that is running or comes next."""
        return next((step.name for step in self.plan.steps[self.cursor :] if not self.is_left_out(step)), "end")

    @property
    def step_in_stage(self) -> int:
        """Optimizer steps that this stage has taken."""
        assert self.entered_at is not None
        steps_per_epoch = self.trainer.num_training_batches // self.trainer.accumulate_grad_batches
        in_epoch = max(0, self.batch_idx + 1) // self.trainer.accumulate_grad_batches
        return (self.epochs_done - self.entered_at) * int(steps_per_epoch) + in_epoch

    @property
    def epochs_done(self) -> int:
        """Epochs of all stages together."""
        progress: Any = self.epoch_progress.current
        return progress.processed

    @property
    def module(self) -> Any:
        """The module: whatever has the adapter bank and the held-out losses of :class:`WeightedLoraModule`."""
        return self.trainer.lightning_module

    @property
    def datamodule(self) -> Any:
        """The datamodule: whatever has the sets, stages and scoring of :class:`TossDataModule`."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def run_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.trainer.default_root_dir)

    @property
    def stopper(self) -> StopOnSignal | None:
        """The callback that ends a run which is told to stop, which may be the one that writes checkpoints."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((one for one in callbacks if isinstance(one, StopOnSignal)), None)

    @property
    def saver(self) -> PlanCheckpoint | None:
        """The callback that writes checkpoints; None where the Trainer has none."""
        return self.stopper if isinstance(self.stopper, PlanCheckpoint) else None

    def is_left_out(self, step: Stage | Action) -> bool:
        """The step belongs to a round that is not run any more."""
        return self.last_round is not None and step.round > self.last_round

    @property
    def stage_is_over(self) -> bool:
        """The running stage has had its epochs."""
        return self.stage is not None and self.epochs_done >= self._stage_end

    @property
    def stages_left(self) -> list[Stage]:
        """The running stage and those behind it."""
        rest = self.plan.steps[self.cursor :]
        return [step for step in rest if isinstance(step, Stage) and not self.is_left_out(step)]

    @property
    def epochs_in_all(self) -> int:
        """Epochs of all stages together that will have been done, by what is known now."""
        if self.stage is None:
            return self.epochs_done + sum(stage.epochs for stage in self.stages_left)
        return self._stage_end + sum(stage.epochs for stage in self.stages_left[1:])

    @property
    def _stage_end(self) -> int:
        assert self.stage is not None
        assert self.entered_at is not None
        return self.entered_at + (self.stage.epochs if self.ends_after is None else self.ends_after)
