"""The results table: which method keeps a fine-tuned model safe, and what it costs of the task.

    python benchmarks/results_table --data DIR [--work runs/results_table] [--seeds 1 2 3] [--jobs 2] [--only NAME ...]

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl, general.jsonl, harmful.jsonl, refusals.jsonl, benign_risky.jsonl and
prompts_*.jsonl. The bundled model is aligned first (`align.py`), for it comes without safety to lose. Then, for each
seed, references are trained on rows of their own and the custom set is scored once; and each comparison of this
folder is run by ``toss compare``: methods x seeds, resumable, on rows that `rows.py` deals out. What is done is not
done again. Writes benchmarks/results/results_table.md and .svg; with --report, from what is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from align import align
from report import page, short_page
from rows import ALIGNMENT, SHARE, Size, write_prompts, write_rows

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "results_table.md"
SHORT = RESULTS.with_stem("results_table_short")
BASE = "bundled:smollm2-135m-instruct"
COMPARISONS = ("main",)
PROMPTS = ("beavertails", "advbench", "harmbench")


def prepare(data: Path, work: Path, seeds: Sequence[int]) -> None:
    """Deals out the rows, aligns the base, and lays the configurations beside them."""
    write_rows(data, work / "rows", Size(align=ALIGNMENT), seeds)
    write_prompts(data, work / "rows")
    for name in PROMPTS:
        shutil.copy(data / f"prompts_{name}.jsonl", work / "rows")
    for file in HERE.glob("*.yaml"):
        shutil.copy(file, work)
    align(BASE, work / "rows" / "align.jsonl", work / "base", work)


def score(work: Path, seed: int, threads: int) -> None:
    """Trains the references of a seed and scores the custom set with them, unless that is done."""
    run_dir = work / "references" / f"seed-{seed}"
    if (run_dir / "summary.json").exists():
        return
    sets = [f"--data.utility=rows/utility_{seed}.jsonl", f"--data.harmful=rows/harmful_{seed}.jsonl"]
    options = [f"--seed_everything={seed}", f"--run_dir={run_dir}", "--ckpt_path=auto"]
    toss(["score", "--config=common.yaml", "--config=references.yaml", *sets, *options], work, threads)


def toss(arguments: Sequence[str], work: Path, threads: int) -> None:
    """Runs a verb of the command line in the directory of the experiment."""
    settings = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "toss_lightning", *arguments]
    subprocess.run(command, cwd=work, env={**os.environ, **settings}, check=True)


def report(work: Path, seeds: Sequence[int]) -> None:
    """Writes the page and its picture."""
    size = Size()
    setup = [
        "Bundled 135M model, aligned first on refusals, safe replies and plain tasks, then fine-tuned with LoRA on",
        f"NF4: {size.custom} custom rows, {SHARE:.0%} of them harmful (BeaverTails), the others gsm8k and general",
        f"instructions; references from {size.reference} rows each; one epoch, learning rate 5e-4; {size.pairs}",
        f"held-out pairs and {size.task} held-out rows of the task.",
    ]
    command = f"python benchmarks/results_table --data DIR --seeds {' '.join(map(str, seeds))}"
    RESULTS.write_text(page(work, seeds, command, setup), encoding="utf-8")
    SHORT.write_text(short_page(work, command, setup), encoding="utf-8")
    shutil.copy(work / "main" / "compare.svg", RESULTS.with_suffix(".svg"))
    print(RESULTS.read_text(encoding="utf-8"))


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/results_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="+", default=COMPARISONS, choices=COMPARISONS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    work, threads = args.work.resolve(), max(1, (os.cpu_count() or 1) // args.jobs)
    options = [f"--seeds={args.seeds}", f"--jobs={args.jobs}", *(["--report"] if args.report else [])]
    if not args.report:
        prepare(args.data.resolve(), work, args.seeds)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: score(work, seed, threads), args.seeds))
    for name in args.only:
        toss(["compare", f"{name}.yaml", *options], work, threads)
    report(work, args.seeds)


if __name__ == "__main__":
    main()
