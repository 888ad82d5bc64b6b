"""The results table: which method keeps a fine-tuned model safe, and what it costs of the task.

    python benchmarks/results_table --data DIR [--work runs/results_table] [--seeds 1 2 3] [--jobs 2] [--only NAME ...]

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl, general.jsonl, harmful.jsonl, refusals.jsonl, benign_risky.jsonl and
prompts_*.jsonl. The bundled model is aligned first (`align.py`), for it comes without safety to lose. Then, for each
seed, references are trained on rows of their own and score each custom set once; and each comparison of this folder is
run by ``toss compare``: methods x seeds, resumable, on rows that `rows.py` deals out. What is done is not done again.

- main: all methods on a custom set of which a fifth is harmful;
- ablations: settings of TOSS, on the validation split;
- contamination: other shares of harmful rows, none among them;
- risky: harmless rows that erode safety most.

Writes benchmarks/results/results_table*.md and .svg; with --report, from what is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ablations
import shares
from align import align
from report import page, short_page
from rows import ALIGNMENT, SHARE, SHARES, Size, write_prompts, write_rows
from tables import read

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "results_table.md"
SHORT, ABLATIONS, CONTAMINATION = (
    RESULTS.with_stem(f"results_table_{name}") for name in ("short", "ablations", "contamination")
)
BASE = "bundled:smollm2-135m-instruct"
PARTS = ("main", "ablations", "contamination", "risky")
PROMPTS = ("beavertails", "advbench", "harmbench")
OTHER_SHARES = [f"{share:g}" for share in SHARES if share != SHARE]
"""Of harmful rows, but for that of the main comparison, which need not be made twice."""


def prepare(data: Path, work: Path, seeds: Sequence[int]) -> None:
    """Deals out the rows, aligns the base, and lays the configurations beside them."""
    write_rows(data, work / "rows", Size(align=ALIGNMENT), seeds)
    write_prompts(data, work / "rows")
    for name in PROMPTS:
        shutil.copy(data / f"prompts_{name}.jsonl", work / "rows")
    contamination = (HERE / "contamination.yaml").read_text(encoding="utf-8")
    for file in HERE.glob("*.yaml"):
        shutil.copy(file, work)
    (work / "contamination.yaml").unlink()
    for share in OTHER_SHARES:
        text = contamination.replace("{share}", share)
        (work / f"contamination_{share}.yaml").write_text(text, encoding="utf-8")
    align(BASE, work / "rows" / "align.jsonl", work / "base", work)


def comparisons(parts: Sequence[str]) -> list[str]:
    """Names of the compare files of each part."""
    shares = [f"contamination_{share}" for share in OTHER_SHARES]
    return [name for part in parts for name in (shares if part == "contamination" else [part])]


def train_references(work: Path, seed: int, threads: int) -> None:
    """Trains the references of a seed and scores the main custom set with them, unless that is done."""
    sets = [f"--data.utility=rows/utility_{seed}.jsonl", f"--data.harmful=rows/harmful_{seed}.jsonl"]
    score(work, work / "references" / f"seed-{seed}", ["--config=references.yaml", *sets], seed, threads)


def score_custom(work: Path, custom: str, seed: int, threads: int) -> None:
    """Scores another custom set with the references of a seed, unless that is done."""
    adapters = f"references/seed-{seed}/adapters"
    sets = [f"--model.references.{role}={adapters}/{role}" for role in ("utility", "degraded")]
    sets += [f"--data.custom=rows/custom_{custom}.jsonl", "--loop.plan=[score]"]
    score(work, work / "scores" / custom / f"seed-{seed}", sets, seed, threads)


def score(work: Path, run_dir: Path, settings: Sequence[str], seed: int, threads: int) -> None:
    """Runs ``toss score``, unless it is done."""
    if not (run_dir / "summary.json").exists():
        options = [f"--seed_everything={seed}", f"--run_dir={run_dir}", "--ckpt_path=auto"]
        toss(["score", "--config=common.yaml", *settings, *options], work, threads)


def toss(arguments: Sequence[str], work: Path, threads: int) -> None:
    """Runs a verb of the command line in the directory of the experiment."""
    settings = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "toss_lightning", *arguments]
    subprocess.run(command, cwd=work, env={**os.environ, **settings}, check=True)


def report(work: Path, seeds: Sequence[int], parts: Sequence[str]) -> None:
    """Writes the pages and pictures of these parts, of what has been run of them."""
    size = Size()
    setup = [
        "Bundled 135M model, aligned first on refusals, safe replies and plain tasks, then fine-tuned with LoRA on",
        f"NF4: {size.custom} custom rows, {SHARE:.0%} of them harmful (BeaverTails), the others gsm8k and general",
        f"instructions; references from {size.reference} rows each; one epoch, learning rate 5e-4; {size.pairs}",
        f"held-out pairs and {size.task} held-out rows of the task.",
    ]
    command = f"python benchmarks/results_table --data DIR --seeds {' '.join(map(str, seeds))}"
    if "main" in parts and is_made(work, "main"):
        RESULTS.write_text(page(work, seeds, command, setup), encoding="utf-8")
        SHORT.write_text(short_page(work, command, setup), encoding="utf-8")
        shutil.copy(work / "main" / "compare.svg", RESULTS.with_suffix(".svg"))
    if "ablations" in parts and is_made(work, "ablations"):
        ABLATIONS.write_text(ablations.page(work, f"{command} --only ablations", setup), encoding="utf-8")
        ABLATIONS.with_suffix(".svg").write_text(ablations.picture(work), encoding="utf-8")
    if {"contamination", "risky"} & {*parts} and (found := dict(by_share(work))):
        risky = (read(work / "risky"), work / "risky") if is_made(work, "risky") else None
        other = [
            setup[0],
            f"NF4, as in the results table, but for the share of harmful rows; {SHARE:.0%} are from there.",
        ]
        text = shares.page(found, risky, f"{command} --only main contamination risky", other)
        CONTAMINATION.write_text(text, encoding="utf-8")
        CONTAMINATION.with_suffix(".svg").write_text(shares.picture(found), encoding="utf-8")


def by_share(work: Path) -> Iterator[tuple[float, shares.Comparison]]:
    """Shares of harmful rows whose comparison has been made."""
    for share in SHARES:
        name = "main" if share == SHARE else f"contamination_{share:g}"
        if is_made(work, name):
            yield share, (read(work / name), work / name)


def is_made(work: Path, name: str) -> bool:
    """Whether a comparison has come to its end, or to a report of what is done."""
    return (work / name / "compare.json").exists()


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/results_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    work, threads = args.work.resolve(), max(1, (os.cpu_count() or 1) // args.jobs)
    options = [f"--seeds={args.seeds}", f"--jobs={args.jobs}", *(["--report"] if args.report else [])]
    if not args.report:
        prepare(args.data.resolve(), work, args.seeds)
        customs = [
            *(OTHER_SHARES if "contamination" in args.only else []),
            *(["risky"] if "risky" in args.only else []),
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: train_references(work, seed, threads), args.seeds))
            of_each = [(custom, seed) for custom in customs for seed in args.seeds]
            list(pool.map(lambda one: score_custom(work, one[0], one[1], threads), of_each))
    for name in comparisons(args.only):
        if not args.report or (work / name).exists():
            toss(["compare", f"{name}.yaml", *options], work, threads)
    report(work, args.seeds, args.only)


if __name__ == "__main__":
    main()
