"""Runs programs on 2 processes: a test program that is started twice, and ``toss test`` as Lightning starts it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import programs

from toss_lightning.cli import main


def start(program: str, runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Starts ``program`` twice with a file of runs; each process finds what Lightning tells those that it starts.

    One start does all of the runs.
    """
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [program, write_runs(runs, folder)]
    side_by_side({f"rank-{rank}": (command, {**meet, "LOCAL_RANK": str(rank)}) for rank in range(2)}, folder)


def write_runs(runs: Sequence[dict[str, Any]], folder: Path) -> str:
    """Writes the file that a test program reads; returns its path."""
    path = folder / "runs.json"
    path.write_text(json.dumps(list(runs)), encoding="utf-8")
    return str(path)


def evaluate_by_one_and_by_two(config: Mapping[str, Any], folder: Path) -> None:
    """Trains once, and has the run tested by one process in ``one`` and by two in ``two`` below a folder."""
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "one")]) == 0
    shutil.copytree(folder / "one", folder / "two")
    assert main(["test", "--run_dir", str(folder / "one")]) == 0
    command = [sys.executable, "-m", "toss_lightning", "test", "--run_dir", str(folder / "two")]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def side_by_side(commands: Mapping[str, tuple[list[str], dict[str, str]]], folder: Path) -> None:
    """Runs programs side by side, to their end or to where one of them fails.

    Args:
        commands: name -> what would follow ``python``, and what its environment has besides.
        folder: where ``NAME.txt`` is put, what each one prints.
    """
    logs, started = {name: folder / f"{name}.txt" for name in commands}, {}
    try:
        for name, (command, own) in commands.items():
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
            logs[name].unlink(missing_ok=True)
            started[name] = programs.start(command, logs[name], environment=environment)
        _wait(list(started.values()))
        codes = {name: process.exitcode for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    told = (f"{name} ended with {codes[name]}:\n{_where_it_began(log.read_text())}" for name, log in logs.items())
    assert not any(code != 0 for code in codes.values()), "\n".join(told)


def _wait(processes: Sequence[BaseProcess], most: float = 300, after_a_failure: float = 20) -> None:
    """Until all have ended; others are given some time once one has failed, to say what they know of it."""
    until = time.monotonic() + most
    while time.monotonic() < until and None in (codes := [process.exitcode for process in processes]):
        if any(codes):
            until = min(until, time.monotonic() + after_a_failure)
        time.sleep(0.05)


def _where_it_began(output: str) -> str:
    """What surrounds the first failure that a process tells of, or else the last that it says."""
    first = re.search("Traceback|Fatal Python error|terminate called", output)
    at = max(0, (first.start() if first else len(output)) - 1000)
    return output[at : at + 5000]
