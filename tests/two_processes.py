"""Runs a test program on 2 processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def start(program: str, runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Starts ``program`` with a file of runs; Lightning starts its second process.

    One start does all of them, for starting takes longest.
    """
    path = folder / "runs.json"
    path.write_text(json.dumps(list(runs)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, str(path)], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
