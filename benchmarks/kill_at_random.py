"""Kill -9 at random moments of a TOSS-Pro run, resume, and compare bytes with a run that was left alone.

    python benchmarks/kill_at_random.py [--kills 100] [--seed 1]

A tiny model, two rounds. Moments are drawn over all kinds of work: training, scoring, ranking, promotion, writing of
checkpoints and adapters; a quarter of the runs is killed a second time after being resumed. What must come out the
same, byte for byte: every adapter, the score store, the promoted rows, the selection. Writes
benchmarks/results/kill_at_random.md and ends with exit code 1 when anything differs.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the tiny model and the killing are the tests' own
from torture import ELSEWHERE, KINDS, Torture  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "kill_at_random.md"


def report(hits: Counter[str], differing: Counter[str], runs: int, seconds: float, seed: int) -> str:
    """The results as Markdown."""
    lines = [
        "# Killed at random moments",
        "",
        f"Written by `python benchmarks/kill_at_random.py --kills {hits.total()} --seed {seed}`: {hits.total()} times",
        f"SIGKILL in {runs} runs of a tiny TOSS-Pro (2 rounds, one process), each then resumed to its end and compared",
        f"byte for byte with an undisturbed one: adapters, scores, promoted rows, selection. {seconds / 60:.0f} min.",
        "",
        "| killed while | kills | runs that ended differently |",
        "|---|---|---|",
        *(f"| {kind} | {hits[kind]} | {differing[kind]} |" for kind in (*KINDS, ELSEWHERE)),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Kills, compares, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hits: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    runs, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        for outcome in Torture(Path(work) / "work", arguments.seed).until(each=2, kills=arguments.kills):
            runs += 1
            hits.update(outcome["killed in"])
            if outcome["differences"]:
                differing.update(set(outcome["killed in"]))
            print(f"{hits.total()} kills", outcome, flush=True)
    RESULTS.write_text(report(hits, differing, runs, time.monotonic() - started, arguments.seed), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
