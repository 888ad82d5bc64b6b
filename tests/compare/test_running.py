"""Runs at once, stopped, resumed, failed; the children are small programs that stand for ``toss fit``."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import finish, made, measure, write_comparison

from toss_lightning.cli import main
from toss_lightning.compare.running import lock, run_all
from toss_lightning.compare.runs import Run
from toss_lightning.errors import Stopped, StoreError

pytestmark = pytest.mark.usefixtures("somewhere")
FAKE = """
import json, os, pathlib, signal, sys, time
verb, run = sys.argv[1], pathlib.Path(sys.argv[2])
behaviour = json.loads(pathlib.Path("behaviour.json").read_text()).get(run.parent.name, {})
def stop(*_):
    (run / "checkpoint").write_text("1")
    print("stopped, with a checkpoint")
    sys.exit(143)
def finish(*_):
    (run / "checkpoint").write_text("1")
signal.signal(signal.SIGTERM, finish if behaviour.get("deaf") else stop)
with open("calls.txt", "a") as calls:
    gpu, threads = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
    calls.write(f"{run.parent.name}/{run.name} {verb} {(run / 'checkpoint').exists()} {gpu} {threads}\\n")
start = time.time()
(run / "pid").write_text(str(os.getpid()))
beside = run.parent.parent / behaviour.get("beside", "-") / run.name / "pid"
while not (run / "checkpoint").exists() and not beside.exists() and time.time() < start + behaviour.get("seconds", 0):
    time.sleep(0.02)
if behaviour.get("fail"):
    print("\\n".join(f"line {number}" for number in range(9)))
    print("10%\\r90%")
    sys.stdout.flush()
    print("error: no luck", file=sys.stderr)
    sys.exit(2)
(run / "times").write_text(f"{start} {time.time()}")
(run / "summary.json").write_text(json.dumps(behaviour.get("summary", {})))
(run / "evaluation").mkdir(exist_ok=True)
if behaviour.get("answers", True):
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(behaviour.get("evaluation", {})))
sys.exit(behaviour.get("code", 0))
"""
METHODS = {"A": None, "B": None}


@pytest.fixture
def fake(somewhere, monkeypatch, tmp_path):
    """Children that do what behaviour.json says of their method."""
    (tmp_path / "fake.py").write_text(FAKE)
    behave()

    def command(run: Run) -> list[str]:
        verb = "test" if run.state() in ("test", "unjudged") else "fit"
        return [sys.executable, str(tmp_path / "fake.py"), verb, str(run.directory)]

    monkeypatch.setattr(Run, "command", command)


def behave(**of_method: dict) -> None:
    Path("behaviour.json").write_text(json.dumps(of_method))


def calls() -> list[str]:
    """What was started, sorted, each once read."""
    path = Path("calls.txt")
    lines = sorted(path.read_text().splitlines()) if path.exists() else []
    path.write_text("")
    return lines


def states(path: Path) -> dict[str, str]:
    return {f"{method}{seed}": run.state() for (method, seed), run in made(path)[1].items()}


def run_it(path: Path) -> list[str]:
    comparison, runs = made(path)
    with lock(comparison.run_dir) as held:
        return run_all(comparison, list(runs.values()), held)


def edit_during(file: Path, old: str, new: str) -> list[str]:
    """Runs the comparison and edits a file once its first method runs."""

    def edit() -> None:
        wait_until(Path("run/a/seed-1/pid").exists)
        file.write_text(file.read_text().replace(old, new))
        Path("run/a/seed-1/checkpoint").write_text("it may end now")

    editor = threading.Thread(target=edit)
    editor.start()
    failed = run_it(Path("compare.yaml"))
    editor.join()
    return failed


def test_the_real_command_of_each_state(tmp_path):
    run = made(write_comparison(tmp_path, METHODS, set={"loop.epochs": 2, "data.custom": "x y"}))[1]["A", 1]
    fit = run.command()
    assert fit[:4] == [sys.executable, "-m", "toss_lightning", "fit"]
    assert fit[4:] == [
        f"--config={tmp_path}/common.yaml",
        f"--config={tmp_path}/asked.yaml",
        "--loop.epochs=2",
        "--data.custom=x y",
        "--loop.plan=[target, test]",
        "--loop.evaluation.adapters=[base, target]",
        f"--loop.evaluation.cache={tmp_path}/run/cache",
        "--seed_everything=1",
        f"--run_dir={tmp_path}/run/a/seed-1",
        "--ckpt_path=auto",
    ]
    finish(run, [])
    run.evaluation.unlink()
    assert run.command() == [*fit[:3], "test", *fit[4:-1], "--own_config=false"]


@pytest.mark.usefixtures("fake")
def test_what_is_done_is_not_done_again(tmp_path, capsys):
    path = write_comparison(tmp_path, METHODS, threads=3)
    assert set(states(path).values()) == {"new"}
    assert run_it(path) == []
    assert calls() == [f"{slug}/seed-{seed} fit False None 3" for slug in "ab" for seed in (1, 2)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["A, seed 1", "B, seed 1", "A, seed 2", "B, seed 2"]
    assert lines[0].endswith("(1 of 4)")
    assert "--- 20" in (tmp_path / "run/logs/a-seed-1.txt").read_text()
    assert set(states(path).values()) == {"done"}
    assert run_it(path) == []
    assert calls() == []
    # a comment changes nothing, another judge the evaluation, a setting the training
    (tmp_path / "asked.yaml").write_text("# asked\n" + (tmp_path / "asked.yaml").read_text())
    assert set(states(path).values()) == {"done"}
    write_comparison(tmp_path, METHODS, set={"loop.evaluation.batch_size": 3})
    assert set(states(path).values()) == {"test"}
    run_it(path)
    assert {call.split()[1] for call in calls()} == {"test"}
    assert set(states(path).values()) == {"done"}
    write_comparison(tmp_path, {"A": None, "B": {"set": {"loop.epochs": 9}}}, set={"loop.evaluation.batch_size": 3})
    assert states(path) == {"A1": "done", "A2": "done", "B1": "stale", "B2": "stale"}
    capsys.readouterr()
    run_it(path)
    assert calls() == [f"b/seed-{seed} fit False None {os.cpu_count()}" for seed in (1, 2)]
    assert capsys.readouterr().out.splitlines()[0] == (
        "B, seed 1: its settings, or files that they name, have changed since it began: trained again, the old run is"
        f" kept in {tmp_path}/run/earlier/b-seed-1-1"
    )
    # a toss test of one's own writes over the numbers
    (tmp_path / "run/a/seed-2/evaluation/evaluation.json").write_text('{"asked": "otherwise"}')
    assert states(path) == {"A1": "done", "A2": "test", "B1": "done", "B2": "done"}
    assert (tmp_path / "run/earlier/b-seed-1-1/summary.json").exists()


@pytest.mark.usefixtures("fake")
def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path, capsys):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    behave(a={"fail": True})
    (problem,) = run_it(path)
    assert problem.splitlines() == [
        f"A, seed 1: exit code 2; {tmp_path}/run/logs/a-seed-1.txt ends in:",
        *(f"  line {number}" for number in range(6, 9)),
        "  90%",
        "  error: no luck",
    ]
    assert capsys.readouterr().out.splitlines()[0].startswith("A, seed 1: FAILED after ")
    assert states(path) == {"A1": "resume", "B1": "done"}
    calls()
    behave()
    assert run_it(path) == []
    assert len(calls()) == 1


@pytest.mark.usefixtures("fake")
def test_a_judge_that_fails_costs_no_other_measure_and_tries_again(tmp_path):
    """Its run counts with what the others measured, and is not trained again."""
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    failed = {"failed_judges": {"Strict": "no such host"}}
    behave(a={"code": 1, "evaluation": failed})
    (problem,) = run_it(path)
    assert problem == "A, seed 1: Strict has not judged: no such host; the report has what else was measured"
    assert states(path) == {"A1": "unjudged", "B1": "done"}
    assert [one.is_measured for one in made(path)[1].values()] == [True, True]
    calls()
    # it fails as before, and then before it has said anything: what was measured stays
    for behaviour, said in (({"code": 1, "evaluation": failed}, problem), ({"fail": True}, "error: no luck")):
        behave(a=behaviour)
        (again,) = run_it(path)
        assert again.endswith(said)
        assert [call.split()[1] for call in calls()] == ["test"]
        assert states(path) == {"A1": "unjudged", "B1": "done"}
    behave(a={"evaluation": {"failed_judges": {}}})
    assert run_it(path) == []
    assert states(path) == {"A1": "done", "B1": "done"}


@pytest.mark.usefixtures("fake")
def test_an_evaluation_from_before_is_not_taken_for_that_of_a_run_that_fails(tmp_path):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    behave(a={"code": 1, "evaluation": {"failed_judges": {"Strict": "no such host"}}})
    run_it(path)
    (tmp_path / "asked.yaml").write_text("{loop: {evaluation: {prompts: {other: prompts.jsonl}}}}")
    behave(a={"fail": True})
    run_it(path)
    assert states(path) == {"A1": "test", "B1": "done"}
    # another evaluation may well say the same
    behave(a={"code": 1, "evaluation": {"failed_judges": {"Strict": "no such host"}}})
    run_it(path)
    assert states(path) == {"A1": "unjudged", "B1": "done"}


@pytest.mark.usefixtures("fake")
def test_several_run_at_once_each_with_its_gpu(tmp_path):
    path = write_comparison(tmp_path, METHODS, jobs=2, gpus=[4, 5])
    behave(a={"seconds": 0.6}, b={"seconds": 0.6})
    assert run_it(path) == []
    assert {call.split()[3] for call in calls()} == {"4", "5"}
    times = [[float(one) for one in file.read_text().split()] for file in tmp_path.glob("run/*/seed-1/times")]
    assert max(start for start, _ in times) < min(end for _, end in times)


def took(host: int, gpu: int | None = None) -> dict[str, int | None]:
    """What a summary says of memory, in MiB."""
    return {"peak_memory_mib": host, "peak_gpu_memory_mib": gpu, "world_size": 1}


def times(tmp_path: Path, *slugs: str) -> list[tuple[float, float]]:
    """When runs began and ended."""
    files = [tmp_path / "run" / slug / "seed-1/times" for slug in slugs]
    return [(float(start), float(end)) for start, end in (file.read_text().split() for file in files)]


@pytest.fixture
def free(monkeypatch):
    """Memory of the host that is free, to be set; runs hold none of it yet."""
    found = {"MiB": 0}
    monkeypatch.setattr("toss_lightning.compare.memory._available", lambda: found["MiB"])
    monkeypatch.setattr("toss_lightning.compare.memory._resident", lambda pid: 0)
    return found


@pytest.mark.usefixtures("fake")
def test_runs_wait_while_memory_is_short_and_it_is_said_once(tmp_path, capsys, free):
    methods = dict.fromkeys("ABCDEF")
    free["MiB"] = 2999
    path = write_comparison(tmp_path, methods, seeds=[1], jobs=3)
    behave(**{slug: {"seconds": 0.2, "summary": took(1000)} for slug in "abcdef"})
    # nothing is known when the first three begin; of the others two fit at once, whenever those end
    assert run_it(path) == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting")]
    assert lines == [
        "waiting until one of 2 runs at once ends: a run took up to 1,000 MiB of memory, and 999 MiB are free beside"
        " what those under way may yet take"
    ]
    # what is known from before counts from the first run on, and one always runs
    free["MiB"] = 0
    write_comparison(tmp_path, methods | dict.fromkeys("GHI"), seeds=[1], jobs=3)
    assert run_it(path) == []
    g, h, i = times(tmp_path, *"ghi")
    assert g[1] < h[0] < h[1] < i[0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("waiting until one of 1 runs at once ends", "G, seed 1", "H, seed 1", "I, seed 1")
    ]


@pytest.mark.usefixtures("fake")
def test_auto_begins_with_one_run_whose_peak_tells_how_many_fit(tmp_path, capsys, free, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    free["MiB"] = 2000
    path = write_comparison(tmp_path, dict.fromkeys("ABC"), seeds=[1], jobs="auto")
    behave(a={"summary": took(1000)}, b={"seconds": 60, "beside": "c"}, c={"seconds": 60, "beside": "b"})
    assert run_it(path) == []
    a, b, c = times(tmp_path, *"abc")
    assert a[1] < min(b[0], c[0])
    assert max(b[0], c[0]) < min(b[1], c[1])
    assert {call.split()[4] for call in calls()} == {"2"}  # three runs share eight cores
    assert capsys.readouterr().out.splitlines()[0] == (
        "jobs: auto: the first run goes alone, for its peak tells how many fit at once"
    )


@pytest.mark.usefixtures("fake")
def test_auto_goes_on_with_one_run_where_none_tells_what_it_took(tmp_path, free):
    free["MiB"] = 2000
    path = write_comparison(tmp_path, dict.fromkeys("ABC"), seeds=[1], jobs="auto", gpus=[0, 1])
    behave(a={"fail": True})
    assert len(run_it(path)) == 1
    b, c = times(tmp_path, *"bc")
    assert b[1] < c[0]


@pytest.mark.usefixtures("fake")
def test_a_run_goes_where_a_gpu_has_room(tmp_path, capsys, free, monkeypatch):
    free["MiB"] = 99999
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '0, GPU-aa, 9000'\necho '1, GPU-bb, 50000'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    path = write_comparison(tmp_path, dict.fromkeys("ABCD"), seeds=[1], jobs=4, gpus=[0, 1])
    finish(made(path)[1]["A", 1], [], computed=took(1000, 20000))
    behave(b={"seconds": 60, "beside": "c"}, c={"seconds": 60, "beside": "b"})
    assert run_it(path) == []
    assert [call.split()[3] for call in calls()] == ["1", "1", "1"]
    b, c, d = times(tmp_path, *"bcd")
    assert max(b[0], c[0]) < min(b[1], c[1]) < d[0]
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == (
        "waiting until one of 2 runs at once ends: a run took up to 20,512 MiB of GPU 0, and 9,000 MiB are free beside"
        " what those under way may yet take"
    )
    assert said.err == ""


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_stopped_comparison_stops_its_runs_and_goes_on(tmp_path, capsys, signum, kind):
    path = write_comparison(tmp_path, METHODS, jobs=2)
    behave(b={"seconds": 60})
    timer = threading.Thread(target=interrupt_when, args=(tmp_path / "run/a/seed-2/summary.json", signum))
    timer.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind):
        run_it(path)
    timer.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "write a checkpoint" in capsys.readouterr().err
    assert states(path) == {"A1": "done", "A2": "done", "B1": "resume", "B2": "resume"}
    assert (tmp_path / "run/b/seed-1/checkpoint").exists()
    calls()
    assert run_it(path) == []
    assert [call.split()[:3] for call in calls()] == [[f"b/seed-{seed}", "fit", "True"] for seed in (1, 2)]


@pytest.mark.usefixtures("fake")
def test_settings_that_are_edited_while_a_run_goes_on_are_not_taken_for_its_own(tmp_path):
    path = write_comparison(tmp_path, {"A": None}, seeds=[1])
    before = (tmp_path / "common.yaml").read_text()
    behave(a={"seconds": 60})
    (problem,) = edit_during(tmp_path / "common.yaml", "epochs: 1", "epochs: 9")
    assert problem.startswith("A, seed 1: its settings, or a file that they name, were changed while it ran; ")
    (tmp_path / "common.yaml").write_text(before)
    assert states(path) == {"A1": "stale"}
    behave()
    assert run_it(path) == []
    assert states(path) == {"A1": "done"}


@pytest.mark.usefixtures("fake")
def test_other_questions_while_a_run_goes_on_cost_no_training(tmp_path):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    behave(a={"seconds": 60})
    (problem,) = edit_during(tmp_path / "asked.yaml", "prompts.jsonl", "others.jsonl")
    assert problem.startswith(
        "A, seed 1: what it is asked was changed while it ran: the same command evaluates it, and"
    )
    assert states(path) == {"A1": "test", "B1": "done"}
    calls()
    assert run_it(path) == []
    assert [call.split()[:2] for call in calls()] == [["a/seed-1", "test"]]
    assert states(path) == {"A1": "done", "B1": "done"}


@pytest.mark.usefixtures("fake")
def test_a_run_that_was_started_by_hand_is_not_thrown_away(tmp_path):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    by_hand = tmp_path / "run/b/seed-1/summary.json"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_text("{}")
    assert states(path) == {"A1": "new", "B1": "foreign"}
    with pytest.raises(StoreError, match=r"b/seed-1: finished, but not started by this comparison.*: move it away"):
        run_it(path)
    assert calls() == []
    assert by_hand.exists()


@pytest.mark.usefixtures("fake")
def test_runs_that_wait_begin_with_the_settings_of_then(tmp_path):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    behave(a={"seconds": 60})
    (problem,) = edit_during(tmp_path / "common.yaml", "epochs: 1", "epochs: 9")
    assert problem.startswith("A, seed 1: its settings, or a file that they name, were changed while it ran; ")
    assert states(path) == {"A1": "stale", "B1": "done"}


@pytest.mark.usefixtures("fake")
def test_a_file_of_one_method_that_cannot_be_read_costs_no_other_its_training(tmp_path):
    (tmp_path / "b.yaml").write_text("loop: {epochs: 2}")
    path = write_comparison(tmp_path, {"A": None, "B": str(tmp_path / "b.yaml")}, seeds=[1])
    behave(a={"seconds": 60})
    (problem,) = edit_during(tmp_path / "b.yaml", "2}", "2")
    assert problem.startswith(
        "B, seed 1: its settings, or a file that they name, cannot be read now, to tell whether they were changed while"
        " it ran: the same command evaluates it again, and trains nothing again; "
    )
    (tmp_path / "b.yaml").write_text("loop: {epochs: 2}")
    assert states(path) == {"A1": "done", "B1": "test"}


@pytest.mark.usefixtures("fake")
def test_rows_that_cannot_be_read_when_a_run_ends_do_not_stop_the_others(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    path = write_comparison(tmp_path, METHODS, seeds=[1], set={"data.custom": str(tmp_path / "rows.jsonl")})
    comparison, runs = made(path)

    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.name == "rows.jsonl":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return is_file(path)

    with lock(comparison.run_dir) as held, monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        problems = run_all(comparison, list(runs.values()), held)
    assert ["cannot be read now" in problem for problem in problems] == [True, True]
    assert states(path) == {"A1": "test", "B1": "test"}


@pytest.mark.usefixtures("fake")
def test_answers_from_before_a_stop_are_not_taken_for_answers_to_other_questions(tmp_path):
    path = write_comparison(tmp_path, {"A": None}, seeds=[1])
    run = made(path)[1]["A", 1]
    run.evaluation.parent.mkdir(parents=True)
    run.evaluation.write_text("{}")
    run.file("training")  # stopped once it had answered, before its summary
    write_comparison(tmp_path, {"A": None}, seeds=[1], set={"loop.evaluation.batch_size": 3})
    behave(a={"answers": False})
    (problem,) = run_it(path)
    assert "it ended without summary.json or evaluation.json" in problem
    assert states(path) == {"A1": "test"}


@pytest.mark.usefixtures("fake")
def test_numbers_of_other_questions_are_not_taken_for_those_of_now(tmp_path):
    path = write_comparison(tmp_path, {"A": None}, seeds=[1])
    run_it(path)
    other = write_comparison(tmp_path, {"A": None}, seeds=[1], set={"loop.evaluation.batch_size": 3})
    run = made(other)[1]["A", 1]
    run.file("training")  # as a run is begun, which then answers and is killed before it is filed
    write_comparison(tmp_path, {"A": None}, seeds=[1])
    assert states(path) == {"A1": "test"}


@pytest.mark.usefixtures("fake")
def test_a_run_that_ends_while_the_comparison_is_stopped_is_done(tmp_path):
    path = write_comparison(tmp_path, METHODS, jobs=2)
    behave(a={"seconds": 60}, b={"seconds": 60, "deaf": True})
    timer = threading.Thread(target=interrupt_when, args=(tmp_path / "run/b/seed-1/pid", signal.SIGTERM))
    timer.start()
    with pytest.raises(Stopped):
        run_it(path)
    timer.join()
    assert states(path)["A1"] == "resume"
    assert states(path)["B1"] == "done"


KILLED = """
import pathlib, sys
from made_runs import made
from toss_lightning.compare.running import lock, run_all
from toss_lightning.compare.runs import Run
Run.command = lambda run: [sys.executable, "fake.py", "fit", str(run.directory)]
comparison, runs = made(pathlib.Path("compare.yaml"))
with lock(comparison.run_dir) as held:
    run_all(comparison, list(runs.values()), held)
"""


@pytest.mark.usefixtures("fake")
def test_a_killed_comparison_goes_on_once_its_runs_have_ended(tmp_path):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    behave(b={"seconds": 60})
    here = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    pid = tmp_path / "run/b/seed-1/pid"
    with subprocess.Popen([sys.executable, "-c", KILLED], env=environment) as process:
        wait_until(lambda: pid.exists() and bool(pid.read_text()))
        process.kill()
    # its child lives on, and nothing else may write where it does
    with pytest.raises(StoreError, match="runs of a comparison are going on there"):
        run_it(path)
    os.kill(int(pid.read_text()), signal.SIGTERM)
    wait_until((tmp_path / "run/b/seed-1/checkpoint").exists)
    wait_until(lambda: is_free(tmp_path / "run"))
    calls()
    assert run_it(path) == []
    assert [call.split()[:3] for call in calls()] == [["b/seed-1", "fit", "True"]]


def is_free(directory: Path) -> bool:
    """No run holds the lock of a comparison."""
    try:
        with lock(directory):
            return True
    except StoreError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    """Looks at something again and again, for half a minute."""
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def interrupt_when(file: Path, signum: int) -> None:
    """Sends this process a signal when a file is there and the last run had time to begin."""
    wait_until(file.exists)
    time.sleep(1.0)
    os.kill(os.getpid(), signum)


@pytest.mark.usefixtures("fake")
def test_the_command_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    path = write_comparison(tmp_path, METHODS)

    def stop(*_: object) -> list[str]:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("toss_lightning.cli_compare.run_all", stop)
    assert main(["compare", str(path)]) == 143
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.usefixtures("fake")
def test_two_comparisons_do_not_share_a_directory(tmp_path):
    path = write_comparison(tmp_path, METHODS)
    with lock(tmp_path / "run"), pytest.raises(StoreError, match="runs of a comparison are going on there"):
        run_it(path)
    assert calls() == []
    assert run_it(path) == []


@pytest.mark.usefixtures("fake")
def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run_it(write_comparison(tmp_path, METHODS, seeds=[1])) == []
    assert len(calls()) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        f"WARNING: {tmp_path}/run: this file system has no locks (No locks available): nothing keeps a second"
        " comparison from working there at the same time"
    )


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    path = write_comparison(tmp_path, METHODS)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StoreError, match=r"run: cannot be written \("):
        run_it(path)
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("a file")
    with pytest.raises(StoreError, match=r"run/a/seed-1: cannot be written \("):
        run_it(path)


def test_a_failure_is_exit_code_1_and_the_others_are_reported(tmp_path, capsys, monkeypatch):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    finish(made(path)[1]["B", 1], [measure("harmful compliance", [0, 0, 1], [1, 1, 1])])
    monkeypatch.setattr("toss_lightning.cli_compare.run_all", lambda *_: ["A, seed 1: exit code 1; log ends in:\n  oh"])
    assert main(["compare", str(path)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-3:] == [
        "A, seed 1: exit code 1; log ends in:",
        "  oh",
        "1 of 2 runs failed; the same command tries them again",
    ]
    assert "Not there yet: A, seed 1." in said.out
    assert main(["compare", str(path), "--report"]) == 0
    assert "B against base model" in (tmp_path / "run/compare.md").read_text()


def test_a_judge_that_failed_is_named_in_the_report(tmp_path, monkeypatch):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    runs = made(path)[1]
    by_keywords, by_guard = (
        {"name": "harmful compliance", "base": [0, 0, 1], "target": [1, 0, 1], "judge": judge} for judge in ("K", "G")
    )
    finish(runs["A", 1], [measure(**by_keywords), measure(**by_guard)])
    finish(runs["B", 1], [measure(**by_keywords)])
    content = json.loads(runs["B", 1].evaluation.read_text()) | {"failed_judges": {"G": "out of memory"}}
    runs["B", 1].evaluation.write_text(json.dumps(content))
    runs["B", 1].file("training", "unjudged")
    assert main(["compare", str(path), "--report"]) == 0
    page = (tmp_path / "run/compare.md").read_text()
    assert "B: seed 1: G has not judged: out of memory." in page
    measures = {one["judge"]: one for one in json.loads((tmp_path / "run/compare.json").read_text())["measures"]}
    assert measures["K"]["models"].keys() == {"base model", "A", "B"}
    assert measures["G"]["models"].keys() == {"base model", "A"}


def test_where_all_failed_it_says_how(tmp_path, capsys, monkeypatch):
    path = write_comparison(tmp_path, METHODS, seeds=[1])
    monkeypatch.setattr("toss_lightning.cli_compare.run_all", lambda *_: ["A, seed 1: oh", "B, seed 1: no"])
    assert main(["compare", str(path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "A, seed 1: oh",
        "B, seed 1: no",
        "2 of 2 runs failed; the same command tries them again",
    ]


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    path = write_comparison(tmp_path, METHODS)
    assert main(["compare", str(path), "--report"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/run: no run is done, so there is nothing to compare\n"
