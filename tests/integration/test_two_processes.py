"""Two processes (gloo) end where one does: a step has the same rows, whatever the number of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from runs import tiny_fit
run_dir, devices, strategy = sys.argv[1:]
tiny_fit({model!r}, {sets!r}, Path(run_dir), devices=int(devices), strategy=strategy, data={{"max_tokens": 30}})
"""


def test_two_processes_give_the_scores_mask_and_adapters_of_one(tiny_model: str, tiny_sets: dict, tmp_path) -> None:
    program = tmp_path / "program.py"
    tests = str(Path(__file__).parent.parent)
    program.write_text(PROGRAM.format(tests=tests, model=tiny_model, sets=tiny_sets), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, devices, strategy in (("one", "1", "auto"), ("two", "2", "ddp")):
        command = [sys.executable, str(program), str(tmp_path / name), devices, strategy]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    one, two = (TokenScores(tmp_path / name / "scores") for name in ("one", "two"))
    assert len(list((tmp_path / "two" / "scores").glob("*.arrow"))) == 2
    np.testing.assert_allclose(two.score(), one.score(), atol=1e-5)
    masks = [TokenWeights.load(tmp_path / name / "selection").flat() for name in ("one", "two")]
    np.testing.assert_array_equal(masks[0], masks[1])
    for name in ("utility", "degraded", "target"):
        ours, theirs = (
            load_file(tmp_path / run / "adapters" / name / "adapter_model.safetensors") for run in ("one", "two")
        )
        for key, value in ours.items():
            assert torch.linalg.norm(value - theirs[key]) <= 1e-4 * torch.linalg.norm(value) + 1e-8, (name, key)
