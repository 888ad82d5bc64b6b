"""Whole runs on the tiny model."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from toss_lightning.data import TossDataModule
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.loops.plan import TOSS_PLAN
from toss_lightning.models import Base, Lora, Optim, WeightedLoraModule


class Kill(Callback):
    """Ends a run before an optimizer step, as a kill does: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ends the run at its step."""
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def tiny_fit(
    model: str,
    sets: Mapping[str, Any],
    run_dir: Path,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | None = None,
    plan: Sequence[str] = TOSS_PLAN,
    loop: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    module: Mapping[str, Any] | None = None,
    seed: int = 1,
    **trainer: Any,
) -> Trainer:
    """Runs a plan and returns the Trainer; a few dozen optimizer steps in about a second."""
    seed_everything(seed, verbose=False)
    datamodule = TossDataModule(**sets, **{"batch_size": 4, "max_tokens": 40, **(data or {})})
    settings = {
        "base": Base(model, quantization="none"),
        "lora": Lora(r=4, targets="all-linear"),
        "optim": Optim(lr=1e-2),
        **(module or {}),
    }
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "checkpoint_every": 1, **trainer}
    fit = make_trainer(
        str(run_dir), partial(TossProLoop, plan=list(plan), **(loop or {})), callbacks=list(callbacks), **options
    )
    fit.fit(WeightedLoraModule(**settings), datamodule, ckpt_path=ckpt_path)
    return fit


def artifacts(run_dir: Path) -> dict[str, bytes]:
    """Every byte that a run leaves for others, path -> content; what is hidden or half-written is there too."""
    folders = ("adapters", "scores", "selection", "promoted")
    files = [file for name in folders for file in (run_dir / name).rglob("*") if file.is_file()]
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


def scored(run_dir: Path) -> dict[str, bytes]:
    """Every byte of the store."""
    return {name: content for name, content in artifacts(run_dir).items() if name.startswith("scores/")}
