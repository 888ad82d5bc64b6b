"""Whether a further run fits, by the peaks of finished ones, a host's memory and what a made nvidia-smi says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import made, write_comparison

from toss_lightning.cli import main
from toss_lightning.compare import memory
from toss_lightning.compare.memory import CONTEXT, Memory

pytestmark = pytest.mark.usefixtures("somewhere", "host")
METHODS = {"A": None, "B": None}
ANYWHERE = {0: None, 1: None}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """MiB that are free, and that each process holds."""
    found: dict[Any, int] = {"free": 100_000}
    monkeypatch.setattr(memory, "_available", lambda: found["free"])
    monkeypatch.setattr(memory, "_resident", lambda pid: found.get(pid, 0))
    return found


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a nvidia-smi that says these lines; without any there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def say(*lines: str, code: int = 0) -> None:
        program = folder / "nvidia-smi"
        said = "".join(f"echo '{line}'\n" for line in lines)
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked.txt\n{said}exit {code}\n')
        program.chmod(0o755)

    return say


def summary(host: Any, gpu: Any = None, ranks: int = 1) -> Path:
    """A summary.json with these peaks."""
    path = Path(f"{len(list(Path().glob('*.json')))}.json")
    path.write_text(json.dumps({"peak_memory_mib": host, "peak_gpu_memory_mib": gpu, "world_size": ranks}))
    return path


def test_the_largest_finished_run_counts_on_the_host_and_on_a_gpu():
    found = Memory([summary(3000), summary(1000, gpu=20_000), summary(900, gpu=8000, ranks=4), Path("none.json")])
    # ranks share the host, and each has a GPU of its own
    assert (found.host, found.gpu) == (3600, 20_000 + CONTEXT)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peak_memory_mib": null, "world_size": 1}'])
def test_a_summary_that_does_not_say_teaches_nothing(content):
    Path("summary.json").write_text(content)
    assert Memory([Path("summary.json")]).host == 0


def test_what_runs_may_yet_take_is_not_free(host, capsys):
    found = Memory([summary(3000)])
    host.update({"free": 6999, 1: 1000, 2: 1000})
    assert found.place({}, ANYWHERE, False) == 0
    assert found.place({1: None}, ANYWHERE, False) == 0
    assert found.place({1: None, 2: None}, {2: None}, False) is None
    assert capsys.readouterr().out == (
        "waiting until one of 2 runs at once ends: a run took up to 3,000 MiB of memory, and 2,999 MiB are free beside"
        " what those under way may yet take\n"
    )
    # one that has taken more than any before it is not taken to give some back
    host.update({1: 9000, 2: 2000, "free": 4000})
    assert found.place({1: None, 2: None}, {2: None}, False) == 2
    host["free"] = 0
    assert found.place({1: None, 2: None}, {2: None}, False) is None
    assert capsys.readouterr().out == ""  # said before
    assert found.place({}, ANYWHERE, False) == 0  # where nothing runs, nothing would make room


def test_where_nothing_is_known_a_number_counts_and_auto_tries_one(capsys):
    found = Memory([])
    assert found.place({}, ANYWHERE, True) == 0
    assert found.place({1: None}, {1: None}, False) == 1
    assert found.place({1: None}, {1: None}, True) is None
    assert found.place({1: None}, {1: None}, True) is None
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_runs_count_at_their_peak_on_the_gpus_that_they_see(smi):
    smi("0, GPU-aa, 50000", "1, GPU-bb, 50000")
    found = Memory([summary(10, gpu=20_000 - CONTEXT)])
    assert found.place({}, {0: "0", 1: "1"}, False) == 0
    # the first has taken nothing yet
    assert found.place({1: "0"}, {2: "0"}, False) == 2
    assert found.place({1: "0", 2: "0"}, {4: "0", 5: "1"}, False) == 5
    # then all of it, and so has another program
    smi("0, GPU-aa, 19999", "1, GPU-bb, 50000")
    assert found.place({1: "0"}, {2: "0"}, False) is None
    # two GPUs of which one is short, by another name, or as one of all
    for visible in ("1,0", "GPU-bb,GPU-a", None):
        assert found.place({1: "0"}, {2: visible}, False) is None
    for visible in ("1", " GPU-bb", "", "-1", "1,-1,0"):
        assert found.place({1: "0"}, {2: visible}, False) == 2
    # once none of ours is there, what is free is all that there is
    smi("0, GPU-aa, 30000", "1, GPU-bb, 50000")
    assert found.place({}, {0: "0"}, False) == 0
    assert found.place({1: "0"}, {2: "0"}, False) is None
    query = "--query-gpu=index,uuid,memory.free --format=csv,noheader,nounits"
    assert {*Path("asked.txt").read_text().splitlines()} == {query}


def test_nvidia_smi_is_asked_before_the_first_run_and_not_where_runs_use_no_gpu(smi):
    smi("0, GPU-aa, 50000")
    found = Memory([])
    assert found.place({}, ANYWHERE, False) == 0
    assert found.place({1: None}, ANYWHERE, False) == 0
    assert len(Path("asked.txt").read_text().splitlines()) == 1
    # a run beside the first has ended; what was free before both is known
    found.learn(summary(10, gpu=20_000 - CONTEXT))
    smi("0, GPU-aa, 45000")
    assert found.place({1: None}, ANYWHERE, False) == 0
    assert found.place({1: None, 2: None}, ANYWHERE, False) is None
    Path("asked.txt").unlink()
    found = Memory([summary(10)])
    assert [found.place(running, ANYWHERE, False) for running in ({}, {1: None})] == [0, 0]
    assert not Path("asked.txt").exists()


@pytest.mark.parametrize(
    ("lines", "code", "visible", "said"),
    [
        ((), None, "0", "nvidia-smi gives no answer ([Errno 2] No such file or directory: 'nvidia-smi')"),
        (("No devices were found",), 0, "0", "nvidia-smi says what cannot be read (No devices were found)"),
        (("0, GPU-aa, [N/A]",), 0, None, "nvidia-smi says what cannot be read (0, GPU-aa, [N/A])"),
        ((), 0, "0", "nvidia-smi says what cannot be read (nothing)"),
        (("0, GPU-aa, 5",), 9, "0", "nvidia-smi says what cannot be read (exit code 9)"),
        (("0, GPU-aa, 5",), 0, "MIG-cc", "nvidia-smi tells nothing of GPU MIG-cc"),
    ],
)
def test_without_nvidia_smi_the_host_alone_counts_and_it_is_said_once(host, smi, capsys, lines, code, visible, said):
    if code is not None:
        smi(*lines, code=code)
    found = Memory([summary(1000, gpu=20_000)])
    assert found.place({}, {0: visible}, False) == 0
    for _ in range(2):
        assert found.place({1: visible}, {1: visible}, False) == 1
    host["free"] = 1500
    assert found.place({1: visible}, {1: visible}, False) is None
    assert capsys.readouterr().err == (
        f"WARNING: {said}: what is free on the GPUs is not known, only the host's memory counts\n"
    )


@pytest.mark.usefixtures("smi")
def test_where_runs_use_no_gpu_a_missing_nvidia_smi_is_not_told(capsys):
    found = Memory([])
    assert found.place({}, ANYWHERE, False) == 0
    found.learn(summary(1000))
    assert found.place({1: None}, ANYWHERE, False) == 0
    assert capsys.readouterr().err == ""


def test_what_children_of_a_run_hold_is_counted(monkeypatch):
    monkeypatch.undo()  # of the made host
    child = "import sys; held = b'x' * (64 << 20); print(flush=True); sys.stdin.read()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert memory._resident(process.pid) >= 64
    assert memory._resident(process.pid) == 0
    assert memory._available() > 0


@pytest.mark.parametrize(
    ("keys", "cores", "jobs", "threads"),
    [
        ({}, 16, 4, 4),  # no more than there are runs
        ({}, 3, 3, 1),
        ({"gpus": [0, 1]}, 16, 2, 8),
        ({"gpus": ["0,1"]}, 16, 1, 16),
        ({"threads": 5}, 2, 2, 5),
    ],
)
def test_auto_is_what_the_machine_has_cores_or_gpus_for(tmp_path, monkeypatch, keys, cores, jobs, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    comparison, _ = made(write_comparison(tmp_path, METHODS, jobs="auto", **keys))
    assert (comparison.jobs, comparison.threads, comparison.try_one) == (jobs, threads, True)
    comparison, _ = made(write_comparison(tmp_path, METHODS))
    assert (comparison.jobs, comparison.threads, comparison.try_one) == (1, cores, False)


def test_auto_as_an_option_and_what_is_no_number(tmp_path, capsys):
    path = str(write_comparison(tmp_path, METHODS, jobs="all"))
    assert main(["compare", path]) == 2
    assert capsys.readouterr().err == f"error: {path}: jobs: 'all': give a whole number of 1 or more, or auto\n"
    assert main(["compare", path, "--jobs", "many", "--dry_run"]) == 2
    assert capsys.readouterr().err == "error: --jobs: 'many': give a whole number of 1 or more, or auto\n"
    assert main(["compare", path, "--jobs", "auto", "--dry_run"]) == 0
