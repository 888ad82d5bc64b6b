"""Kill -9 one of two processes at random moments of a TOSS-Pro run, resume, and compare bytes with an undisturbed run.

    python benchmarks/kill_a_rank.py [--kills 20] [--seed 1]

A tiny model, two rounds, two processes (ddp, gloo). The process, the kind of work that it is killed in and the moment
in that work are drawn: training, scoring, ranking, promotion, writing of checkpoints and adapters, or any time between
the start and the end of a run. The other process has to notice that its partner is gone; one that still runs after
--patience seconds is killed as well. Both then go on from the newest checkpoint. What must come out the same, byte for
byte: every adapter, the score store, the promoted rows, the selection. Writes benchmarks/results/kill_a_rank.md and
ends with exit code 1 when anything differs.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the tiny model and the watching are the tests' own
from runs import tiny_fit  # noqa: E402
from tiny import write_sets  # noqa: E402
from torture import ELSEWHERE, KINDS, Watch, differences, in_child, model_of_a_child  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "kill_a_rank.md"
RANKS = 2
SOON = 0.01
"""Seconds within which a process is killed that was seen to enter a kind of work."""
DONE, NOTICED, WAITING = "had finished", "noticed", "waited in vain"


class Pair:
    """One tiny run on two processes.

    Args:
        work: a directory for everything.
        patience: seconds that a process whose partner was killed is given to notice.
    """

    def __init__(self, work: Path, patience: float) -> None:
        self.work, self.patience = work, patience
        self.model = model_of_a_child(work)
        self.sets = write_sets(work)
        self.doing = [mmap.mmap(-1, 1) for _ in range(RANKS)]
        started = time.monotonic()
        self.finish(work / "undisturbed")
        self.seconds = time.monotonic() - started

    def start(self, run_dir: Path) -> list[int]:
        """Forks both processes, which start the run or resume it; returns their process ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def run(rank: int) -> None:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
            os.environ.update({name: str(value) for name, value in place.items()})
            self.doing[rank][0] = 0
            Watch(self.doing[rank])
            tiny_fit(
                self.model,
                self.sets,
                run_dir,
                ckpt_path="auto",
                loop={"rounds": 2, "promote": 2},
                data={"score_every": 2, "max_tokens": 30},
                checkpoint_every=3,
                devices=RANKS,
                strategy="ddp",
            )

        return [in_child(lambda rank=rank: run(rank), self._log(run_dir, rank)) for rank in range(RANKS)]

    def finish(self, run_dir: Path) -> None:
        """Lets a run come to its end."""
        for rank, child in enumerate(self.start(run_dir)):
            if os.waitpid(child, 0)[1]:
                raise RuntimeError(self._log(run_dir, rank).read_text(encoding="utf-8")[-3000:])

    def kill(self, run_dir: Path, rank: int, kind: str, draw: random.Random) -> tuple[str, str, float] | None:
        """Starts a run and kills one of its processes in some kind of work.

        Returns:
            What the process was doing, what became of the other, and the seconds that took; None when the process came
            to its end before.
        """
        children = self.start(run_dir)
        if kind == ELSEWHERE:
            time.sleep(draw.random() * self.seconds)
        else:
            self._wait_for(rank, 1 + list(KINDS).index(kind), draw.randrange(1, 4))
            time.sleep(draw.random() * SOON)
        doing = [ELSEWHERE, *KINDS][self.doing[rank][0]]
        os.kill(children[rank], signal.SIGKILL)
        killed = time.monotonic()
        other = children[1 - rank]
        while not (ended := os.waitpid(other, os.WNOHANG))[0] and time.monotonic() < killed + self.patience:
            time.sleep(0.01)
        seconds = time.monotonic() - killed
        if not ended[0]:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
        if not os.WIFSIGNALED(os.waitpid(children[rank], 0)[1]):
            return None
        return doing, WAITING if not ended[0] else NOTICED if ended[1] else DONE, seconds

    def _wait_for(self, rank: int, kind: int, time_of_it: int) -> None:
        """Waits until a process enters a kind of work for the n-th time, or seems to do so no more."""
        before, entered, end = 0, 0, time.monotonic() + 2 * self.seconds
        while entered < time_of_it and time.monotonic() < end:
            now = self.doing[rank][0]
            entered += now == kind != before
            before = now
            time.sleep(1e-4)

    def _log(self, run_dir: Path, rank: int) -> Path:
        return self.work / f"{run_dir.name}-{rank}.log"


def report(outcomes: Sequence[tuple[str, int, str, float, bool]], arguments: argparse.Namespace, minutes: float) -> str:
    """The results as Markdown."""
    first = sum(rank == 0 for _, rank, *_ in outcomes)
    others = Counter(other for _, _, other, *_ in outcomes)
    noticing = sorted(seconds for *_, other, seconds, _ in outcomes if other == NOTICED)
    slowest = f" within {noticing[-1]:.1f} s" if noticing else ""
    text = f"""
        Written by `python benchmarks/kill_a_rank.py --kills {len(outcomes)} --seed {arguments.seed}`: a tiny TOSS-Pro
        run (2 rounds) on 2 processes (ddp, gloo), of which the first was killed {first} times and the second
        {len(outcomes) - first} times (SIGKILL). What became of the other one: ended by itself{slowest}
        {others[NOTICED]}, had finished {others[DONE]}, still ran after {arguments.patience:.0f} s and was killed too
        {others[WAITING]}. Each run was resumed on 2 processes and compared byte for byte with an undisturbed one:
        adapters, scores, promoted rows, selection. {minutes:.0f} min.
    """
    lines = [
        "# One process of two killed at random moments",
        "",
        *textwrap.wrap(" ".join(text.split()), 110),
        "",
        "| killed while | kills | the other one noticed | runs that ended differently |",
        "|---|---|---|---|",
    ]
    for kind in (*KINDS, ELSEWHERE):
        mine = [outcome for outcome in outcomes if outcome[0] == kind]
        noticed, differing = sum(other == NOTICED for _, _, other, *_ in mine), sum(differs for *_, differs in mine)
        lines.append(f"| {kind} | {len(mine)} | {noticed} | {differing} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Kills, compares, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, started = random.Random(arguments.seed), time.monotonic()
    outcomes: list[tuple[str, int, str, float, bool]] = []
    with tempfile.TemporaryDirectory() as work:
        pair = Pair(Path(work), arguments.patience)
        print(f"undisturbed: {pair.seconds:.1f} s", flush=True)
        run_dir = Path(work) / "killed"
        while len(outcomes) < arguments.kills:
            shutil.rmtree(run_dir, ignore_errors=True)
            rank = draw.randrange(RANKS)
            if (hit := pair.kill(run_dir, rank, draw.choice([*KINDS, ELSEWHERE]), draw)) is None:
                continue
            pair.finish(run_dir)
            differing = differences(run_dir, pair.work / "undisturbed")
            doing, other, seconds = hit
            outcomes.append((doing, rank, other, seconds, bool(differing)))
            print(len(outcomes), f"process {rank}, {doing}; the other {other} ({seconds:.1f} s)", differing, flush=True)
    minutes = (time.monotonic() - started) / 60
    RESULTS.write_text(report(outcomes, arguments, minutes), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))
    return 1 if any(differs for *_, differs in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
