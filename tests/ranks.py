"""Tiny TOSS-Pro runs on several processes: a program for a launcher to start, and the two launchers.

python tests/ranks.py RUNS.json

RUNS.json lists runs, the arguments of :func:`one_run` each. One start does all of them.
"""

import faulthandler
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import tiny_fit
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from two_processes import free_port, side_by_side, start, write_runs

from toss_lightning.loops.checkpoints import newest
from toss_lightning.scores import ScoreWriter, TokenScores
from toss_lightning.selection import TokenWeights

TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
PLAN: dict[str, Any] = {
    "loop": {"rounds": 2, "promote": 2, "keep_epoch": "best"},
    "data": {"score_every": 2, "max_tokens": 30},
    "checkpoint_every": 4,
}
"""Rounds that promote, epochs that are judged on held-out rows, and several chunks for each rank to score."""
ADAPTERS = ("utility", "degraded", "degraded-1", "degraded-2", "target")


class Killed(Exception):
    """The run was to end here."""


class Kill(Callback):
    """Ends the run on all ranks before an optimizer step, or behind the second chunk that a rank scores of a column."""

    def __init__(self, step: int | None = None, column: str | None = None) -> None:
        self.step, self.column = step, column

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follows what is scored."""
        writer, self.scored = ScoreWriter.append, 0

        def append(*args: Any) -> None:
            writer(*args)
            self.scored += args[1] == self.column
            if self.scored == 2:
                ScoreWriter.append = writer  # type: ignore[method-assign]
                raise Killed

        if self.column is not None:
            ScoreWriter.append = append  # type: ignore[assignment, method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ends the run at its step."""
        if trainer.global_step == self.step:
            raise Killed


class Sizes(Callback):
    """Writes how much of the model each rank holds after training: ``sizes-RANK.json``, name -> [here, in all]."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After forward and backward passes, which gather what they need."""
        module: Any = pl_module
        sizes = {
            name: [(value.to_local() if isinstance(value, DTensor) else value).numel(), value.numel()]
            for name, value in module.bank.model.named_parameters()
        }
        path = Path(trainer.default_root_dir) / f"sizes-{trainer.global_rank}.json"
        path.write_text(json.dumps(sizes), encoding="utf-8")


class Embeds(Callback):
    """Files embeddings of sets that leave one of two ranks without a row, or all with rows, behind the last step."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As a selection that reads embeddings has them filed."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        path = Path(trainer.default_root_dir) / "embedded"
        data.score(trainer, {}, path, features={"embedding": ["utility_val", "custom"]})


def one_run(
    model: str,
    sets: dict[str, Any],
    run_dir: str,
    resume: bool = False,
    kill: dict[str, Any] | None = None,
    strategy: str = "auto",
    **options: Any,
) -> None:
    """A run from its beginning or from its newest checkpoint, to its end or to where it is killed."""
    ranks = options.get("devices", 1) * options.get("num_nodes", 1)
    sharded = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)
    settings = {**PLAN, **options, "strategy": sharded if strategy == "fsdp2" else strategy}
    callbacks = [Embeds(), *([Sizes()] if strategy == "fsdp2" else []), *([Kill(**kill)] if kill else [])]
    ckpt_path = str(newest(Path(run_dir) / "checkpoints")) if resume else None
    try:
        tiny_fit(model, sets, Path(run_dir), callbacks, ckpt_path, **settings)
    except Killed:
        assert kill
    else:
        assert not kill


def by_lightning(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Does all runs on 2 processes, which find what Lightning tells those that it starts."""
    start(__file__, runs, folder)


def by_torchrun(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Does all runs on two "nodes" of one process each, which find each other over the network."""
    command = [*TORCHRUN, "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    program = [__file__, write_runs(runs, folder)]
    nodes = {f"node-{node}": ([*command, "--node-rank", str(node), *program], {}) for node in range(2)}
    side_by_side(nodes, folder)


def assert_equal(one: Path, other: Path, losses: float, adapters: float) -> None:
    """Token losses of all rounds, the mask and the adapters of two runs are the same but for rounding.

    Args:
        one: a run directory.
        other: another.
        losses: how far token losses may lie apart.
        adapters: how far a weight matrix may lie off, relative to its norm.
    """
    for round in range(PLAN["loop"]["rounds"] + 1):
        ours, theirs = (TokenScores(run / "scores", round) for run in (one, other))
        for column in ("loss_utility", "loss_degraded"):
            np.testing.assert_allclose(theirs.flat(column), ours.flat(column), rtol=0, atol=losses)
    np.testing.assert_array_equal(*(TokenWeights.load(run / "selection").flat() for run in (one, other)))
    for name in ADAPTERS:
        weights, others = (load_file(run / "adapters" / name / "adapter_model.safetensors") for run in (one, other))
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            assert torch.linalg.norm(value - others[key]) <= adapters * torch.linalg.norm(value), (name, key)


def promoted(run_dir: Path) -> list[list[int]]:
    """The rows that each round promoted."""
    files = sorted((run_dir / "promoted").iterdir())
    return [[row["row_id"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]] for file in files]


def _part() -> None:
    """Ends the process group where the interpreter still lives: threads of gloo that outlive it abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        gc.collect()


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        one_run(**run)
    _part()
