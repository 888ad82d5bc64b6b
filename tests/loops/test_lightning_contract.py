"""What PlanLoop takes from inside Lightning. When one of these fails, read the top of loops/plan_loop.py first."""

import inspect
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from runs import tiny_fit

from toss_lightning.loops import TossProLoop
from toss_lightning.loops.checkpoints import PlanCheckpoint
from toss_lightning.loops.plan_loop import PlanLoop


@pytest.fixture
def loop() -> _FitLoop:
    return Trainer(logger=False, enable_checkpointing=False, max_epochs=1).fit_loop


@pytest.mark.parametrize("name", ["run", "setup_data", "on_advance_start", "on_save_checkpoint", "on_load_checkpoint"])
def test_a_method_that_is_overridden_exists(name: str) -> None:
    assert callable(getattr(_FitLoop, name))
    assert name in vars(PlanLoop), f"{name} is no longer overridden: drop it here"


def test_the_names_exist(loop: _FitLoop) -> None:
    assert isinstance(loop, _FitLoop)
    for name in (
        "batch_idx",
        "epoch_loop",
        "epoch_progress",
        "max_epochs",
        "restarting",
        "restarted_mid_epoch",
        "_combined_loader",
        "_combined_loader_states_to_load",
    ):
        assert hasattr(loop, name), name
    for name in ("ready", "started", "processed", "completed"):
        assert hasattr(loop.epoch_progress.current, name), name
        assert hasattr(loop.epoch_loop.batch_progress.current, name), name
    assert callable(loop.epoch_loop.val_loop.run)
    assert hasattr(loop.epoch_loop.val_loop, "restarting")
    assert callable(loop.reset_restart_stage)
    assert callable(loop.epoch_loop.reset_restart_stage)
    assert callable(loop.epoch_loop.reset)


def test_a_step_is_logged_behind_the_hooks_that_may_end_the_run() -> None:
    source = inspect.getsource(_TrainingEpochLoop.advance)
    assert source.index('"on_train_batch_end"') < source.index("trainer._logger_connector.update_train_step_metrics()")


def test_the_loader_is_asked_for_again_once_the_old_one_is_gone() -> None:
    source = inspect.getsource(_FitLoop.setup_data)
    assert "self._combined_loader is not None" in source


def test_the_states_of_the_loaders_wait_in_the_loop_until_the_loader_is_there() -> None:
    source = inspect.getsource(_FitLoop._load_combined_loader_states)
    assert "self._combined_loader._load_state_dicts(self._combined_loader_states_to_load)" in source


def test_the_flag_of_the_last_batch_ends_an_epoch_and_is_in_checkpoints(loop: _FitLoop) -> None:
    progress = loop.epoch_loop.batch_progress
    progress.is_last_batch = True
    assert loop.epoch_loop._num_ready_batches_reached()
    assert "self._num_ready_batches_reached()" in inspect.getsource(_TrainingEpochLoop._is_training_done.fget)
    assert progress.state_dict()["is_last_batch"]
    assert "self.epoch_loop.batch_progress.is_last_batch" in inspect.getsource(_FitLoop.reset)
    progress.reset_on_run()
    assert not progress.is_last_batch


def test_callbacks_that_write_checkpoints_come_last(tmp_path: Path) -> None:
    saver = PlanCheckpoint(tmp_path, 1)
    trainer = Trainer(logger=False, callbacks=[saver, Callback()], enable_progress_bar=False, accelerator="cpu")
    assert trainer.callbacks[-1] is saver


def test_the_fit_loop_of_a_trainer_can_be_replaced_and_runs(tiny_model: str, tiny_sets: dict, tmp_path: Path) -> None:
    class Seen(Callback):
        stages: list[str] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if module.stage_name not in self.stages:
                self.stages.append(module.stage_name)

    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, [Seen()], loop={"rounds": 1, "promote": 2})
    assert isinstance(trainer.fit_loop, TossProLoop)
    assert Seen.stages == ["utility", "degraded", "degraded-1", "target"]
