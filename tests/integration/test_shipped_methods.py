"""Every method that comes with the project: fits, resumes from a kill, and gives the same on one and two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import METHODS, method_run, on_two, prepare
from runs import artifacts
from safetensors.torch import load_file

from toss_lightning.selection import TokenWeights

TARGET = "adapters/target/adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method on two processes, and plain fine-tuning on one."""
    folder = tmp_path_factory.mktemp("methods")
    prepare(folder)
    method_run(str(folder), "methods/sft", f"{folder}/plain")
    on_two([{"folder": str(folder), "method": name, "run_dir": f"{folder}/two/{name}"} for name in METHODS], folder)
    return folder


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, folder: Path) -> Path:
    """An undisturbed run of a method on one process."""
    path = folder / "one" / request.param
    method_run(str(folder), request.param, str(path))
    return path


def test_it_does_something_to_plain_fine_tuning(run: Path, folder: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["plain"], summary["idle"]) == (run.name == "sft", [])
    target, plain = (load_file(path / TARGET) for path in (run, folder / "plain"))
    assert all(torch.equal(value, plain[name]) for name, value in target.items()) == (run.name == "sft")


def test_killed_in_the_middle_of_the_target_it_ends_in_the_same_bytes(run: Path, folder: Path) -> None:
    name = str(run.relative_to(folder / "one"))
    killed = folder / "killed" / name
    method_run(str(folder), name, str(killed), kill=["target", 5])
    method_run(str(folder), name, str(killed), options=["--ckpt_path=last"])
    assert artifacts(killed) == artifacts(run)


def test_two_processes_give_the_same(run: Path, folder: Path) -> None:
    two = folder / "two" / run.relative_to(folder / "one")
    if (run / "selection").exists():
        ours, theirs = (TokenWeights.load(path / "selection") for path in (run, two))
        for name, values in ours.values().items():
            for row_id, one in values.items():
                np.testing.assert_allclose(theirs.values()[name][row_id], one, rtol=0, atol=1e-4)
    adapters = [load_file(path / TARGET) for path in (run, two)]
    for name, value in adapters[0].items():
        assert torch.linalg.norm(value - adapters[1][name]) <= 1e-3 * torch.linalg.norm(value), name


def test_seal_resumes_in_its_own_stage(folder: Path) -> None:
    whole, killed = folder / "one" / "methods" / "seal", folder / "killed" / "methods" / "seal_stage"
    method_run(str(folder), "methods/seal", str(killed), kill=["seal", 7])
    method_run(str(folder), "methods/seal", str(killed), options=["--ckpt_path=last"])
    if not whole.exists():
        method_run(str(folder), "methods/seal", str(whole))
    assert artifacts(killed) == artifacts(whole)
