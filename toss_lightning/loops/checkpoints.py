"""Checkpoints at every boundary of the plan and every N optimizer steps, and the newest one that is whole.

A checkpoint is written beside its place and renamed into it, so a kill leaves no half of one under its name; what a
crash of the machine cut short is recognised by the checksums of the zip archive that every checkpoint is.
"""

import re
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.strategy import Strategy

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.files import cannot_write, discard_directory, put_in_place, sweep, user_path
from toss_lightning.loops.stopping import StopOnSignal
from toss_lightning.progress import say

KEEP = 2
"""Checkpoints that stay: the newest, and the one to fall back on should it be damaged."""


class InPlace(TorchCheckpointIO):
    """Writes a checkpoint to its path at once, for those that are renamed into their place later.

    Lightning's own writes to the system's temporary directory first, which may have no room for it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Called by the strategy on the first rank."""
        content = BytesIO()  # a refusal of the disk has a reason where Python writes, and none where torch does
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.getbuffer())


@contextmanager
def _in_place(strategy: Strategy) -> Iterator[None]:
    """Has a strategy write so, unless it was given another way of writing."""
    given = strategy.checkpoint_io
    if type(given) is TorchCheckpointIO:
        strategy.checkpoint_io = InPlace()
    try:
        yield
    finally:
        strategy.checkpoint_io = given


class PlanCheckpoint(StopOnSignal, Checkpoint):
    """Saves where the loop says that a boundary is, every ``every`` optimizer steps, and before it stops as told.

    Args:
        directory: where checkpoints go.
        every: optimizer steps between two checkpoints within a stage.
    """

    saves = True

    def __init__(self, directory: Path, every: int) -> None:
        super().__init__()
        self.directory, self.every = directory, every
        self._ends_behind_step = False

    @property
    def state_key(self) -> str:
        """Set, so that a checkpoint does not depend on where the run directory lies."""
        return type(self).__name__

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves behind an optimizer step whose turn it is, or that is the last one."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            # max_time would end the run in the middle of an optimizer step
            self._ends_behind_step |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._ends_behind_step
        self._ends_behind_step = False
        # the Trainer's own limits (max_time, max_steps) end a run here, and nothing is saved behind it
        saved = trainer.global_step % self.every == 0 or trainer.should_stop or trainer.global_step == trainer.max_steps
        if saved:
            self.save(trainer)
        self.stop_if_told(trainer, saved, behind_step=True)

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint, on all ranks together, and lets the oldest one go.

        Raises:
            StoreError: the disk refuses; the checkpoints before are still there.
        """
        loop: Any = trainer.fit_loop
        path = self.directory / f"{trainer.global_step:08d}-{loop.cursor:02d}-{loop.place}.ckpt"
        temporary = self.directory / f".{path.name}.tmp"
        try:
            with _in_place(trainer.strategy):
                trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                put_in_place(temporary, path)
                for old in _checkpoints(self.directory)[:-KEEP]:
                    old.unlink()
        except OSError as error:
            with suppress(OSError):  # half of it takes space that a person is to free
                temporary.unlink(missing_ok=True)
            raise StoreError(cannot_write(path, error)) from error
        trainer.strategy.barrier("checkpoint in place")

    def on_plan_start(self, trainer: Trainer) -> None:
        """Makes room for this run's checkpoints and listens for signals."""
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            sweep(self.directory)
            set_aside(self.directory, Path(trainer.ckpt_path) if trainer.ckpt_path else None)
        super().on_plan_start(trainer)

    def before_stop(self, trainer: Trainer) -> None:
        """Writes a checkpoint."""
        self.save(trainer)


def find_checkpoint(wanted: str, run_dir: Path) -> Path | None:
    """The file that ``ckpt_path`` means: ``last`` is the newest whole one of the run, ``auto`` too if there is one.

    Raises:
        ConfigError: no such file, or no checkpoint.
        StoreError: the file, or every checkpoint of the run, is damaged.
    """
    directory = run_dir / "checkpoints"
    if wanted in ("auto", "last"):
        if _checkpoints(directory):
            return newest(directory)
        if wanted == "auto":
            return None
        raise ConfigError(f"--ckpt_path last: {run_dir} has no checkpoint: leave it out to start from the beginning")
    path = user_path(wanted)
    if not path.exists():
        raise ConfigError(f"--ckpt_path {wanted}: no such file; give a .ckpt file, last, or auto")
    if path.is_file() and not is_whole(path):
        raise StoreError(f"--ckpt_path {wanted}: the file is damaged (cut short by a crash?): try --ckpt_path last")
    return path


def newest(directory: Path) -> Path:
    """The newest checkpoint that is whole.

    Raises:
        StoreError: there is none.
    """
    found = _checkpoints(directory)
    for path in reversed(found):
        if is_whole(path):
            return path
        say(f"{path} is damaged (cut short by a crash?): taking the one before it")
    if found:
        raise StoreError(f"{directory}: none of the {len(found)} checkpoints is whole: start from the beginning")
    raise StoreError(f"{directory} has no checkpoint: leave --ckpt_path out to start from the beginning")


def is_whole(path: Path) -> bool:
    """Every byte of the checkpoint is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def set_aside(directory: Path, after: Path | None) -> None:
    """Moves the checkpoints behind ``after`` out of the way, for this run will make others; all of them for None."""
    found = _checkpoints(directory)
    known = after is not None and after.resolve() in [path.resolve() for path in found]
    stale = [path for path in found if after is None or not known or path.name > after.name]
    if not stale:
        return
    aside = directory / "earlier"
    aside.mkdir(exist_ok=True)
    for path in stale:
        path.replace(aside / path.name)
    say(f"checkpoints of an earlier run ({len(stale)}) were moved to {aside}")


def set_results_aside(run_dir: Path, kept: Collection[Path] = ()) -> None:
    """Moves what an earlier run in the same directory came to, for this one may end before it has its own.

    References, scores and selections stay, which a plan may begin with.

    Args:
        run_dir: of both runs.
        kept: directories of adapters that are wanted all the same.
    """
    wanted = {path.resolve() for path in kept}
    results = [run_dir / "adapters" / "sft", run_dir / "adapters" / "target", run_dir / "summary.json"]
    results += sorted(path for path in (run_dir / "evaluation").glob("*") if path.is_file())
    moved = [path for path in results if path.exists() and path.resolve() not in wanted]
    for path in moved:
        aside = run_dir / "earlier" / path.relative_to(run_dir)
        discard_directory(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.replace(aside)
    if moved:
        names = ", ".join(str(path.relative_to(run_dir)) for path in moved)
        say(f"{names} of an earlier run were moved to {run_dir / 'earlier'}")


def _checkpoints(directory: Path) -> list[Path]:
    """Oldest first: the names begin with the optimizer step and the place in the plan."""
    return sorted(path for path in directory.glob("*.ckpt") if re.match(r"\d{8,}-\d\d", path.name))
