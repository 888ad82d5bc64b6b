"""A Trainer with what every run has: its directory, logs, checkpoints, one progress display, and the loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop

from toss_lightning.errors import ConfigError
from toss_lightning.loops.metrics import MetricsCsv
from toss_lightning.loops.progress import StageProgress

LoopFactory = Callable[[Trainer], _FitLoop]

DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
"""Trainer arguments that the loop and the planned batches rely on, or that suit them."""
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_epochs": ((-1,), "set loop.epochs: the plan counts the epochs of each stage"),
    "use_distributed_sampler": ((False,), "batches are planned for all ranks already"),
    "num_sanity_val_steps": ((0,), "the base is evaluated before the first stage"),
    "limit_train_batches": ((1.0,), "it would cut optimizer steps short: take fewer rows with a Source's rows"),
    "overfit_batches": ((0.0, 0), "it would cut optimizer steps short: take fewer rows with a Source's rows"),
    "fast_dev_run": ((False,), "it would run one stage alone: try a few rows with a Source's rows"),
    "precision": (("32-true", 32, "32"), "set model.base.dtype: adapters stay in float32"),
}
"""Trainer arguments that the loop relies on -> the values it works with, and what to do instead."""


def make_trainer(
    run_dir: str, loop: LoopFactory, checkpoint_every: int = 50, callbacks: list[Callback] | None = None, **options: Any
) -> Trainer:
    """Builds a Trainer whose fit runs a plan.

    Args:
        run_dir: where everything goes: adapters, scores, selection, checkpoints, logs, summary.
        loop: makes the loop from the Trainer: ``TossProLoop``, or ``partial(TossProLoop, epochs=1)``.
        checkpoint_every: optimizer steps between checkpoints.
        callbacks: further callbacks; a ModelCheckpoint among them replaces the default one.
        **options: any argument of ``lightning.Trainer``.

    Raises:
        ConfigError: an option would break the loop.
    """
    settings = {**DEFAULTS, **options}
    for name, (allowed, reason) in FIXED.items():
        if settings.get(name) not in (None, *allowed):
            raise ConfigError(f"trainer.{name}: leave it at {allowed[0]}: {reason}")
    callbacks = list(callbacks or [])
    if settings.get("enable_progress_bar") is not False:
        callbacks.append(StageProgress())
    if settings.get("enable_checkpointing") is not False and not any(
        isinstance(callback, ModelCheckpoint) for callback in callbacks
    ):
        callbacks.append(
            ModelCheckpoint(
                dirpath=Path(run_dir) / "checkpoints",
                filename="{step}",
                monitor="step",
                mode="max",
                save_top_k=2,
                save_last=True,
                every_n_train_steps=checkpoint_every,
            )
        )
    if settings.get("logger") in (None, True):
        settings["logger"] = [MetricsCsv(run_dir), TensorBoardLogger(run_dir, name="tensorboard", version="")]
    trainer = Trainer(default_root_dir=run_dir, callbacks=callbacks, **settings)
    trainer.fit_loop = loop(trainer)
    return trainer
