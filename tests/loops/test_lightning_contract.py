"""What TossProLoop takes from inside Lightning. When one of these fails, read loops/toss_pro.py first."""

import inspect
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from runs import tiny_fit

from toss_lightning.loops import TossProLoop


def test_the_names_exist() -> None:
    for name in ("run", "setup_data", "on_advance_start", "on_save_checkpoint", "on_load_checkpoint"):
        assert callable(getattr(_FitLoop, name)), name
        assert name in vars(TossProLoop), f"{name} is no longer overridden: drop it here"
    loop = Trainer(logger=False, enable_checkpointing=False, max_epochs=1).fit_loop
    assert isinstance(loop, _FitLoop)
    for name in ("epoch_loop", "epoch_progress", "max_batches", "_combined_loader", "restarted_mid_epoch"):
        assert hasattr(loop, name), name
    assert callable(loop.epoch_loop.val_loop.run)
    assert hasattr(loop.epoch_loop.val_loop, "restarting")
    assert callable(loop.reset_restart_stage)
    assert callable(loop.epoch_loop.reset_restart_stage)
    assert callable(loop.epoch_loop.reset)


def test_the_loader_is_asked_for_again_once_the_old_one_is_gone() -> None:
    source = inspect.getsource(_FitLoop.setup_data)
    assert "self._combined_loader is not None" in source


def test_the_fit_loop_of_a_trainer_can_be_replaced_and_runs(tiny_model: str, tiny_sets: dict, tmp_path: Path) -> None:
    class Seen(Callback):
        stages: list[str] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if module.stage_name not in self.stages:
                self.stages.append(module.stage_name)

    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, [Seen()])
    assert isinstance(trainer.fit_loop, TossProLoop)
    assert Seen.stages == ["utility", "degraded", "target"]
