"""Two processes probe as one does, end the stage with the same step, and go on where either was killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import method_run, on_two, prepare
from probed import probes, write_taught
from safetensors.torch import load_file

STEP = 3
"""The step of the target that its stage is to end with."""
LEARNING = ["--model.optim.lr=0.002", "--model.schedule.warmup=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, on two, and on two after a kill on one with the stage's last step but one."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(folder)
    sets, pairs = write_taught(folder)
    probe = [f"--data.custom={sets['custom']}", f"--loop.safety_probe.pairs={pairs}", "--loop.safety_probe.every=1"]
    common = {"folder": str(folder), "method": "methods/sft"}

    def run(name: str, *options: str, **other: Any) -> dict[str, Any]:
        return {**common, "run_dir": str(folder / name), "options": [*LEARNING, *probe, *options], **other}

    method_run(**run("free"))
    drops = [-one["margin_drift"] for one in probes(summary(folder / "free"), "target")]
    assert drops == sorted(drops)
    limit = f"--loop.safety_probe.max_drop={(drops[STEP - 2] + drops[STEP - 1]) / 2}"
    method_run(**run("one", limit))
    method_run(**run("resumed", limit, "--checkpoint_every=1", kill=["target", STEP - 1]))
    on_two([run("two", limit), run("resumed", limit, "--ckpt_path=last")], folder)
    return folder


def summary(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_two_processes_measure_the_same_and_stop_at_the_same_step(runs: Path, name: str) -> None:
    ours, theirs = (summary(runs / run) for run in (name, "one"))
    assert ours["world_size"] == 2
    assert ours["stages"]["target"]["steps"] == theirs["stages"]["target"]["steps"] == STEP
    assert ours["stopped"].keys() == {"target"}
    found, expected = (probes(one, "target") for one in (ours, theirs))
    assert len(found) == len(expected) == STEP
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_and_end_in_the_same_adapter(runs: Path, name: str) -> None:
    ours, theirs = (load_file(runs / run / "adapters/target/adapter_model.safetensors") for run in (name, "one"))
    for key, value in theirs.items():
        assert torch.linalg.norm(ours[key] - value) <= 1e-4 * torch.linalg.norm(value), key
