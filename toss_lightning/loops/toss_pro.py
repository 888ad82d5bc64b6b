"""TossProLoop: one ``Trainer.fit`` that trains the reference adapters, scores, selects, and trains the target.

The epochs of the fit are grouped into the stages of a plan. What is taken from inside Lightning 2.6 (the project pins
``lightning<2.7``, and tests/loops/test_lightning_contract.py fails when one of these changes):

- ``_FitLoop``: loops are not public since 2.0, yet only a loop can train several adapters in one fit with one set of
  checkpoints; the methods overridden here have kept their names since 1.5.
- ``_combined_loader``: set to None, it makes ``setup_data`` ask the datamodule for the next stage's loader.
- ``restarted_mid_epoch``, ``reset_restart_stage`` and ``epoch_loop.reset``: see ``_close_restored_epoch``.
- ``epoch_loop.val_loop.run()`` and its ``restarting``: evaluate between stages as Lightning does between epochs.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.files import restore_directory
from toss_lightning.loops.metrics import MetricsCsv
from toss_lightning.loops.plan import TOSS_PLAN, Plan, Stage, make_plan
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.module import REFERENCES
from toss_lightning.progress import say
from toss_lightning.report.cards import model_card
from toss_lightning.report.summary import Summary
from toss_lightning.scores import TokenScores
from toss_lightning.seeds import global_seed
from toss_lightning.selection import GlobalTopFraction, Selection, TokenWeights


class TossProLoop(_FitLoop):
    """Runs a plan: the reference adapters, scoring, selection, and the target, in one fit.

    With the default plan, TOSS (Algorithm 1 of arXiv 2603.01185). ``[target]`` alone is plain fine-tuning.

    Args:
        trainer: the Trainer whose ``fit_loop`` this becomes; filled in by the command line.
        plan: steps in order: ``utility``, ``degraded`` (train a reference adapter), ``score`` (token losses of the
            custom set), ``select`` (token weights), ``sft`` (plain fine-tuning, as a control), ``target``.
        selection: from scores to token weights.
        epochs: passes over the custom set in ``sft`` and ``target``.
        reference_epochs: passes over the utility and harmful sets; as ``epochs`` by default.
    """

    def __init__(
        self,
        trainer: Trainer,
        plan: Sequence[str] = TOSS_PLAN,
        selection: Selection | None = None,
        epochs: int = 2,
        reference_epochs: int | None = None,
    ) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                "trainer.accumulate_grad_batches: leave it at 1: data.batch_size counts the rows of an optimizer step,"
                " and data.max_tokens cuts them into micro-batches"
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigError(
                f"trainer.strategy: {type(trainer.strategy).__name__} would shard the base, which a 4-bit base does not"
                " survive, and adapters are too small to need it: use auto or ddp"
            )
        super().__init__(trainer, min_epochs=0, max_epochs=0)
        self.epoch_loop = trainer.fit_loop.epoch_loop  # keeps the Trainer's max_steps and its validation loop
        self.steps, self.epochs = list(plan), epochs
        self.reference_epochs = epochs if reference_epochs is None else reference_epochs
        self.selection = selection if selection is not None else GlobalTopFraction()
        self.plan = Plan((), ())
        self.cursor = -1
        self.summary = Summary()
        self._stage_started = 0.0

    # --- the hooks of Lightning's loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs what is left of the plan."""
        self._prepare()
        self.summary.start(self.trainer, self.plan.names)
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.forget_from(self.trainer.global_step)
        if self.cursor < 0:
            self._evaluate("base")
            self.summary.held_out["base"] = dict(self.module.held_out)
            if self.plan.stages:
                self._enter(0)
        self._stage_started = time.monotonic()
        super().run()
        if self.plan.at(self._epochs_done)[0] == len(self.plan.stages):
            self._finish()
        else:
            say("The run was cut short by the Trainer's limits: no target adapter and no summary yet.")

    def setup_data(self) -> None:
        """Asks for the current stage's loader; its plan says how many micro-batches make an optimizer step."""
        if not self.plan.stages:
            self.max_batches = 0
            return
        super().setup_data()
        plan = self.datamodule.plan
        self.trainer.accumulate_grad_batches = plan.accumulate

    def on_advance_start(self) -> None:
        """Goes on to the next stage where this epoch belongs to it."""
        self._close_restored_epoch()
        stage, epoch = self.plan.at(self._epochs_done)
        if stage != self.cursor:
            self._leave()
            self._enter(stage)
        assert self._combined_loader is not None
        for loader in self._combined_loader.flattened:
            loader.set_epoch(epoch)
        super().on_advance_start()

    def _close_restored_epoch(self) -> None:
        """Ends the epoch that a checkpoint was written on the last batch of.

        Lightning would close it by the length of the *next* loader, which in another stage is another length.
        """
        if self.restarted_mid_epoch and self._epochs_done == self.epoch_progress.current.ready:
            self.epoch_loop.reset()
            self.epoch_loop.restarting = False
            self.epoch_loop.reset_restart_stage()
            self.reset_restart_stage()

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Adds the place in the plan to Lightning's own counters, as plain values that load with ``weights_only``."""
        self._count_time()
        return super().on_save_checkpoint() | {
            "identity": self._identity(),
            "cursor": self.cursor,
            "stage_steps": self.module.stage_steps,
            "summary": self.summary.state(),
        }

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Takes the plan up where the checkpoint left it; runs before the optimizer's state is restored."""
        super().on_load_checkpoint(state_dict)
        self._prepare()
        for part, ours in self._identity().items():
            theirs = state_dict["identity"].get(part)
            if theirs != ours:
                raise StoreError(
                    f"the checkpoint was made with another {part} ({theirs}, now {ours}), which gives other optimizer"
                    " steps: resume with the same, or start a new run"
                )
        self.cursor = state_dict["cursor"]
        self.summary.load_state(state_dict["summary"])
        self._arm(self.plan.stages[self.cursor])
        self.module.stage_steps = state_dict["stage_steps"]
        self.trainer.strategy.setup_optimizers(self.trainer)  # a schedule is a closure: built anew, then restored

    # --- the plan ---------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage | None:
        """The stage that is running."""
        return self.plan.stages[self.cursor] if 0 <= self.cursor < len(self.plan.stages) else None

    @property
    def step_in_stage(self) -> int:
        """Optimizer steps that this stage has taken."""
        _, epoch = self.plan.at(self._epochs_done)
        steps_per_epoch = self.trainer.num_training_batches // self.trainer.accumulate_grad_batches
        return epoch * int(steps_per_epoch) + max(0, self.batch_idx + 1) // self.trainer.accumulate_grad_batches

    @property
    def module(self) -> Any:
        """The module: whatever has the adapter bank and the held-out losses of :class:`WeightedLoraModule`."""
        return self.trainer.lightning_module

    @property
    def datamodule(self) -> Any:
        """The datamodule: whatever has the sets, stages and scoring of :class:`TossDataModule`."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def _epochs_done(self) -> int:
        progress: Any = self.epoch_progress.current
        return progress.processed

    @property
    def run_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.trainer.default_root_dir)

    def _identity(self) -> dict[str, str]:
        """What the optimizer steps of this run depend on."""
        return {
            "loop.plan": ", ".join(self.plan.names),
            "number of epochs": ", ".join(f"{stage.name} {stage.epochs}" for stage in self.plan.stages),
            "loop.selection": f"{type(self.selection).__name__} {_plain(self.selection)}",
            "model.base": f"{self.module.bank.fingerprint} {self.module.base.quantization}",
            "model.lora": _plain(self.module.lora),
            "model.normalize": str(self.module.normalize),
            "number of processes": str(self.trainer.world_size),
            "seed_everything": str(global_seed()),
            **self.datamodule.identity(),
        }

    def _prepare(self) -> None:
        """Checks the plan against the data and the adapters at hand."""
        given = [name for name in REFERENCES if getattr(self.module.references, name)]
        self.plan = make_plan(self.steps, self.epochs, self.reference_epochs, self.datamodule.sets, given)
        self.max_epochs = sum(stage.epochs for stage in self.plan.stages)

        if self.trainer.is_global_zero:
            for name in ("scores", "selection"):
                restore_directory(self.run_dir / name)
        self.trainer.strategy.barrier("directories restored")

    def _enter(self, index: int) -> None:
        """Does what comes before a stage, then sets the slot, the data, the optimizer and the schedule up for it."""
        stage, module = self.plan.stages[index], self.module
        self._act(stage.actions)
        self._stage_started = time.monotonic()
        self.cursor = index
        self._arm(stage)
        module.bank.reset()
        self._combined_loader = None
        self.setup_data()
        module.stage_steps = stage.epochs * self.trainer.num_training_batches // self.trainer.accumulate_grad_batches
        self.trainer.strategy.setup_optimizers(self.trainer)
        self.summary.stages[stage.name] = {
            "set": stage.set,
            "epochs": stage.epochs,
            "steps": module.stage_steps,
            "rows": len(self.datamodule.sets[stage.set].rows),
            "seconds": 0.0,
        }

    def _arm(self, stage: Stage) -> None:
        """Points the datamodule and the module at a stage."""
        weights = None
        if stage.weighted:
            selected = TokenWeights.load(self.run_dir / "selection")
            selected.check(self.datamodule.sets["custom"].hashes(), self.run_dir / "selection")
            weights = selected.weights
        self.datamodule.begin_stage(stage.set, stage.epochs, weights)
        self.module.stage_name = stage.name

    def _leave(self) -> None:
        """Files what a stage brought: its adapter, its time, and the held-out losses after it."""
        stage, module = self.stage, self.module
        assert stage is not None
        if module.held_out_step != self.trainer.global_step:
            self._evaluate(stage.name)
        self._count_time()
        self.summary.held_out[stage.name] = dict(module.held_out)
        if stage.name in REFERENCES:
            module.bank.copy(SLOT, stage.name)
        if self.trainer.is_global_zero:
            card = model_card(stage.name, module.bank.base_path, self.summary)
            module.bank.save(SLOT, self.run_dir / "adapters" / stage.name, card)
        self.trainer.strategy.barrier("adapter saved")

    def _act(self, actions: Sequence[str]) -> None:
        """Scores the custom set, or selects from its scores."""
        for action in actions:
            started = time.monotonic()
            if action == "score":
                module = self.module
                scores = self.datamodule.score(self.trainer, REFERENCES, module.fingerprints(), self.run_dir / "scores")
                self.summary.fingerprints = scores.fingerprints
            else:
                self._select()
            self.summary.stages[action] = {"seconds": time.monotonic() - started}

    def _select(self) -> None:
        path = self.run_dir / "selection"
        if self.trainer.is_global_zero:
            weights = self.selection.select(TokenScores(self.run_dir / "scores"))
            weights.save(path)
        self.trainer.strategy.barrier("selection written")
        self.summary.selection = TokenWeights.load(path).report
        self.summary.say_selected()

    def _evaluate(self, name: str) -> None:
        """Takes the held-out losses of the slot, as Lightning does between epochs."""
        self.module.stage_name = name
        self.trainer.validating = True
        self.epoch_loop.val_loop.restarting = False  # it would go on with a validation that a checkpoint fell into
        self.epoch_loop.val_loop.run()
        self.trainer.training = True

    def _count_time(self) -> None:
        now = time.monotonic()
        if self.stage is not None and self.stage.name in self.summary.stages:
            self.summary.stages[self.stage.name]["seconds"] += now - self._stage_started
        self._stage_started = now

    def _finish(self) -> None:
        if self.plan.stages:
            self._leave()
        self._act(self.plan.actions)
        if self.trainer.is_global_zero:
            self.summary.finish(self.trainer, self.run_dir)


def _plain(settings: object) -> str:
    """The settings of an object that a configuration can hold, as text that is the same in every process."""
    values = {name: value for name, value in vars(settings).items() if isinstance(value, (bool, int, float, str, list))}
    return ", ".join(f"{name}={values[name]}" for name in sorted(values) if not name.startswith("_"))
