"""A run that is told to stop ends where what it has done is not lost."""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from toss_lightning.errors import Stopped
from toss_lightning.progress import say


class StopOnSignal(Callback):
    """Ends a run that is told to, on all ranks.

    SIGTERM, and on SLURM the signal that announces the time limit (SIGUSR1 by default), end the run behind the
    optimizer step, the scored chunk or the replies that are under way; that signal also requeues the job.
    """

    saves = False
    """There is a checkpoint where the run ends."""

    def __init__(self) -> None:
        self._told: int | None = None
        self._requeue_signal: int | None = None
        self._requeue = False

    def on_plan_start(self, trainer: Trainer) -> None:
        """Listens for signals.

        Takes them over from Lightning, which would act in the middle of a step.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._hear)
        # private: the strategy of a single device does not know the environment; Lightning's own handler looks here
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            signal.signal(self._requeue_signal, self._hear)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self._told = self._told or signum
        self._requeue |= signum == self._requeue_signal

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run behind an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.stop_if_told(trainer, behind_step=True)

    def before_stop(self, trainer: Trainer) -> None:
        """What is done before the run ends: nothing."""

    def stop_if_told(self, trainer: Trainer, saved: bool = False, behind_step: bool = False) -> None:
        """Ends the run when any rank was told to.

        Args:
            trainer: of the run.
            saved: all that has been done is on disk.
            behind_step: an optimizer step was just taken.

        Raises:
            Stopped: it was.
        """
        strategy = trainer.strategy
        if not strategy.reduce_boolean_decision(self._told is not None, all=False):
            return
        if not saved:
            self.before_stop(trainer)
        if behind_step:
            # private: Lightning logs a step behind the hooks that this stops it in, and resumed it is not taken again
            trainer._logger_connector.update_train_step_metrics()
        if strategy.reduce_boolean_decision(self._requeue, all=False) and trainer.is_global_zero:
            _requeue()
        strategy.barrier("requeued")  # srun may end every task of the job once one of them has ended
        raise Stopped(self._told or signal.SIGTERM, self.saves)


def _requeue() -> None:
    """Puts this SLURM job back into the queue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except FileNotFoundError:
        done = 127
    say(f"SLURM job {job} " + ("is back in the queue" if done == 0 else f"could not be requeued (scontrol: {done})"))
