"""What bfloat16 brings on a CPU that computes in it by itself (AMX or AVX512-BF16), and what it changes.

    python benchmarks/cpu_dtype.py [--base MODEL] [--seeds 1 2 3]

With each seed ``toss score`` trains references on the demo's rows and scores with them, in float32 and then in
bfloat16; both hold the base in NF4. Reported are the rates, how far the base's token losses lie apart, and which part
of the tokens that TOSS would mask are the same in both; what another seed changes of them gives the scale. Writes
benchmarks/results/cpu_dtype.md.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from toss_lightning.evaluation.statistics import t_interval
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction

RESULTS = Path(__file__).parent / "results" / "cpu_dtype.md"
DTYPES = ("float32", "bfloat16")
DISCARD = 0.1
FLAGS = ("amx_bf16", "avx512_bf16")
"""As Linux calls what a CPU computes bfloat16 with."""


def run(base: str, seed: int, dtype: str, run_dir: Path) -> Path:
    """Trains references for an epoch and scores with them; returns where."""
    options = [f"--model.base.path={base}", f"--model.base.dtype={dtype}", f"--seed_everything={seed}"]
    options += ["--loop.plan=[utility, degraded, score]", "--loop.reference_epochs=1", f"--run_dir={run_dir}"]
    # the selection that reads the base's losses too
    options += ["--loop.selection=DrSft"]
    subprocess.run([sys.executable, "-m", "toss_lightning", "score", "--config=demo", *options], check=True)
    return run_dir


def training_rate(run_dir: Path) -> float:
    """Tokens per second of the median step, prompts and padding included, and the optimizer's own time not."""
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return float(np.median([float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["loss"]]))


def scoring_rate(run_dir: Path) -> float:
    """Rows per second, of all three models."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return float(len(TokenScores(run_dir / "scores").row_ids) / summary["stages"]["score"]["seconds"])


def mask(run_dir: Path) -> np.ndarray:
    """Which tokens TOSS leaves out."""
    return np.asarray(GlobalTopFraction(DISCARD).select(TokenScores(run_dir / "scores")).flat() == 0)


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The part of the tokens left out by one that the other leaves out too; both leave out as many."""
    return float((one & other).sum() / one.sum())


def losses(run_dir: Path) -> np.ndarray:
    """Token losses of the base."""
    return np.asarray(TokenScores(run_dir / "scores").combine({"loss_base": 1.0}))


def report(runs: Mapping[tuple[int, str], Path], seeds: Sequence[int], base: str) -> str:
    """The page."""
    lines = []
    for title, rate, unit in (
        ("forward and backward passes", training_rate, "padded tokens"),
        ("scoring", scoring_rate, "rows"),
    ):
        rates = {dtype: [rate(runs[seed, dtype]) for seed in seeds] for dtype in DTYPES}
        ratio = t_interval([rates["bfloat16"][at] / rates["float32"][at] for at in range(len(seeds))])
        cells = [f"{np.mean(rates[dtype]):.1f}" for dtype in DTYPES]
        spread = f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if len(seeds) > 1 else f"{ratio.mean:.2f}"
        lines.append(f"| {title}, {unit} per second | {' | '.join(cells)} | {spread} |")
    masks = {key: mask(path) for key, path in runs.items()}
    of_dtypes = np.mean([shared(masks[seed, "float32"], masks[seed, "bfloat16"]) for seed in seeds])
    pairs = [*combinations(seeds, 2)]
    of_seeds = [shared(masks[one, "float32"], masks[other, "float32"]) for one, other in pairs]
    apart = losses(runs[seeds[0], "bfloat16"]) - losses(runs[seeds[0], "float32"])
    cpu = Path("/proc/cpuinfo")
    known = cpu.read_text(encoding="utf-8").split() if cpu.exists() else []
    has = " and ".join(flag for flag in FLAGS if flag in known) or f"neither {' nor '.join(FLAGS)}"
    count = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = f"{count} thread{'s' if count > 1 else ''}"
    given = " ".join(
        ["python benchmarks/cpu_dtype.py", f"--base {Path(base).name}", f"--seeds {' '.join(map(str, seeds))}"]
    )
    return "\n".join(
        [
            "# bfloat16 on a CPU",
            "",
            f"Written by `{given}`, on {threads} of a CPU with {has}.",
            "References of one epoch on the demo's rows, NF4, LoRA of rank 16.",
            "",
            "| | float32 | bfloat16 | ratio |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Token losses of the base differ by {np.abs(apart).mean():.4f} nats on average, and their mean by",
            f"{apart.mean():+.4f}, over {len(apart):,} tokens.",
            f"Of the {DISCARD:.0%} of tokens that TOSS masks, {of_dtypes:.0%} are the same in both, with the same seed"
            + (f"; {np.mean(of_seeds):.0%} are with another seed in float32." if pairs else "."),
            "",
        ]
    )


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        order = [(seed, dtype) for seed in args.seeds for dtype in DTYPES]
        runs = {(seed, dtype): run(args.base, seed, dtype, Path(folder) / f"{dtype}-{seed}") for seed, dtype in order}
        text = report(runs, args.seeds, args.base)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
