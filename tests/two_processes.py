"""Runs a test program, and ``toss test``, on 2 processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toss_lightning.cli import main


def start(program: str, runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Starts ``program`` with a file of runs; Lightning starts its second process.

    One start does all of them, for starting takes longest.
    """
    path = folder / "runs.json"
    path.write_text(json.dumps(list(runs)), encoding="utf-8")
    _run([sys.executable, program, str(path)])


def evaluate_by_one_and_by_two(config: Mapping[str, Any], folder: Path) -> None:
    """Trains once, and has the run tested by one process in ``one`` and by two in ``two`` below a folder."""
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "one")]) == 0
    shutil.copytree(folder / "one", folder / "two")
    assert main(["test", "--run_dir", str(folder / "one")]) == 0
    command = [sys.executable, "-m", "toss_lightning", "test", "--run_dir", str(folder / "two")]
    _run([*command, "--trainer.devices=2", "--trainer.strategy=ddp"])


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
