"""A stage that ends before its epochs are over: ``PlanLoop.end_stage_early``, whoever asks for it."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from runs import artifacts, tiny_fit

RUN: dict[str, Any] = {
    "plan": ("utility", "degraded", "score", "select", "target"),
    "loop": {"rounds": 1, "promote": 2},
}
STAGES = {"utility": 6, "degraded": 4, "degraded-1": 6, "target": 8}
"""Stage -> its optimizer steps in two epochs."""


class EndAt(Callback):
    """Ends a stage early with one of its steps, and counts the steps of all; may end the run before a global step."""

    def __init__(self, stage: str, step: int, kill: int = -1) -> None:
        self.stage, self.step, self.kill = stage, step, kill
        self.epochs: list[tuple[str, int]] = []
        self.taken: list[str] = []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append((module.stage_name, module.stage_epoch))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.kill:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.taken.append(module.stage_name)
        loop = trainer.fit_loop
        if (module.stage_name, loop.step_in_stage) == (self.stage, self.step):
            loop.end_stage_early()


CASES = [
    ("utility", 1),
    ("utility", 3),
    ("degraded", 3),
    ("degraded-1", 2),
    ("target", 1),
    ("target", 6),
    ("target", 8),
]


@pytest.mark.parametrize(("stage", "step"), CASES)
def test_the_stages_behind_it_have_all_their_steps(
    tiny_model, tiny_sets, tmp_path: Path, capsys, stage: str, step: int
) -> None:
    end = EndAt(stage, step)
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, [end], **RUN)
    expected = {**STAGES, stage: step}
    assert {name: end.taken.count(name) for name in STAGES} == expected
    assert trainer.global_step == sum(expected.values())
    epochs = dict.fromkeys(STAGES, 2) | {stage: 1 + (step > STAGES[stage] // 2)}
    assert end.epochs == [(name, epoch) for name, count in epochs.items() for epoch in range(count)]
    assert trainer.current_epoch == trainer.max_epochs == sum(epochs.values())
    assert "cut short" not in capsys.readouterr().out
    assert (tmp_path / "summary.json").is_file()


# a kill right behind the stage's end, and one in the stage that follows
@pytest.mark.parametrize(("stage", "step", "kill"), [("utility", 2, 2), ("degraded", 1, 7), ("degraded-1", 3, 15)])
def test_and_a_run_killed_there_resumes(
    tiny_model, tiny_sets, tmp_path: Path, stage: str, step: int, kill: int
) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path / "whole", [EndAt(stage, step)], **RUN)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "killed", [EndAt(stage, step, kill)], **RUN)
    tiny_fit(tiny_model, tiny_sets, tmp_path / "killed", [EndAt(stage, step)], **RUN, ckpt_path="last")
    assert artifacts(tmp_path / "killed") == artifacts(tmp_path / "whole")


@pytest.mark.parametrize("max_steps", [3, 5])
def test_a_limit_of_the_trainer_still_cuts_the_run(
    tiny_model, tiny_sets, tmp_path: Path, capsys, max_steps: int
) -> None:
    end, rarely = EndAt("utility", 3), {**RUN, "checkpoint_every": 100}
    tiny_fit(tiny_model, tiny_sets, tmp_path, [end], **rarely, max_steps=max_steps)
    assert "cut short by the Trainer's limits" in capsys.readouterr().out
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, [end], **rarely, ckpt_path="last")
    assert {name: end.taken.count(name) for name in STAGES} == {**STAGES, "utility": 3}
    assert trainer.global_step == sum(STAGES.values()) - 3
