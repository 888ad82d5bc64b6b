"""summary.json, and what a run prints at its start and its end."""

import copy
import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from toss_lightning.errors import StoreError
from toss_lightning.evaluation.cells import Cells
from toss_lightning.files import write_json
from toss_lightning.progress import say
from toss_lightning.report.machine import device_name, peak_gpu_memory, versions
from toss_lightning.seeds import global_seed
from toss_lightning.selection.weights import REPORT_FILE

LOSSES = {"task_loss": "task loss", "harmful_loss": "harmful loss", "refusal_loss": "refusal loss"}
HINTS = {"task_loss": "lower is better", "harmful_loss": "higher is safer", "refusal_loss": "lower is safer"}
LEARNED = {"utility": "task_loss", "degraded": "harmful_loss"}
"""Reference -> the held-out loss that falls where it has learned what it is there for."""
PLAIN = "fine-tuned"
"""What a target is called that no plug-in acted on."""
NAMES = {
    "base": "base model",
    "sft": "plain SFT",
    "utility": "utility reference",
    "degraded": "degraded reference",
    "seal": "selector's adapter",
}


@dataclass
class Summary:
    """What happened so far; everything in it is plain, so that checkpoints can hold it."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage or action -> set, epochs, steps, rows, seconds."""
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    """``base``, or the stage that was just trained -> mean token loss of each held-out set."""
    epochs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Stage of a reference whose best epoch is kept -> the same behind each of its epochs."""
    selection: dict[str, Any] = field(default_factory=dict)
    """The selection's own report."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """What the scores were made from."""
    precision: str = ""
    """How the base is quantised, and the dtype that it computes in."""

    method: str = PLAIN
    """What people call the method that trains the target."""
    correction: dict[str, Any] = field(default_factory=dict)
    """The gradient correction's own report, over the target's steps."""
    idle: list[str] = field(default_factory=list)
    """Plug-ins that changed nothing, in words."""
    plain: bool = False
    """The target is what plain fine-tuning would have made of the same rows: no plug-in changed anything."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """For each round of TOSS-Pro: promoted rows and their labels, threshold and overlap of masks, harmful loss."""
    safety_probe: dict[str, Any] = field(default_factory=dict)
    """``base`` -> what the probe measured of it; ``stages`` -> a stage -> the same at each probe, with the drift."""
    weak: dict[str, str] = field(default_factory=dict)
    """Stage of a reference that has learned nothing which carries over -> how that shows, in words."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Stage that was ended early -> when and why, in words."""

    def of_round(self, round: int) -> dict[str, Any]:
        """What is known of a round, to read and to add to."""
        while len(self.rounds) <= round:
            self.rounds.append({"round": len(self.rounds)})
        return self.rounds[round]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a copy, which the run that goes on does not change."""
        return {one.name: copy.deepcopy(getattr(self, one.name)) for one in fields(self)}

    def load_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)

    @rank_zero_only
    def start(self, trainer: Trainer, steps: tuple[str, ...]) -> None:
        """Prints the plan and the table of the sets."""
        console = Console(markup=False)  # paths and names may hold brackets
        table = Table(title="Data", title_justify="left")
        table.add_column("set", no_wrap=True)
        for column in ("rows", "response tokens", "dropped", "truncated", "longest", "prompt tokens"):
            table.add_column(column, justify="right")
        for rows in trainer.datamodule.sets.values():  # type: ignore[attr-defined]
            counts = rows.counts()
            table.add_row(
                counts["set"],
                *(f"{counts[key]:,}" for key in ("rows", "response_tokens", "dropped", "truncated", "longest")),
                f"{counts['prompt_share']:.0%}",
            )
        console.print(table)
        console.print(f"Plan: {' → '.join(steps)}. Everything goes to {trainer.default_root_dir}", soft_wrap=True)

    def say_selected(self) -> None:
        """Says what a selection did, in one line."""
        if words := selected_words(self.selection):
            say(f"select: {words}")

    def say_idle(self) -> None:
        """Says loudly which plug-ins changed nothing."""
        for reason in self.idle:
            say(f"WARNING: {reason}")
        if self.idle and self.plain:
            say("WARNING: no plug-in of this method changed anything: the target is a plain fine-tuning")

    def best_epoch(self, stage: str, adapter: str) -> int:
        """Which epoch of a reference did best on held-out rows of its kind, the first of equals; from 0."""
        losses = [epoch[LEARNED[adapter]] for epoch in self.epochs[stage]]
        return min(range(len(losses)), key=lambda epoch: (math.isnan(losses[epoch]), losses[epoch]))

    def keep_epoch(self, stage: str, adapter: str) -> dict[str, float]:
        """Notes and says which epoch of a reference is kept; returns its held-out losses."""
        epochs, best, key = self.epochs[stage], self.best_epoch(stage, adapter), LEARNED[adapter]
        self.stages[stage]["kept_epoch"] = best + 1
        told = ", ".join(f"{losses[key]:.3f}" for losses in epochs)
        say(
            f"{stage_name(self, stage)}: epoch {best + 1} of {len(epochs)} is kept; {LOSSES[key]} on held-out rows"
            f" behind each: {told}"
        )
        return dict(epochs[best])

    def judge_reference(self, stage: str, adapter: str) -> None:
        """Says loudly where a reference likes held-out rows of its kind no better than the base does.

        Args:
            stage: whose held-out losses were just taken.
            adapter: ``utility`` or ``degraded``.
        """
        key = LEARNED[adapter]
        base, now = (self.held_out[name].get(key) for name in ("base", stage))
        self.weak.pop(stage, None)
        if base is None or now is None or now < base:
            return
        fewer = "" if stage in self.epochs else " for fewer epochs (loop.reference_epochs, or loop.keep_epoch: best),"
        self.weak[stage] = (
            f"the {stage_name(self, stage)} has learned nothing that carries over: its {LOSSES[key]} on held-out rows"
            f" is {now:.3f}, that of the base {base:.3f}. Scores made with it say little: train it{fewer} at a lower"
            " model.optim.lr, or on more rows"
        )
        say(f"WARNING: {self.weak[stage]}")

    def say_weak(self) -> None:
        """Says again which references have learned nothing, at the end of all that is printed."""
        for reason in self.weak.values():
            say(f"WARNING: {reason}")

    def say_stopped(self) -> None:
        """Says loudly which stages were ended early."""
        for reason in self.stopped.values():
            say(f"WARNING: {reason}")

    def say_round(self, round: int) -> None:
        """Says what a round brought, in one line."""
        facts = self.of_round(round)
        parts = []
        if "promoted" in facts:
            labels = ", ".join(f"{count} {label}" for label, count in facts["promoted_per_label"].items())
            parts.append(f"{facts['promoted']} rows promoted" + (f" ({labels})" if labels else ""))
        if facts.get("harmful_loss") is not None:
            parts.append(f"held-out harmful loss of the degraded reference {facts['harmful_loss']:.3f}")
        if facts.get("threshold") is not None:
            parts.append(f"threshold {facts['threshold']:.3f}")
        if "jaccard" in facts:
            parts.append(f"mask shares {facts['jaccard']:.0%} with the round before (Jaccard)")
        say(f"round {round}: {'; '.join(parts)}")

    def finish(self, trainer: Trainer, run_dir: Path) -> None:
        """Writes summary.json and prints the closing table."""
        module: Any = trainer.lightning_module
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        write_json(
            run_dir / "summary.json",
            {
                "base": module.base.path,
                "base_path": module.bank.base_path,
                "quantization": module.base.quantization,
                "seed": global_seed(),
                "world_size": trainer.world_size,
                "threads": torch.get_num_threads(),
                "device": device_name(module.device),
                "data": [rows.counts() for rows in datamodule.sets.values()],
                **self.state(),
                "optimizer_steps": trainer.global_step,
                "seconds": sum(stage["seconds"] for stage in self.stages.values()),
                "peak_memory_mib": _peak_memory(),
                "peak_gpu_memory_mib": peak_gpu_memory(module.device),
                "versions": versions(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
        )
        console = Console(markup=False)  # paths and names may hold brackets
        console.print(losses_table(self))
        self.say_stopped()
        self.say_weak()
        for line in (plain_words(self), f"Adapters, scores and summary.json are in {run_dir}"):
            if line:
                console.print(line, soft_wrap=True)
        console.print(f"A page to look at: toss report {run_dir}", soft_wrap=True)


def _peak_memory() -> int:
    """MiB; macOS counts bytes, others KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def read_facts(file: Path) -> dict[str, Any]:
    """What a JSON file says that a run wrote, as summary.json; nothing where there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: damaged ({error}): run the step that wrote it again") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file}: not what a run writes: run the step that wrote it again")
    return content


def method_of(run_dir: Path, selection: Path) -> str:
    """What people call the method of a run: by its summary, or before there is one by what it selected with.

    Args:
        run_dir: the run's.
        selection: the directory of the selection that its target is trained with; there need be none.

    Raises:
        StoreError: what says so is damaged.
    """
    facts = read_facts(run_dir / "summary.json") or read_facts(selection / REPORT_FILE)
    return str(facts.get("method") or PLAIN)


def stage_name(summary: Summary, stage: str) -> str:
    """What people call what a stage trained."""
    if stage.startswith("degraded-"):
        return f"{NAMES['degraded']}, round {stage.removeprefix('degraded-')}"
    return summary.method if stage == "target" else NAMES.get(stage, stage)


def losses_table(summary: Summary) -> Table:
    """Mean token loss of each held-out set after each stage."""
    (_, *header), lines = held_out_cells(summary, list(summary.held_out))
    table = Table(title="Mean token loss on held-out rows after each stage", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in header:
        table.add_column(column.replace(" (", "\n("), justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def held_out_cells(summary: Summary, stages: Sequence[str]) -> Cells:
    """The same as cells, for those of the stages that there are."""
    present = [stage for stage in stages if stage in summary.held_out]
    names = [name for name in LOSSES if any(name in summary.held_out[stage] for stage in present)]
    header = ["", *(f"{LOSSES[name]} ({HINTS[name]})" for name in names)]
    return header, [
        [stage_name(summary, stage), *(_cell(summary.held_out[stage], name) for name in names)] for stage in present
    ]


def _cell(losses: dict[str, float], name: str) -> str:
    """A loss, or a dash where a resumed run no longer had its held-out set."""
    return f"{losses[name]:.3f}" if name in losses else "–"


def selected_words(report: Mapping[str, Any]) -> str:
    """What a selection did, by its own report; nothing where that does not count tokens."""
    if not report.get("tokens") or "masked" not in report:
        return ""
    if report.get("weighed_in_training") and not report["masked"]:
        return f"{report['tokens']:,} response tokens, which are weighed anew in each step"
    share = report["masked"] / report["tokens"]
    said = f"{report['masked']:,} of {report['tokens']:,} response tokens masked ({share:.1%})"
    if "end_tokens_protected" in report:
        said += f"; {report['end_tokens_protected']} end-of-turn tokens kept that would have been among them"
    if report.get("anchored"):
        said += f"; {report['anchored']:,} held to the base"
    for rows, what in (("rows_left_out", "left out"), ("rows_fully_masked", "masked in full")):
        if rows in report:
            return f"{said}; {report[rows]} of {report['rows']} rows are {what}"
    return said


def plain_words(summary: Summary) -> str:
    """What the run showed, in words that need no paper."""
    sentences = []
    harmful = (summary.selection.get("masked_share_per_label") or {}).get("harmful")
    if harmful and summary.selection.get("masked") and summary.selection.get("tokens"):
        chance = harmful["tokens"] / summary.selection["tokens"]
        sentences.append(
            f"{harmful['share_of_masked_tokens']:.0%} of the {summary.selection['masked']:,} masked tokens lay in"
            f" contaminated rows (a blind choice would have hit {chance:.0%})."
        )
    base, sft, target = (summary.held_out.get(name, {}) for name in ("base", "sft", "target"))
    method = stage_name(summary, "target")
    if {"task_loss", "harmful_loss"} <= base.keys() & sft.keys() & target.keys():
        sentences.append(
            f"Plain SFT took the task loss from {base['task_loss']:.2f} to {sft['task_loss']:.2f} and the loss of"
            f" harmful replies from {base['harmful_loss']:.2f} to {sft['harmful_loss']:.2f}; {method} took them to"
            f" {target['task_loss']:.2f} and {target['harmful_loss']:.2f}"
            " (a higher loss of harmful replies means that the model is less ready to give them)."
        )
    return " ".join(sentences)
