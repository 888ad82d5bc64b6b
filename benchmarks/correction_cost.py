"""What an optimizer step costs where a method corrects its gradient, anchors its tokens or weighs them as it goes.

    python benchmarks/correction_cost.py [--models tiny bundled] [--epochs 25 1]

All methods take turns in one process with one thread: a step of plain fine-tuning, one of SPF, one of SafeGrad, and so
on, on the same rows, and again. So whatever else the machine does falls on all of them alike. Each keeps its own
adapter and optimizer. A step is all of it: its micro-batches forward and backward, what the method asks of the model
besides, clipping, and AdamW; Lightning's loop around it, which costs the same for all, is left out.

``tiny`` is the model of the tests, two layers of 64, in float32, in which a step is mostly overhead; ``bundled`` is the
135M model of the demo in NF4. Both train LoRA of rank 16 on all linear layers, in steps of 8 rows. Writes
benchmarks/results/correction_cost.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim import Optimizer

from toss_lightning.data import TossDataModule
from toss_lightning.data.batching import StepBatches
from toss_lightning.gradients import SPF, Correction, DualSelect, Gradients, Probe, SafeGrad
from toss_lightning.gradients.base import Angle
from toss_lightning.gradients.spf import project_out
from toss_lightning.lightning_cli import quiet
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.models import Base, Lora, Optim, WeightedLoraModule
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.objective import Normalize, Objective
from toss_lightning.models.optim import make_optimizer
from toss_lightning.progress import progress_bar
from toss_lightning.selection import DrSft, OnlineSelection, Rho1

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the language and the tiny model are the tests' own
from language import RING, UNSAFE, Language
from tiny import save_tiny_model, write_rows

RESULTS = Path(__file__).parent / "results" / "correction_cost.md"
ROWS, CLIP, WARM_UP = 8, 1.0, 2
EPOCHS = [25, 1]
"""Measured, of the tiny and of the bundled model."""
GOAL = 2.2
"""Times the plain step: what SPF with one safety row is to cost at most."""
TITLES = {"tiny": "Tiny model", "bundled": "Bundled 135M model, NF4"}
LOSSES = ("loss_base", "loss_utility", "loss_degraded")
PLAIN, GOAL_OF = "plain fine-tuning", "SPF, all steps projected"


class Silent(WeightedLoraModule):
    """A module outside of a fit, where there is nothing to log to."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""


class Projecting(SPF):
    """SPF at its dearest: every step is projected, as if it were in conflict."""

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Does all that SPF does in a conflict."""
        _, safety = probe.gradient(range(self.examples))
        self.record(steps=1, compared=1, conflicts=Angle.between(gradients, safety).conflict)
        project_out(gradients, safety, self._count)


@dataclass
class Method:
    """What stands beside the task gradient, and the state of its training."""

    correction: Correction | None = None
    online: OnlineSelection | None = None
    anchored: str = ""
    normalize: Normalize = "all"
    optimizer: Optimizer | None = None
    probe: Any = None
    objective: Any = None
    batches: Any = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def methods() -> dict[str, Method]:
    """What is measured. DualSelect's own warm-up is over with a step that is not measured."""
    return {
        PLAIN: Method(),
        "SPF, 1 safety row": Method(SPF()),
        GOAL_OF: Method(Projecting()),
        "SafeGrad, 8 safety rows": Method(SafeGrad()),
        "DualSelect": Method(DualSelect(warmup=1), normalize="row"),
        "TOSS-Anchor, masked": Method(anchored="masked"),
        "SFT + anchor everywhere": Method(anchored="everywhere"),
        "DR-SFT": Method(online=DrSft()),
        "Rho-1": Method(online=Rho1(), normalize="kept"),
    }


# --- the model and the rows -------------------------------------------------------------------------------------------


def tiny(folder: Path) -> tuple[Base, TossDataModule]:
    """The tests' model of random weights, and rows of its language."""
    language, words = Language(1), [*RING, *UNSAFE, "hop", "break", "then", "sorry"]
    sets = {"custom": language.walks(64, "hop", 3, contaminated=0.2), "safety": language.refusals(24)}
    files = {name: write_rows(folder / f"{name}.jsonl", pairs) for name, pairs in sets.items()}
    base = save_tiny_model(folder / "base", words, hidden=64, layers=2)
    return Base(base, quantization="none"), TossDataModule(**files, batch_size=ROWS, max_tokens=2048)


def bundled(folder: Path) -> tuple[Base, TossDataModule]:
    """The bundled model and rows, as configs/demo.yaml sets them up."""
    data = TossDataModule("sample:custom", safety="sample:safety", batch_size=ROWS, max_length=512, max_tokens=640)
    return Base("bundled:smollm2-135m-instruct", quantization="nf4"), data


def values_of(data: TossDataModule, method: Method) -> dict[str, dict[int, np.ndarray]] | None:
    """Token weights, anchors and columns: what they are does not change the cost of a step, only where they are 0."""
    if not method.anchored and method.online is None:
        return None
    random = np.random.default_rng(1)
    lengths = {row.row_id: len(row.response_positions) for row in data.sets["custom"].rows}
    drawn = {row: random.random(length) for row, length in lengths.items()}
    if method.online is not None:
        losses = {row: (4 * v).astype(np.float32) for row, v in drawn.items()}
        ends = {row.row_id: row.end_of_turn.astype(np.float32) for row in data.sets["custom"].rows}
        ones = {row: np.ones_like(v, np.float32) for row, v in drawn.items()}
        return {"weight": ones, **dict.fromkeys(LOSSES, losses), "end_of_turn": ends}
    masked = {row: (v < 0.1).astype(np.float32) for row, v in drawn.items()}
    everywhere = {row: np.ones_like(v) for row, v in masked.items()}
    if method.anchored == "everywhere":
        return {"weight": everywhere, "anchor": everywhere}
    return {"weight": {row: 1 - v for row, v in masked.items()}, "anchor": masked}


# --- steps ------------------------------------------------------------------------------------------------------------


class Turns(Callback):
    """Lets all methods take turns where a fit has set everything up, instead of it.

    Args:
        epochs: how many are measured, behind some steps of warm-up.
        name: what the progress bar says.
    """

    def __init__(self, epochs: int, name: str) -> None:
        self.epochs, self.name = epochs, name
        self.methods = methods()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the turns.

        Raises:
            Done: they are taken.
        """
        module: Any = pl_module
        arm(module, trainer.datamodule, self.methods)  # type: ignore[attr-defined]
        per_epoch = self.methods[PLAIN].batches.plan.steps_per_epoch
        turns = WARM_UP + self.epochs * per_epoch
        with progress_bar(f"{self.name}: steps of each method", turns, "turn") as bar:
            for step in range(turns):
                for method in self.methods.values():
                    seconds = take_step(module, method, step - WARM_UP)
                    if step >= WARM_UP:
                        method.seconds.append(seconds)
                bar.update()
        raise Done


class Done(Exception):
    """There is nothing left for the fit to do."""


def arm(module: Silent, data: TossDataModule, methods: Mapping[str, Method]) -> None:
    """Gives every method its rows, its objective and an adapter, as a loop does where a stage begins."""
    for method in methods.values():
        module.correction, correction = method.correction, method.correction
        method.objective = Objective(method.normalize, method.online)
        whole = method.objective.whole_step or (correction is not None and correction.whole_step)
        data.begin_stage("custom", 1, values_of(data, method), whole_step=whole)
        pool = partial(data.batches, "safety") if correction is not None else None
        module.begin_objective(method.objective, pool, len(data.sets["safety"].rows))
        plan = data.plan_stage()
        module.trainer.accumulate_grad_batches = plan.accumulate
        method.batches, method.probe = StepBatches(data.stage_rows, plan), module.probe
        method.optimizer = make_optimizer(module.optim, [value for _, value in module.bank.parameters(SLOT)])
        method.weights = {name: value.detach().clone() for name, value in module.bank.parameters(SLOT)}


def take_step(module: Silent, method: Method, step: int) -> float:
    """An optimizer step of a method; returns its seconds of CPU time."""
    parameters, optimizer = dict(module.bank.parameters(SLOT)), method.optimizer
    assert optimizer is not None
    plan = method.batches.plan
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(method.weights[name])
    module.correction, module.objective, module.probe = method.correction, method.objective, method.probe
    module.stage_epoch, at = divmod(step, plan.steps_per_epoch)
    batches = [method.batches[at * plan.accumulate + micro] for micro in range(plan.accumulate)]
    started = time.process_time()
    for index, batch in enumerate(batches):
        (module.training_step(batch, index) / plan.accumulate).backward()
    module.on_before_optimizer_step(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.process_time() - started
    method.weights = {name: value.detach().clone() for name, value in parameters.items()}
    return seconds


def measure(name: str, epochs: int) -> dict[str, Method]:
    """All methods on one model."""
    make: Callable[[Path], tuple[Base, TossDataModule]] = {"tiny": tiny, "bundled": bundled}[name]
    seed_everything(1, verbose=False)
    turns = Turns(epochs, name)
    with tempfile.TemporaryDirectory() as folder, suppress(Done):
        base, data = make(Path(folder))
        module = Silent(base, Lora(r=16, alpha=16, targets="all-linear"), optim=Optim(lr=5e-4))
        options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        make_trainer(
            str(Path(folder) / "run"),
            partial(TossProLoop, plan=["target"]),
            callbacks=[turns],
            enable_progress_bar=False,
            **options,
        ).fit(module, datamodule=data)
    return turns.methods


# --- the tables -------------------------------------------------------------------------------------------------------


def ratio(seconds: Sequence[float], plain: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and its 95 % interval from 4000 bootstrap samples of the turns."""
    both = np.array([seconds, plain])
    turns = np.random.default_rng(0).integers(both.shape[1], size=(4000, both.shape[1]))
    medians = np.median(both[:, turns], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    middle = np.median(both, axis=1)
    return float(middle[0] / middle[1]), float(low), float(high)


def table(measured: Mapping[str, Method]) -> list[str]:
    """A line for each method."""
    plain = measured[PLAIN].seconds
    lines = [
        "| | median step, ms | times the plain step | whole epochs, times plain | steps in conflict |",
        "|---|---|---|---|---|",
    ]
    for label, one in measured.items():
        times, low, high = ratio(one.seconds, plain)
        cells = [
            f"{float(f'{1000 * np.median(one.seconds):.4g}'):,g}",
            "1" if label == PLAIN else f"{times:.2f} ({low:.2f} to {high:.2f})",
            f"{sum(one.seconds) / sum(plain):.2f}",
            f"{100 * one.correction.report()['conflict_share']:.0f} %" if one.correction else "",
        ]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def report(measured: Mapping[str, Mapping[str, Method]], options: str) -> str:
    """Both tables, and whether the goal is met."""
    lines = [
        "# What an optimizer step costs with each method",
        "",
        f"Written by `python benchmarks/correction_cost.py{options}`, which says more. CPU time, one thread, steps of",
        f"{ROWS} rows, LoRA of rank 16 on all linear layers; all methods take turns in one process. In brackets the",
        "95 % interval of the ratio of medians (bootstrap over turns). Whole epochs count what is done once an epoch",
        "too, such as DualSelect's pass over the safety set. Conflicts are counted over the measured steps and the",
        f"{WARM_UP} of warm-up before them.",
    ]
    for name, one in measured.items():
        count = len(one[PLAIN].seconds)
        times, _, high = ratio(one[GOAL_OF].seconds, one[PLAIN].seconds)
        met = "met" if high <= GOAL else "met by the median, not by its interval" if times <= GOAL else "not met"
        lines += ["", f"## {TITLES[name]}", "", f"{count} steps of each method.", "", *table(one), ""]
        lines += [f"Goal: {GOAL_OF}, at most {GOAL} times the plain step: {met}."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--epochs", type=int, nargs=2, default=EPOCHS, help="of 8 steps each: tiny and bundled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    epochs = dict(zip(TITLES, args.epochs, strict=True))
    measured = {name: measure(name, epochs[name]) for name in args.models}
    options = "" if args.models == list(TITLES) else f" --models {' '.join(args.models)}"
    options += "" if args.epochs == EPOCHS else f" --epochs {' '.join(map(str, args.epochs))}"
    text = report(measured, options)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
