"""TOSS on real rows: does the token score find the harmful ones, and what does masking them change?

    python benchmarks/real_toss.py --data DIR [--seeds 1 2 3] [--work runs/real_toss]

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl, general.jsonl and harmful.jsonl (docs/results.md says what they are). The
bundled model in NF4; plain SFT and TOSS train on the same rows in the same order. Finished seeds are kept in --work and
an interrupted one is resumed. Writes benchmarks/results/real_toss.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sklearn.metrics import roc_auc_score
from statistics_of_runs import spread

from toss_lightning.data import Source
from toss_lightning.data.batching import collate, plan_pass
from toss_lightning.data.datamodule import HELD_OUT
from toss_lightning.data.rowset import load_rows
from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.models import AdapterBank, Base, Lora
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.base import load_base, load_tokenizer, resolve
from toss_lightning.models.losses import OutputHead, response_hidden, token_losses
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

RESULTS = Path(__file__).parent / "results" / "real_toss.md"
HELD_OUT_HARMFUL = {"skip": 240, "rows": 60}
LOSSES = {"task_loss": "task loss ↓", "harmful_loss": "harmful loss ↑", "refusal_loss": "refusal loss ↓"}


def config(data: Path, refusals: Path) -> dict[str, Any]:
    """The experiment. No row stands in two sets."""

    def rows(file: str, skip: int, count: int) -> dict[str, Any]:
        return {"path": str(data / f"{file}.jsonl"), "skip": skip, "rows": count}

    return {
        "data": {
            "custom": [rows("gsm8k_train", 0, 240), rows("general", 0, 80), rows("harmful", 0, 80)],
            "utility": [rows("gsm8k_train", 240, 120), rows("general", 80, 40)],
            "harmful": rows("harmful", 80, 160),
            "utility_val": rows("gsm8k_test", 0, 60),
            "harmful_val": {"path": str(data / "harmful.jsonl"), **HELD_OUT_HARMFUL},
            "refusal_val": str(refusals),
            "max_length": 512,
            "batch_size": 8,
            "max_tokens": 1024,
        },
        "model": {
            "base": {"path": "bundled:smollm2-135m-instruct", "quantization": "nf4"},
            "lora": {"r": 16, "alpha": 16, "targets": "all-linear"},
            "optim": {"lr": 5e-4},
            "schedule": {"shape": "constant", "warmup": 0.1},
        },
        "loop": {
            "plan": ["utility", "degraded", "score", "select", "sft", "target"],
            "reference_epochs": 2,
            "epochs": 1,
            "selection": {"class_path": "GlobalTopFraction", "init_args": {"discard": 0.1}},
        },
        "checkpoint_every": 20,
        "trainer": {"accelerator": "cpu", "gradient_clip_val": 1.0, "check_val_every_n_epoch": 1000},
    }


def write_refusals(data: Path, path: Path) -> None:
    """The refusals that the data gives for the held-out harmful requests."""
    skip, count = HELD_OUT_HARMFUL["skip"], HELD_OUT_HARMFUL["rows"]
    lines = (data / "harmful.jsonl").read_text(encoding="utf-8").splitlines()[skip : skip + count]
    rows = [json.loads(line) for line in lines]
    content = [
        {"messages": [*row["messages"][:-1], {"role": "assistant", "content": row["safe_reply"]}]} for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def run(seed: int, data: Path, work: Path) -> Path:
    """Trains one seed, unless that is done; returns its run directory."""
    run_dir = work / f"seed-{seed}"
    if (run_dir / "summary.json").exists():
        return run_dir
    work.mkdir(parents=True, exist_ok=True)
    write_refusals(data, work / "refusals.jsonl")
    file = work / "config.yaml"
    file.write_text(yaml.safe_dump(config(data, work / "refusals.jsonl")), encoding="utf-8")
    command = [sys.executable, "-m", "toss_lightning", "fit", f"--config={file}", f"--run_dir={run_dir}"]
    if any((run_dir / "checkpoints").glob("*.ckpt")):
        command.append("--ckpt_path=last")
    subprocess.run([*command, f"--seed_everything={seed}"], check=True)
    return run_dir


def measure(scores: TokenScores, weights: dict[int, np.ndarray], draws: int = 2000) -> dict[str, Any]:
    """What scores and token weights say about the labels, with intervals over the custom rows."""
    score = scores.score()
    harmful = np.array([label == "harmful" for label in scores.values("label")])
    per_row = scores.per_row(score)
    means, lengths = np.array([row.mean() for row in per_row]), np.array([len(row) for row in per_row])
    masked = np.array([(weights[row_id] == 0).sum() for row_id in scores.row_ids.tolist()])
    generator = np.random.default_rng(0)
    auroc, share = [], []
    for _ in range(draws):
        drawn = generator.integers(0, len(harmful), len(harmful))
        auroc.append(roc_auc_score(harmful[drawn], means[drawn]))
        share.append(masked[drawn][harmful[drawn]].sum() / masked[drawn].sum())
    return {
        "row_auroc": roc_auc_score(harmful, means),
        "row_auroc_interval": np.percentile(auroc, [2.5, 97.5]),
        "token_auroc": roc_auc_score(np.repeat(harmful, lengths), score),
        "share": masked[harmful].sum() / masked.sum(),
        "share_interval": np.percentile(share, [2.5, 97.5]),
        "chance": lengths[harmful].sum() / lengths.sum(),
        "masked": int(masked.sum()),
        "tokens": int(lengths.sum()),
    }


@torch.no_grad()
def row_losses(run_dir: Path, adapters: Mapping[str, Path]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Sums and counts of the token losses of every held-out row: ``[adapter][loss]``; ``base`` is none.

    Args:
        run_dir: whose configuration names base and held-out rows.
        adapters: name -> directory.
    """
    settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    data, module = settings["data"]["init_args"], settings["model"]["init_args"]
    base = Base(**module["base"])
    bank = AdapterBank(load_base(base, torch.device("cpu")), Lora(**module["lora"]), resolve(base), tuple(adapters))
    for name, path in adapters.items():
        bank.load(name, str(path))
    head, chat = OutputHead.of(bank.model), ChatTokenizer(load_tokenizer(base))
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in ("base", *adapters)}
    for name, loss in HELD_OUT.items():
        spec = data[name] if isinstance(data[name], str) else Source(**data[name].get("init_args", data[name]))
        rows = load_rows(name, spec, chat, data["max_length"]).rows
        groups = plan_pass([len(row.input_ids) for row in rows], data["max_tokens"])[0]
        counts = np.array([len(row.response_positions) for row in rows])
        for stage in found:
            sums = np.zeros(len(rows))
            # the slot is still at its start, where it does nothing
            with bank.using(SLOT if stage == "base" else stage):
                for group in groups:
                    batch = collate([rows[index] for index in group])
                    hidden = response_hidden(bank.model, batch["input_ids"], batch["row"], batch["position"])
                    losses = token_losses(hidden, batch["input_ids"][batch["row"], batch["position"]], head)
                    sums[list(group)] = np.bincount(batch["row"].numpy(), losses.double().numpy(), len(group))
            found[stage][loss] = (sums, counts)
    return found


def paired_interval(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """95 % interval of the difference of two mean token losses on the same rows: bootstrap over rows."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(ours[0]), (2000, len(ours[0])))
    return np.percentile(((ours[0] - theirs[0])[drawn].sum(1)) / ours[1][drawn].sum(1), [2.5, 97.5])


def report(runs: list[Path], seeds: list[int], note: str) -> str:
    """The results as Markdown."""
    summaries = [json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in runs]
    held_out = [summary["held_out"] for summary in summaries]
    measured = [measure(TokenScores(path / "scores"), TokenWeights.load(path / "selection").weights) for path in runs]
    counts = {row["set"]: row for row in summaries[0]["data"]}
    dropped = ", ".join(f"{name} {row['dropped']}" for name, row in counts.items())
    lines = [
        "# TOSS on real rows, 135M parameters, NF4, CPU",
        "",
        f"Written by `python benchmarks/real_toss.py --data DIR --seeds {' '.join(map(str, seeds))}`.",
        "Custom set: 240 gsm8k, 80 general and 80 harmful rows; utility reference: 120 other gsm8k and 40 other",
        "general rows; harmful reference: 160 other harmful rows; 2 reference epochs, 1 target epoch, discard 0.1,",
        "LoRA r 16 on all linear layers, learning rate 5e-4, batch 8. These settings were fixed before the first run.",
        "",
        f"{counts['custom']['response_tokens']:,} response tokens are scored; rows dropped: {dropped}.",
        "",
        "## Does the score find the harmful rows?",
        "",
        "95 % intervals in brackets: bootstrap over the custom rows, 2,000 draws.",
        "",
        "| seed | AUROC of row means | AUROC of tokens | masked tokens in harmful rows | chance |",
        "|---|---|---|---|---|",
    ]
    for seed, one in zip(seeds, measured, strict=True):
        low, high = one["row_auroc_interval"]
        share_low, share_high = one["share_interval"]
        lines.append(
            f"| {seed} | {one['row_auroc']:.3f} [{low:.3f}, {high:.3f}] | {one['token_auroc']:.3f} |"
            f" {one['share']:.1%} [{share_low:.1%}, {share_high:.1%}] of {one['masked']:,} | {one['chance']:.1%} |"
        )
    over_seeds = f"mean over {len(seeds)} seeds ± half of the 95 % t-interval"
    lines += [
        "",
        "Every token of a harmful row counts as harmful, its harmless words included, so the token AUROC of a perfect",
        "score of *harmful tokens* would be below 1.",
        "",
        "## What does masking change?",
        "",
        f"Mean token loss on held-out rows: {counts['utility_val']['rows']} of gsm8k_test,"
        f" {counts['harmful_val']['rows']} harmful replies, and refusals of the same requests;"
        f" {over_seeds if len(seeds) > 1 else 'one seed, so no interval over seeds'}.",
        "",
        f"| | {' | '.join(LOSSES.values())} |",
        "|---" * (len(LOSSES) + 1) + "|",
    ]
    for stage, name in (("base", "base"), ("sft", "plain SFT"), ("target", "TOSS")):
        cells = [spread([one[stage][loss] for one in held_out]) for loss in LOSSES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for seed, one, path in zip(seeds, held_out, runs, strict=True):
        rows = row_losses(path, {stage: path / "adapters" / stage for stage in ("sft", "target")})
        cells = []
        for loss in LOSSES:
            low, high = paired_interval(rows["target"][loss], rows["sft"][loss])
            cells.append(f"{one['target'][loss] - one['sft'][loss]:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| TOSS minus plain SFT, seed {seed} | {' | '.join(cells)} |")
    lines += [
        "",
        "In brackets: 95 % interval, paired bootstrap over the held-out rows, 2,000 draws.",
        "",
        "## Time",
        "",
        "| stage | seconds, mean over seeds | optimizer steps |",
        "|---|---|---|",
    ]
    for stage, first in summaries[0]["stages"].items():
        seconds = np.mean([summary["stages"][stage]["seconds"] for summary in summaries])
        lines.append(f"| {stage} | {seconds:.0f} | {first.get('steps', '')} |")
    memory = max(summary["peak_memory_mib"] for summary in summaries)
    versions = ", ".join(f"{name} {number}" for name, number in summaries[0]["versions"].items())
    lines += ["", *([note] if note else []), f"Peak memory {memory:,} MiB. {versions}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Runs the seeds that are missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=Path("runs/real_toss"))
    parser.add_argument("--note", default="", help="a sentence on the machine, for the section on time")
    arguments = parser.parse_args()
    runs = [run(seed, arguments.data.resolve(), arguments.work) for seed in arguments.seeds]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(runs, arguments.seeds, arguments.note), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
