"""The file of a comparison: what it means, and one line with the key for what cannot work."""

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from made_runs import write_comparison

from toss_lightning.cli import main
from toss_lightning.cli_compare import HELP
from toss_lightning.compare.spec import KEYS, load_comparison
from toss_lightning.config_files import configs_directory

pytestmark = pytest.mark.usefixtures("somewhere")
ROOT = Path(__file__).parent.parent.parent
DEMO = configs_directory() / "compare" / "demo.yaml"
TWO = {"plain SFT": "methods/sft", "TOSS": None}


def failed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["compare", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_the_demo_names_every_key_and_is_a_comparison():
    content = yaml.safe_load(DEMO.read_text())
    assert tuple(content) == (
        *("run_dir", "configs", "evaluation", "set", "seeds", "jobs", "threads", "gpus"),
        *("methods", "baseline", "oracle", "against", "win_rate", "plot"),
    )
    assert set(content) == set(KEYS)
    demo = load_comparison(DEMO)
    assert [one.slug for one in demo.methods] == ["plain-sft", "toss", "toss-safegrad"]
    assert (demo.jobs, demo.threads, demo.gpus, demo.plot) == (1, os.cpu_count(), (), {})


def test_a_method_is_a_name_a_list_a_mapping_or_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("loop: {epochs: 3}")
    methods = {
        "one": "methods/sft",
        "two": ["methods/sft", str(tmp_path / "mine.yaml")],
        "three": {"configs": "methods/spf", "set": {"model.correction.k": 2}},
        "four": {"set": {"loop.epochs": 2}},
        "five": None,
    }
    found = load_comparison(write_comparison(tmp_path, methods)).methods
    assert [[path.stem for path in one.configs] for one in found] == [["sft"], ["sft", "mine"], ["spf"], [], []]
    assert [one.set for one in found] == [{}, {}, {"model.correction.k": 2}, {"loop.epochs": 2}, {}]


def test_options_stand_in_place_of_keys(tmp_path, capsys):
    path = str(write_comparison(tmp_path, TWO, threads=3))
    assert main(["compare", path, "--dry_run", "--seeds", "[7]", "--run_dir=other"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "plain SFT, seed 7: to run"
    assert said[1].strip().startswith("OMP_NUM_THREADS=3 ")
    assert "--run_dir=other/plain-sft/seed-7" in said[1]
    assert len(said) == 4
    assert not Path("other").exists()
    assert failed(capsys, path, "--seeds", "[1, 1]") == "--seeds: 1 stands twice: leave one out"
    assert failed(capsys, path, "--seeds", "[1") == "--seeds: [1 is not a value (is a bracket missing?)"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sedes": [1]}, "sedes: no such key; did you mean seeds?"),
        (
            {"methods": {"a": "methods/sfft"}},
            "methods.a: methods/sfft: no such file; did you mean configs/methods/sft.y",
        ),
        ({"methods": {"a": {"config": "methods/sft"}}}, "methods.a.config: no such key; did you mean configs?"),
        (
            {"methods": {"a": {"set": {"loop": {"epochs": 1}}}}},
            "methods.a.set.loop: write the whole key, such as loop.epochs",
        ),
        ({"methods": {"a": 3}}, "methods.a: expected names of configuration files, got 3"),
        ({"methods": []}, "methods: nothing there: give names, each with its configuration"),
        ({"methods": ["methods/sft"]}, "methods: expected names, each with its configuration, got ['methods/sft']"),
        ({"methods": {"A b": None, "a-B": None}}, "methods.a-B: would share the directory a-b with 'A b': rename one"),
        ({"methods": {"++": None}}, "methods.++: its directory needs another name"),
        ({"methods": {"logs": None}}, "methods.logs: its directory needs another name"),
        ({"methods": {"Base": None}}, "methods.Base: that is what the model before training is called"),
        ({"methods": {"a": "evaluation/demo"}}, "methods.a: "),
        (
            {"methods": {"a": {"set": {"loop.evaluation.batch_size": 2}}}},
            "methods.a.set: has loop.evaluation, which all",
        ),
        (
            {"methods": {"a": {"set": {"loop.plan": ["utility"]}}}, "baseline": "a"},
            "methods.a.set.loop.plan: a plan with",
        ),
        ({"baseline": "TOS"}, "baseline: 'TOS' is none of the methods; did you mean 'TOSS'?"),
        ({"against": ["TOSS", "TOS"]}, "against: 'TOS' is none of the methods; did you mean 'TOSS'?"),
        ({"oracle": "TOS"}, "oracle: 'TOS' is none of the methods; did you mean 'TOSS'?"),
        ({"oracle": "plain SFT"}, "oracle: 'plain SFT' is the baseline, to which it has no gap: name another, or"),
        ({"baseline": None}, "baseline: nothing there: name the method"),
        ({"seeds": []}, "seeds: nothing there: give at least one, such as [1, 2, 3]"),
        ({"seeds": [1, "x"]}, "seeds: 'x' is no seed: give whole numbers"),
        ({"seeds": [True]}, "seeds: True is no seed"),
        ({"jobs": 0}, "jobs: 0: give a whole number of 1 or more"),
        ({"threads": "two"}, "threads: 'two': give a whole number"),
        ({"gpus": [0.5]}, "gpus: 0.5 is no GPU: give numbers, such as [0, 1]"),
        ({"plot": {"z": "a"}}, "plot.z: no such key; there is x, y"),
        ({"set": {"run_dir": "x"}}, "set.run_dir: the comparison sets it for each run: leave it out"),
        (
            {"set": {"data.since": date(2024, 5, 1)}},
            "set.data.since: 2024-05-01 holds what is no text, number, list or mapping, such as a date: put it in",
        ),
        (
            {"methods": {"a": {"set": {"data.custom": [{"since": date(2024, 5, 1)}]}}}},
            "methods.a.set.data.custom: [{'since': datetime.date(2024, 5, 1)}] holds what is no text, number, list or",
        ),
        ({"set": ["loop.epochs=1"]}, "set: expected keys and values, such as {loop.epochs: 1}, got"),
        ({"evaluation": None}, "evaluation: no prompts: name a file with loop.evaluation, such as evaluation/demo"),
        ({"evaluation": "nope"}, "evaluation: nope: no such file; give the path of a YAML file"),
        ({"run_dir": 3}, "run_dir: 3 is no path"),
    ],
)
def test_bad_input_is_one_line_with_the_key(tmp_path, capsys, keys, said):
    if "methods" in keys and keys["methods"] and "baseline" not in keys:
        keys = {**keys, "baseline": next(iter(keys["methods"]))}
    path = write_comparison(tmp_path, **{"methods": {"plain SFT": "methods/sft", "TOSS": None}, **keys})
    assert failed(capsys, str(path)).startswith(f"{path}: {said}")


def test_a_key_that_stands_twice_is_not_lost(tmp_path, capsys):
    path = write_comparison(tmp_path, TWO)
    path.write_text(path.read_text().replace("  TOSS:", "  plain SFT:"))
    assert failed(capsys, str(path)) == (
        f"{path}: methods.plain SFT: stands twice, and only the last one would count: rename or remove one"
    )


def test_bad_commands(tmp_path, capsys):
    path = str(write_comparison(tmp_path, TWO))
    assert failed(capsys).startswith("toss compare: no file: give one YAML file")
    assert failed(capsys, path, path).startswith("toss compare: 2 files (")
    assert failed(capsys, path, "--dryrun") == "toss compare: no option --dryrun; did you mean --dry_run?"
    assert failed(capsys, path, "--jobs") == "--jobs: needs a value"
    assert failed(capsys, "compare/dem").startswith(
        "toss compare compare/dem: no such file; did you mean configs/compare/"
    )
    Path("broken.yaml").write_text("methods: [")
    assert failed(capsys, "broken.yaml").startswith("broken.yaml:1: not valid YAML")


def test_a_plan_without_a_target_is_refused(tmp_path, capsys):
    path = write_comparison(tmp_path, TWO)
    (tmp_path / "common.yaml").write_text("loop: {plan: [utility]}")
    assert failed(capsys, str(path)).startswith("methods.TOSS: its plan ['utility'] has no step target")


def test_methods_that_differ_in_more_than_the_method_are_pointed_out(capsys):
    assert main(["compare", str(DEMO), "--dry_run", "--methods", "{a: methods/sft, b: toss}", "--baseline=a"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "note: methods differ in model.optim.lr: 0.0005 in a; 1e-05 in b" in said
    assert main(["compare", str(DEMO), "--dry_run"]) == 0
    assert "note" not in capsys.readouterr().out


def test_without_a_run_nothing_loads_torch(tmp_path):
    program = (
        "import sys; from toss_lightning.cli import main\n"
        f"for args in ['--help'], [{str(DEMO)!r}, '--dry_run']: assert main(['compare', *args]) == 0\n"
        f"for args in [], ['nope'], [{str(DEMO)!r}, '--seeds', '[]']: assert main(['compare', *args]) == 2\n"
        "sys.exit('loaded torch' if {'torch', 'numpy', 'lightning'} & {*sys.modules} else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert HELP in done.stdout
    assert "--loop.plan=[utility, degraded, score, select, target, test]" in done.stdout
