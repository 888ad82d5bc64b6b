"""The progress display: one bar per stage, which names it and its place in the plan."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from toss_lightning.progress import progress_bar


class StageProgress(ProgressBar):
    """Shows the stage, its optimizer steps, and the latest loss."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm[None] | None = None
        self._stage = ""

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens a bar where a stage begins, or where it is resumed."""
        loop: Any = trainer.fit_loop
        if loop.stage is None or loop.stage.name == self._stage:
            return
        self._close()
        self._stage = loop.stage.name
        place = f"{loop.plan.names.index(self._stage) + 1}/{len(loop.plan.names)}"
        steps: Any = pl_module.stage_steps
        self._bar = progress_bar(f"[{place}] {self._stage}", steps, "step", self._enabled)
        self._bar.update(loop.step_in_stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves on by one optimizer step."""
        if self._bar is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if loss := trainer.callback_metrics.get(f"{self._stage}/loss"):
                self._bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            self._bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar with the last step of a stage, which may come early."""
        loop: Any = trainer.fit_loop
        if loop.stage_is_over:
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar of a run that was cut short."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the terminal in order."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
