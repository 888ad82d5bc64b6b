"""A Trainer with what every run has: its directory, logs, checkpoints, one progress display, and the loop."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.files import cannot_write, make_writable, user_path
from toss_lightning.locks import locked
from toss_lightning.loops.checkpoints import PlanCheckpoint, find_checkpoint
from toss_lightning.loops.metrics import MetricsCsv
from toss_lightning.loops.progress import StageProgress
from toss_lightning.loops.stopping import StopOnSignal
from toss_lightning.ranks import on_first_rank

LoopFactory = Callable[[Trainer], _FitLoop]

DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
"""Trainer arguments that the loop and the planned batches rely on, or that suit them."""
BUSY = "wait for it, or choose another --run_dir"
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_epochs": ((-1,), "set loop.epochs: the plan counts the epochs of each stage"),
    "min_epochs": ((0,), "set loop.epochs: the plan counts the epochs of each stage"),
    "use_distributed_sampler": ((False,), "batches are planned for all ranks already"),
    "num_sanity_val_steps": ((0,), "the base is evaluated before the first stage"),
    "limit_train_batches": ((1.0,), "it would cut optimizer steps short: take fewer rows with a Source's rows"),
    "overfit_batches": ((0.0, 0), "it would cut optimizer steps short: take fewer rows with a Source's rows"),
    "fast_dev_run": ((False,), "it would run one stage alone: try a few rows with a Source's rows"),
    "reload_dataloaders_every_n_epochs": ((0,), "the batches of all epochs of a stage are planned already"),
    "precision": (("32-true", 32, "32"), "set model.base.dtype: adapters stay in float32"),
}
"""Trainer arguments that the loop relies on -> the values it works with, and what to do instead."""


class OneAtATime(Callback):
    """Has the first process hold the run directory for all, once they can hear of it where that is refused."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning before anything is read."""
        if isinstance(trainer, PlanTrainer) and stage == "fit":
            on_first_rank(trainer, trainer.hold)


class PlanTrainer(Trainer):
    """A Trainer that can also do the scoring part of a plan alone, or the selection."""

    held: ExitStack
    """What is let go when a run ends, however that is."""

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = True,
    ) -> None:
        """Runs the plan.

        Args:
            model: the module.
            train_dataloaders: leave it out: the datamodule serves each stage its rows.
            val_dataloaders: leave it out: the datamodule holds the held-out sets.
            datamodule: the sets.
            ckpt_path: a checkpoint to go on from; ``last`` for the newest whole one of the run directory, ``auto`` for
                that one if there is one.
            weights_only: a checkpoint is plain values and tensors, and nothing else is loaded from it.

        Raises:
            StoreError: the run directory cannot be written, or another run is going on there.
        """
        self._make_run_dir()
        if ckpt_path is not None and "://" not in str(ckpt_path):
            ckpt_path = find_checkpoint(str(ckpt_path), Path(self.default_root_dir))
        with ExitStack() as self.held:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def _make_run_dir(self) -> None:
        # before the loggers and whatever else may want to write there, each with words of its own
        try:
            make_writable(Path(self.default_root_dir))
        except OSError as error:
            raise StoreError(cannot_write(Path(self.default_root_dir), error)) from error

    def hold(self) -> None:
        """Keeps other runs out of the run directory until this one ends."""
        self.held.enter_context(locked(Path(self.default_root_dir), BUSY))

    def score(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | Path | None = None
    ) -> None:
        """Trains the reference adapters and scores the custom set: the plan up to its score step and its rounds.

        Args:
            model: the module.
            datamodule: the sets.
            ckpt_path: a checkpoint of a run of the same kind to go on from.
        """
        loop: Any = self.fit_loop
        loop.end_with("score")
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def test(  # type: ignore[override]
        self, model: LightningModule, datamodule: LightningDataModule
    ) -> None:
        """Evaluates the adapters of the run directory, or those that ``loop.evaluation.adapters`` names.

        Args:
            model: the module.
            datamodule: the sets; the held-out one of the task is read, unless the evaluation does without.
        """
        loop: Any = self.fit_loop
        sets: Any = datamodule
        sets.read_only(loop.only_test())
        self.fit(model, datamodule=datamodule)

    def select(self) -> None:
        """Selects from scores that are there: those of the run directory, or of ``loop.scores_from``.

        Raises:
            ConfigError: a target was trained with the selection of the run directory.
            StoreError: the run directory cannot be written, or another run is going on there.
        """
        if (Path(self.default_root_dir) / "adapters" / "target").exists():
            raise ConfigError(
                f"--run_dir: the target in {self.default_root_dir} was trained with the selection there: write another"
                f" one elsewhere, with --run_dir and --loop.scores_from {self.default_root_dir}/scores"
            )
        loop: Any = self.fit_loop
        with ExitStack() as self.held:
            if Path(self.default_root_dir).exists():  # else it may find no scores, and leaves no directory either
                self.hold()
            loop.select()


def make_trainer(
    run_dir: str, loop: LoopFactory, checkpoint_every: int = 50, callbacks: list[Callback] | None = None, **options: Any
) -> PlanTrainer:
    """Builds a Trainer whose fit runs a plan.

    Args:
        run_dir: where everything goes: adapters, scores, selection, checkpoints, logs, summary.
        loop: makes the loop from the Trainer: ``TossProLoop``, or ``partial(TossProLoop, epochs=1)``.
        checkpoint_every: optimizer steps between checkpoints; there is one at every boundary of the plan besides.
        callbacks: further callbacks.
        **options: any argument of ``lightning.Trainer``.

    Raises:
        ConfigError: an option would break the loop.
    """
    run_dir, settings = str(user_path(run_dir)), {**DEFAULTS, **options}
    for name, (allowed, reason) in FIXED.items():
        given = settings.get(name)
        # one batch, the integer 1, is another thing than all of them, 1.0
        if given not in (None, *allowed) or (name == "limit_train_batches" and type(given) is int):
            raise ConfigError(f"trainer.{name}: leave it at {allowed[0]}: {reason}")
    if type(settings.get("val_check_interval")) is int and settings.get("check_val_every_n_epoch", 1) is not None:
        raise ConfigError(
            f"trainer.val_check_interval: {settings['val_check_interval']} micro-batches may be more than a stage has:"
            " give a share of an epoch, or set trainer.check_val_every_n_epoch to null"
        )
    if not isinstance(settings.get("val_check_interval"), int | float | None):
        raise ConfigError(
            f"trainer.val_check_interval: {settings['val_check_interval']}: processes would tell the time each for"
            " itself: give a share of an epoch"
        )
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every: {checkpoint_every}: give a number of at least 1")
    callbacks = [OneAtATime(), *(callbacks or [])]
    if settings.get("enable_progress_bar") is not False:
        callbacks.append(StageProgress())
    if settings.get("enable_checkpointing") is not False:
        callbacks.append(PlanCheckpoint(Path(run_dir) / "checkpoints", checkpoint_every))
    else:
        callbacks.append(StopOnSignal())
    if settings.get("logger") in (None, True):
        settings["logger"] = [MetricsCsv(run_dir), TensorBoardLogger(run_dir, name="tensorboard", version="")]
    trainer = PlanTrainer(default_root_dir=run_dir, callbacks=callbacks, **settings)
    trainer.fit_loop = loop(trainer)
    return trainer
