"""Tiny runs that write down their gradients, weights and what their probe answers: a program for two processes.

python tests/watched.py RUNS.json

RUNS.json lists the arguments of :func:`watched_run`. One start does all of them.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from runs import tiny_fit
from two_processes import start

from toss_lightning.errors import TrainingError
from toss_lightning.gradients import SPF, Correction, Gradients, Probe, SafeGrad
from toss_lightning.models import Lora, Optim, Schedule
from toss_lightning.models.adapters import SLOT
from toss_lightning.scores import TokenScores
from toss_lightning.selection import (
    Anchored,
    ConstrainedSft,
    DrSft,
    GlobalTopFraction,
    Rho1,
    Seal,
    Selection,
    TokenWeights,
)
from toss_lightning.selection.base import token_weights

ASKED_AT = 3
"""The optimizer step at which :class:`Asks` asks."""
ROWS = (0, 2, 3, 5, 6)
"""Reference rows that it asks about."""
ROW_WEIGHTS = (0.3, 0.0, 1.5, 0.7, 0.2)


class Random(Selection):
    """Random weights and anchors, either of them 0 at some tokens."""

    columns = ()

    def __init__(self, anchored: bool = False) -> None:
        self.anchored = anchored

    def select(self, scores: TokenScores) -> TokenWeights:
        """The same in every process."""
        generator = np.random.default_rng(0)
        weights, anchors = generator.random((2, int(scores.offsets[-1])))
        weights[::3], anchors[1::4] = 0, 0
        return token_weights(scores, weights, anchors if self.anchored else None)


class Asks(Correction):
    """Asks the probe everything at one step, and corrects nothing."""

    whole_step = True

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[str, Any] = {}

    def begin_step(self, probe: Probe, epoch: int) -> None:
        """Asks about the rows to come, along the gradient of the step before."""
        if self._sums["steps"] == ASKED_AT:
            self._answers["task"] = vars(probe.task_products(self._last))

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Asks about the reference rows."""
        if self._sums["steps"] == ASKED_AT:
            self._answers |= {kind: probe.gradient(ROWS, kind) for kind in ("loss", "kl")}
            self._answers["rows"] = probe.mean_row_gradient(ROWS, torch.tensor(ROW_WEIGHTS))
            self._answers["reference"] = vars(probe.reference_products(self._last))
        self.record(steps=1)
        self._last = {name: value.clone() for name, value in gradients.items()}


class ChoosesRows(Correction):
    """Leaves every other row out of the steps, and halves the ones in between."""

    whole_step = True

    def begin_step(self, probe: Probe, epoch: int) -> Mapping[int, float]:
        """Factors of :func:`row_factor`."""
        return {index: row_factor(index) for index in range(100)}

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Corrects nothing."""


def row_factor(index: int) -> float:
    """What :class:`ChoosesRows` makes of a row."""
    return (0.0, 1.0, 0.0, 0.5)[index % 4]


class Poison(Callback):
    """Makes one row of the safety set infinite from an optimizer step on: its losses, or their gradient alone."""

    def __init__(self, gradient: bool) -> None:
        self.gradient = gradient

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stands between the module and whoever asks."""
        module: Any = pl_module
        losses = module.losses

        def poisoned(batch: Any, which: Any = None) -> Any:
            found = losses(batch, which)
            if batch.get("set") != "safety" or trainer.global_step < 2:
                return found
            here = batch["row_id"][batch["row"]] == 4
            if self.gradient:
                # where hands 0 back to the infinite branch, which makes it nan
                return torch.where(here & False, torch.inf * found, found)
            return torch.where(here, torch.inf, 1.0) * found

        module.losses = poisoned


class Watch(Callback):
    """Keeps, of each optimizer step of a stage, what it began with and what became of its gradient."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.seen: dict[str, Any] = {
            name: [] for name in ("before", "raw", "corrected", "weights", "logits", "steps", "logged")
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first micro-batch: the adapter's weights and the rows of the step."""
        module: Any = pl_module
        if module.stage_name != self.stage or batch_idx % trainer.accumulate_grad_batches:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        step = data.plan.steps[module.stage_epoch][batch_idx // trainer.accumulate_grad_batches]
        self.seen["before"].append({name: value.detach().clone() for name, value in module.bank.parameters(SLOT)})
        self.seen["steps"].append([row for rank in step for group in rank for row in group])
        stage = data.stage_rows
        self.seen |= {"accumulate": data.plan.accumulate, "own": stage.own}
        self.seen["rows"] = [_row(row, values) for row, values in zip(stage.rows, stage.values, strict=True)]
        self.seen["reference"] = [_row(row, {}) for row in data.sets["safety"].rows]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Before the correction: the gradient, and the weights of this rank's tokens."""
        module: Any = pl_module
        if module.stage_name == self.stage:
            self.seen["raw"].append(_gradients(module))
            batches = [] if self.stage == "seal" else module.objective.step_batches
            found = {}
            for batch in batches:
                for at, index in enumerate(batch["index"].tolist()):
                    found[index] = batch["weight"][batch["row"] == at].tolist()
            self.seen["weights"].append(found)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step: the gradient that was taken, and the selector."""
        module: Any = pl_module
        if module.stage_name == self.stage and not (batch_idx + 1) % trainer.accumulate_grad_batches:
            self.seen["corrected"].append(_gradients(module))
            loop: Any = trainer.fit_loop
            self.seen["logits"].append(loop.selector.logits.clone() if loop.selector else None)
            prefix = f"{self.stage}/"
            logged = {name.removeprefix(prefix): float(value) for name, value in trainer.callback_metrics.items()}
            self.seen["logged"].append(logged)


def _gradients(module: Any) -> Gradients:
    return {name: value.grad.clone() for name, value in module.bank.parameters(SLOT)}


def _row(row: Any, values: Any) -> dict[str, Any]:
    found = {name: torch.tensor(value) for name, value in values.items()}
    found.setdefault("weight", torch.ones(len(row.response_positions)))
    return {
        "ids": torch.tensor(row.input_ids.tolist()),
        "positions": row.response_positions.tolist(),
        "end": row.end_of_turn.tolist(),
        **found,
    }


def _trained(**module: Any) -> dict[str, Any]:
    """The target alone, corrected."""
    return {"plan": ["target"], "module": module}


def chosen_rows(normalize: str) -> dict[str, Any]:
    """Rows are chosen in training, beside weights that were selected before."""
    module = {"normalize": normalize, "correction": ChoosesRows()}
    return {"plan": SCORED, "loop": {"selection": Random()}, "module": module}


SCORED = ["score", "select", "target"]
RHO1: dict[str, Any] = {"plan": ["utility", *SCORED], "loop": {"selection": Rho1()}, "module": {"normalize": "kept"}}
OPTIM = {"optim": Optim(lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1), "schedule": Schedule("linear", warmup=0.25)}
DROPOUT = Lora(r=4, targets="all-linear", dropout=0.5)
SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "probe": lambda: {
        "plan": SCORED,
        "loop": {"selection": Random()},
        # neither dropout nor a coarse anchor is any business of the probe
        "module": {"correction": Asks(), "lora": DROPOUT, "chunk": 5, "anchor_top": 1},
    },
    "anchor": lambda: {"plan": SCORED, "loop": {"selection": Random(anchored=True)}},
    "anchor_top": lambda: {"plan": SCORED, "loop": {"selection": Random(anchored=True)}, "module": {"anchor_top": 7}},
    "rho1": lambda: RHO1,
    "rho1_dropout": lambda: {**RHO1, "module": {**RHO1["module"], "lora": DROPOUT}},
    "dr_sft": lambda: {"plan": ["degraded", *SCORED], "loop": {"selection": DrSft(beta=0.5)}},
    "constrained": lambda: {"plan": SCORED, "loop": {"selection": ConstrainedSft(early_tokens=3)}},
    "safety_rows": lambda: {
        "plan": ["utility", "degraded", *SCORED],
        "loop": {"selection": Anchored(GlobalTopFraction(0.3), weight=0.5, safety_rows=2)},
    },
    "rows_kept": lambda: chosen_rows("kept"),
    "rows_row": lambda: chosen_rows("row"),
    "optim": lambda: {"plan": SCORED, "loop": {"selection": Random()}, "module": OPTIM},
    "seal": lambda: {"plan": ["seal", *SCORED], "loop": {"selection": Seal(epochs=2, gamma=0.6, lr=0.05)}},
    "spf": lambda: _trained(correction=SPF(k=1, examples=2)),
    "safegrad": lambda: _trained(correction=SafeGrad(examples=99)),
    "poisoned": lambda: _trained(correction=SPF(examples=7)),
    "poisoned_rows": lambda: _trained(correction=Asks()),
    "poisoned_gradient": lambda: _trained(correction=SPF(examples=7)),
}
"""Name -> options of a run."""


def watched_run(model: str, sets: dict[str, str], folder: str, name: str, ranks: int = 1) -> None:
    """A run that leaves ``seen-RANK.pt``, or the message of the error that ended it, ``error-RANK.txt``."""
    options, run_dir = {**SETUPS[name]()}, Path(folder) / f"{name}-{ranks}"
    watch = Watch("seal" if name == "seal" else "target")
    callbacks = [watch, *([Poison(name.endswith("gradient"))] if name.startswith("poisoned") else [])]
    data = {"batch_size": 6, "max_tokens": 48}
    loop = {"epochs": 2, **options.pop("loop", {})}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    strategy = "ddp" if ranks > 1 else "auto"
    try:
        trainer = tiny_fit(
            model, sets, run_dir, callbacks, data=data, loop=loop, devices=ranks, strategy=strategy, **options
        )
    except TrainingError as error:
        (run_dir / f"error-{rank}.txt").write_text(str(error), encoding="utf-8")
        return
    correction: Any = trainer.lightning_module.correction
    watch.seen["answers"] = getattr(correction, "_answers", {})
    watch.seen["report"] = correction.report() if correction is not None else {}
    torch.save(watch.seen, run_dir / f"seen-{rank}.pt")


def on_two(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Does all runs on 2 processes, which find what Lightning tells those that it starts."""
    start(__file__, [{**run, "ranks": 2} for run in runs], folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        watched_run(**run)
