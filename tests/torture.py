"""Kills tiny TOSS-Pro runs with SIGKILL at drawn moments, resumes them, and compares what they leave behind.

    python tests/torture.py WORK --each 2      a line of JSON for each run; at least two kills in each kind of work

A moment is a place within one call of a function that stands for a kind of work: the run says when it enters the call,
and is killed a drawn part of the call's usual duration later, wherever it is by then, inside a system call too.
"""

import argparse
import faulthandler
import json
import mmap
import os
import random
import select
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from runs import artifacts, tiny_fit
from tiny import save_tiny_model, write_sets

from toss_lightning.data.scoring import Scoring
from toss_lightning.loops import TossProLoop, toss_pro
from toss_lightning.loops.checkpoints import PlanCheckpoint

KINDS: dict[str, list[tuple[Any, str]]] = {
    "training": [(_TrainingEpochLoop, "advance")],
    "scoring": [(Scoring, "_column")],
    "ranking": [(TossProLoop, "select"), (toss_pro, "compare_rounds")],
    "promotion": [(TossProLoop, "_promote")],
    "writing a checkpoint": [(PlanCheckpoint, "save")],
    "writing an adapter": [(TossProLoop, "end_stage")],
}
"""Kind of work -> the functions that do it."""
ELSEWHERE = "elsewhere"
PATIENCE = 240
"""Seconds after which a child that goes on is taken to hang, and says where; the longest takes a few."""


@dataclass
class Moment:
    """A call to be killed in, and how far into it."""

    kind: str
    call: int
    part: float


class Watch:
    """Follows a run from inside: which kind of work is going on, in memory that the killer shares."""

    def __init__(self, shared: mmap.mmap, wanted: Moment | None = None, pipe: int = -1) -> None:
        self.shared, self.wanted, self.pipe = shared, wanted, pipe
        self.kinds = list(KINDS)
        self.calls = dict.fromkeys(KINDS, 0)
        self.durations: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for kind, functions in KINDS.items():
            for owner, name in functions:
                setattr(owner, name, self._watched(kind, getattr(owner, name)))

    def _watched(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            outer, self.shared[0] = self.shared[0], self.kinds.index(kind) + 1
            call = self.calls[kind]
            self.calls[kind] += 1
            if self.wanted is not None and (self.wanted.kind, self.wanted.call) == (kind, call):
                os.write(self.pipe, b"!")
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self.durations[kind].append(time.monotonic() - started)
                self.shared[0] = outer

        return watched


def in_child(work: Callable[[], Any], log: Path) -> int:
    """Runs ``work`` in a forked process, which has everything imported already; returns its process id.

    Raises:
        RuntimeError: the forking process has other threads. A progress bar starts one, and makes a lock that all
            processes forked later share: one that is killed while it holds the lock leaves the next ones waiting.
    """
    if threading.active_count() > 1:
        raise RuntimeError(f"a process that forks may not have threads, or locks to share: {threading.enumerate()}")
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=2)
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def complete(work: Callable[[], Any], log: Path) -> None:
    """Runs ``work`` in a forked process to its end.

    Raises:
        RuntimeError: it failed, with the end of its log.
    """
    _check(os.waitpid(in_child(work, log), 0)[1], log)


def model_of_a_child(work: Path) -> str:
    """Writes a tiny model in a process of its own, since saving one shows a progress bar; returns its directory."""
    complete(lambda: save_tiny_model(work / "model"), work / "model.log")
    return str(work / "model")


class Torture:
    """One tiny run, undisturbed and killed.

    Args:
        work: a directory that does not exist yet.
        seed: fixes the moments.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        work.mkdir(parents=True)
        self.model = model_of_a_child(work)
        self.sets = write_sets(work)
        self.shared = mmap.mmap(-1, 1)
        self.durations = self._undisturbed()

    def _fit(self, run_dir: Path) -> None:
        tiny_fit(
            self.model,
            self.sets,
            run_dir,
            ckpt_path="auto",
            loop={"rounds": 2, "promote": 2},
            data={"score_every": 2},
            checkpoint_every=3,
        )

    def _undisturbed(self) -> dict[str, list[float]]:
        report, log = self.work / "durations.json", self.work / "undisturbed.log"

        def run() -> None:
            watch = Watch(self.shared)
            self._fit(self.work / "undisturbed")
            report.write_text(json.dumps(watch.durations))

        complete(run, log)
        durations: dict[str, list[float]] = json.loads(report.read_text())
        return durations

    def draw(self, kind: str) -> Moment:
        """A moment within work of this kind."""
        return Moment(kind, self.random.randrange(len(self.durations[kind])), self.random.random())

    def kill(self, run_dir: Path, moment: Moment) -> str | None:
        """Starts or resumes a run and kills it; returns what it was doing, or None if it came to its end."""
        reader, writer = os.pipe()
        self.shared[0], doing, log = 0, ELSEWHERE, run_dir.with_suffix(".log")

        def run() -> None:
            os.close(reader)
            Watch(self.shared, moment, writer)
            self._fit(run_dir)

        child = in_child(run, log)
        os.close(writer)
        heard = select.select([reader], [], [])[0] and os.read(reader, 1)
        os.close(reader)
        if heard:
            time.sleep(moment.part * self.durations[moment.kind][moment.call])
            doing = [ELSEWHERE, *KINDS][self.shared[0]]
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return doing
        _check(status, log)
        return None

    def once(self, kind: str, twice: float = 0.25) -> dict[str, Any]:
        """Kills a run in work of this kind, now and then a second time anywhere, and says what came of it."""
        run_dir, log = self.work / "killed", self.work / "killed.log"
        shutil.rmtree(run_dir, ignore_errors=True)
        moments = [self.draw(kind)]
        if self.random.random() < twice:
            moments.append(self.draw(self.random.choice(list(KINDS))))
        killed = [self.kill(run_dir, moment) for moment in moments]
        complete(lambda: self._fit(run_dir), log)
        return {
            "killed in": [doing for doing in killed if doing is not None],
            "differences": differences(run_dir, self.work / "undisturbed"),
        }

    def until(self, each: int, kills: int = 0) -> Iterator[dict[str, Any]]:
        """Goes on until there were ``each`` kills in every kind of work and ``kills`` in all."""
        hits: Counter[str] = Counter()
        while missing := [kind for kind in KINDS if hits[kind] < each] or (hits.total() < kills and list(KINDS)):
            outcome = self.once(self.random.choice(missing))
            hits.update(outcome["killed in"])
            yield outcome


def differences(run_dir: Path, undisturbed: Path) -> list[str]:
    """Files that are not byte for byte those of the undisturbed run."""
    ours, theirs = artifacts(run_dir), artifacts(undisturbed)
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _check(status: int, log: Path) -> None:
    """A run that ends with an error must not pass for one that was killed."""
    if status:
        raise RuntimeError(log.read_text()[-3000:])


def main() -> None:
    """Prints a line of JSON for each run that was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for outcome in Torture(arguments.work, arguments.seed).until(arguments.each):
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
