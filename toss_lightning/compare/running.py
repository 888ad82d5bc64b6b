"""Doing what is left of a comparison, several runs at once, until it is done or told to stop; loads no torch."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tqdm import tqdm

from toss_lightning.compare.comparison import Comparison
from toss_lightning.compare.memory import Memory
from toss_lightning.compare.runs import Run, as_of_now, environment
from toss_lightning.errors import Stopped, StoreError
from toss_lightning.files import HELD, cannot_write

TAIL = 5
"""Lines of a failed run's log that are shown."""
POLL = 0.1
"""Seconds between two looks at the runs."""


@dataclass
class _Child:
    """A run that is going on."""

    run: Run
    slot: int
    process: "subprocess.Popen[bytes]"
    started: float
    before: int | None
    """When the evaluation that lay there as it began was written."""


def run_all(comparison: Comparison, runs: Sequence[Run], held: int) -> list[str]:
    """Does what is left, several at once if memory allows. Whatever ends this early, they are to write checkpoints.

    Args:
        comparison: what was asked for.
        runs: all of its runs.
        held: the lock of its directory, see :func:`lock`.

    Returns:
        For each run that failed, what its log ends with.

    Raises:
        StoreError: the disk refuses, or a finished run lies there that the comparison did not start.
        Stopped: SIGTERM came.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    waiting = [run for run in runs if run.state() != "done"]
    if not waiting:
        return []
    if foreign := [str(run.directory) for run in waiting if run.state() == "foreign"]:
        raise StoreError(
            f"{', '.join(foreign)}: finished, but not started by this comparison, so that nothing tells what it was"
            " made from: move it away, and it is run anew"
        )
    failed: list[str] = []
    children: list[_Child] = []
    done = len(runs) - len(waiting)
    memory = Memory(run.summary for run in runs if run.state() != "stale")
    is_full = False  # until a run ends
    bar = tqdm(total=len(runs), initial=done, desc="runs", unit="run", disable=not sys.stderr.isatty())
    with _Signals() as signals, bar:
        try:
            while (waiting or children) and not signals.heard:
                while waiting and not is_full and len(children) < comparison.jobs:
                    slot = _place(comparison, memory, children)
                    if slot is None:
                        is_full = True
                        break
                    run = waiting.pop(0)
                    # files may have been edited since it was listed; what cannot be read, it will say itself
                    run = as_of_now(comparison, run) or run
                    children.append(_start(run, slot, environment(comparison, slot), held))
                time.sleep(POLL)
                for child in [one for one in children if one.process.poll() is not None]:
                    children.remove(child)
                    is_full = False
                    problem = _close(comparison, child)
                    memory.learn(child.run.summary)
                    failed += [problem] if problem else []
                    took = f"{'FAILED after' if problem else 'done in'} {_duration(time.monotonic() - child.started)}"
                    bar.update()
                    tqdm.write(f"{child.run.title}: {took} ({len(runs) - len(waiting) - len(children)} of {len(runs)})")
                    sys.stdout.flush()
        finally:
            _end(comparison, children, signals)
        signals.raise_heard()
    return failed


def _place(comparison: Comparison, memory: Memory, children: Sequence[_Child]) -> int | None:
    """Where a further run may begin; None where it waits until another ends."""
    if comparison.jobs == 1:
        return 0
    taken = {child.slot for child in children}
    running = {child.process.pid: _visible_gpus(comparison, child.slot) for child in children}
    places = {slot: _visible_gpus(comparison, slot) for slot in range(comparison.jobs) if slot not in taken}
    return memory.place(running, places, comparison.try_one)


def _visible_gpus(comparison: Comparison, slot: int) -> str | None:
    return {**os.environ, **environment(comparison, slot)}.get("CUDA_VISIBLE_DEVICES")


def _start(run: Run, slot: int, settings: Mapping[str, str], held: int) -> _Child:
    try:
        if run.state() == "stale":
            _set_aside(run)
        elif run.state() == "resume" and run.has_foreign_answers:
            run.evaluation.unlink(missing_ok=True)
        for directory in (run.directory, run.log.parent):
            directory.mkdir(parents=True, exist_ok=True)
        command = run.command()
        before = _written(run)
        if run.state() != "unjudged":  # whose numbers hold until there are others
            run.file("training")
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
            log.flush()
            process = _spawn(command, log, {**os.environ, **settings, "PYTHONUNBUFFERED": "1"}, held)
    except OSError as error:
        raise StoreError(cannot_write(run.directory, error)) from error
    return _Child(run, slot, process, time.monotonic(), before)


def _spawn(command: Sequence[str], log: IO[str], settings: Mapping[str, str], held: int) -> "subprocess.Popen[bytes]":
    # in a group of its own, so that Ctrl-C reaches this process alone, which then asks for checkpoints; the lock is
    # inherited, so that it is held as long as any of them runs, even where this process is killed
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=settings,
        process_group=0,
        pass_fds=[held],
    )


def _close(comparison: Comparison, child: _Child) -> str | None:
    """Files that a run has ended well, or says how it failed."""
    run, code = child.run, child.process.returncode
    reason = f"exit code {code}" if code else "it ended without summary.json or evaluation.json"
    now = as_of_now(comparison, run)
    if now is not None and now.made_from["training"] != run.made_from["training"]:
        run.file()  # nobody can say what it was made from
        reason = "its settings, or a file that they name, were changed while it ran"
    elif now is not None and now.made_from != run.made_from:
        reason = "what it is asked was changed while it ran: the same command evaluates it, and trains nothing again"
    elif code and now is not None and run.summary.exists() and _written(run) != child.before and run.failed_judges:
        run.file("training", "unjudged")
        said = "; ".join(f"{judge} has not judged: {why}" for judge, why in run.failed_judges.items())
        return f"{run.title}: {said}; the report has what else was measured"
    elif code == 0 and run.summary.exists() and run.evaluation.exists():
        if now is not None:
            run.file("training", "evaluation")
            return None
        reason = "its settings, or a file that they name, cannot be read now, to tell whether they were changed while"
        reason += " it ran: the same command evaluates it again, and trains nothing again"
    return "\n".join([f"{run.title}: {reason}; {run.log} ends in:", *(f"  {line}" for line in _tail(run.log))])


def _written(run: Run) -> int | None:
    """When its evaluation was written, in nanoseconds; what it says may be the same each time."""
    return run.evaluation.stat().st_mtime_ns if run.evaluation.exists() else None


def _tail(log: Path) -> list[str]:
    # as bytes, for as text every carriage return, with which a bar writes over its own line, would end one
    text = log.read_bytes().decode(errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-TAIL:]


def _set_aside(run: Run) -> None:
    """Moves what was made from other settings out of the way, and says so: it is trained again, which takes time."""
    earlier = run.directory.parent.parent / "earlier"
    earlier.mkdir(exist_ok=True)
    name = f"{run.directory.parent.name}-{run.directory.name}"
    number = 1
    while (earlier / f"{name}-{number}").exists():
        number += 1
    aside = earlier / f"{name}-{number}"
    tqdm.write(
        f"{run.title}: its settings, or files that they name, have changed since it began: trained again, the old run"
        f" is kept in {aside}"
    )
    sys.stdout.flush()
    run.directory.rename(aside)


class _Signals:
    """Takes note of Ctrl-C and SIGTERM, which are acted on where no run is half started."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        self._before = {signum: signal.signal(signum, self._hear) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self.heard.append(signum)

    def raise_heard(self) -> None:
        """Ends the work if it was told to."""
        if self.heard:
            raise KeyboardInterrupt if self.heard[0] == signal.SIGINT else Stopped(self.heard[0])


def _end(comparison: Comparison, children: Sequence[_Child], signals: _Signals) -> None:
    """Asks what still runs for a checkpoint, and waits; whoever presses Ctrl-C again does without."""
    if not children:
        return
    tqdm.write(f"stopping {len(children)} runs, which write a checkpoint; Ctrl-C again does not wait", file=sys.stderr)
    _tell(children, signal.SIGTERM)
    asked = len(signals.heard)
    while any(child.process.poll() is None for child in children):
        if len(signals.heard) > asked:
            _tell(children, signal.SIGKILL)
        time.sleep(POLL)
    for child in children:
        if child.process.returncode == 0:
            _close(comparison, child)


def _tell(children: Sequence[_Child], signum: int) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child.process.pid, signum)


@contextmanager
def lock(directory: Path) -> Iterator[int]:
    """Keeps a second comparison out of a directory; gives what its runs are to inherit.

    A file system that has no locks, as some of clusters, is warned of.

    Raises:
        StoreError: another one is going on there, or the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StoreError(cannot_write(directory, error)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            os.close(handle)
            raise StoreError(
                f"{directory}: runs of a comparison are going on there: wait for them, or end them first"
            ) from error
        print(
            f"WARNING: {directory}: this file system has no locks ({error.strerror}): nothing keeps a second comparison"
            " from working there at the same time",
            file=sys.stderr,
        )
    try:
        yield handle
    finally:
        os.close(handle)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
