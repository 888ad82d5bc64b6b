"""Tiny runs of the shipped methods, through the command line: a program for two processes, and what it shares.

python tests/method_runs.py RUNS.json

RUNS.json lists the arguments of :func:`method_run`. One start does all of them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import save_tiny_model, some_pairs, write_rows
from two_processes import start

from toss_lightning.cli import main
from toss_lightning.config_files import configs_directory

METHODS = ["toss", "toss_pro", *sorted(f"methods/{path.stem}" for path in configs_directory().glob("methods/*.yaml"))]
SIZES = {"custom": 14, "utility": 10, "harmful": 8, "safety": 6}
TINY = (
    *("--model.base.quantization=none", "--model.lora.r=4", "--model.lora.targets=all-linear", "--model.optim.lr=0.01"),
    *("--data.batch_size=4", "--data.max_tokens=40", "--trainer.accelerator=cpu", "--checkpoint_every=2"),
    *("--trainer.enable_progress_bar=false", "--trainer.logger=false"),
)
SCALED = {
    "methods/dualselect": ["--model.correction.warmup=2"],
    "methods/toss_dualselect": ["--model.correction.warmup=2"],
    "methods/sot": ["--loop.selection.steps=20"],
    "methods/toss_chain_anchor": ["--loop.selection.selection.discard=0.3"],
    "methods/toss_chain_safe_instr": ["--loop.selection.discard=0.3"],
    "methods/toss_chain_safegrad": ["--loop.selection.discard=0.3"],
}
"""What a method needs so that it does something in 8 optimizer steps on 14 rows."""


class Killed(Exception):
    """The run was to end here."""


class KillIn(Callback):
    """Ends the run before an optimizer step of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.left = stage, step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the steps of the stage."""
        if pl_module.stage_name != self.stage or batch_idx % trainer.accumulate_grad_batches:
            return
        if not self.left:
            raise Killed
        self.left -= 1


def prepare(folder: Path) -> None:
    """Writes the model and the sets that all runs share."""
    save_tiny_model(folder / "model")
    for first, (name, count) in enumerate(SIZES.items()):
        label = "benign" if name == "custom" else name
        write_rows(folder / f"{name}.jsonl", some_pairs(count, first), label=label, source="made")


def method_run(folder: str, method: str, run_dir: str, kill: Sequence[Any] = (), options: Sequence[str] = ()) -> None:
    """A run of a method, to its end or to where it is killed.

    Args:
        folder: what :func:`prepare` filled.
        method: below configs/.
        run_dir: where the run goes.
        kill: stage and step in it.
        options: further ones of the command line.
    """
    sets = [f"--data.{name}={Path(folder) / name}.jsonl" for name in SIZES]
    configs = ["--config=toss", *([f"--config={method}"] if method != "toss" else [])]
    rounds = ["--loop.rounds=1", "--loop.promote=2"] if method == "toss_pro" else []
    stage, step = kill or ("", 0)
    killer = f"{{class_path: method_runs.KillIn, init_args: {{stage: {stage}, step: {step}}}}}"
    end = [f"--trainer.callbacks=[{killer}]"]
    arguments = [
        *configs,
        f"--model.base.path={Path(folder) / 'model'}",
        *TINY,
        *sets,
        *rounds,
        *SCALED.get(method, []),
    ]
    try:
        assert main(["fit", *arguments, f"--run_dir={run_dir}", *(end if kill else []), *options]) == 0
    except Killed:
        assert kill
    else:
        assert not kill


def on_two(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Does all runs on 2 processes, which find what Lightning tells those that it starts."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    start(__file__, [{**run, "options": [*run.get("options", []), *two]} for run in runs], folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        method_run(**run)
