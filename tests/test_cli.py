"""The command line: its three names, configurations that overlay, classes swapped, runs that repeat and resume."""

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import programs
import pytest
import yaml
from runs import artifacts
from tiny import some_pairs, write_rows

from toss_lightning import __version__, cli, gradients, selection
from toss_lightning.cli import HELP, main
from toss_lightning.cli_args import ALONE
from toss_lightning.methods import METHODS, TITLES

pytestmark = pytest.mark.usefixtures("somewhere")

ROOT = Path(__file__).parent.parent
SELECTIONS = [name for name in selection.__all__ if name in TITLES]
CORRECTIONS = [name for name in gradients.__all__ if name in TITLES]
MINE = """
import torch
from lightning.pytorch import Callback, Trainer
from toss_lightning.data import TossDataModule
from toss_lightning.loops import TossProLoop
from toss_lightning.models import WeightedLoraModule
from toss_lightning.selection import GlobalTopFraction

class MySelection(GlobalTopFraction):
    def __init__(self, discard: float = 0.1, flavour: str = "plain") -> None:
        super().__init__(discard)
        print("my selection:", discard, flavour)

class MyModule(WeightedLoraModule):
    def __init__(self, size: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        print("my module:", size, self.lora.r)

class MyData(TossDataModule):
    def __init__(self, size: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        print("my data:", size, self.batch_size)

class MyLoop(TossProLoop):
    def __init__(self, trainer: Trainer, size: int = 1, **kwargs) -> None:
        super().__init__(trainer, **kwargs)
        print("my loop:", size, self.epochs)

class Stop(Callback):
    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt
"""

SLOW = """
import time
from pathlib import Path
from lightning.pytorch import Callback

class Slow(Callback):
    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step >= 2:
            Path("training").touch()
            time.sleep(0.5)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments that would have been parsed and run."""
    from toss_lightning import lightning_cli

    calls: list[list[str]] = []
    monkeypatch.setattr(lightning_cli, "run", lambda args: calls.append(list(args)))
    return calls


@pytest.fixture
def tiny_config(tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> str:
    """A file that runs TOSS on the tiny model."""
    config = {
        "model": {
            "base": {"path": tiny_model, "quantization": "none"},
            "lora": {"r": 4},
            "optim": {"lr": 1e-2},
        },
        "data": {**tiny_sets, "batch_size": 4, "max_tokens": 40},
        "loop": {"epochs": 1},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False},
        "checkpoint_every": 1,
    }
    path = tmp_path / "tiny_toss.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *args: str, verb: str = "fit") -> dict:
    """The resolved configuration."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([verb, *args, "--print_config"])
    assert done.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> str:
    capsys.readouterr()
    assert main(args) == code
    *progress, error = capsys.readouterr().err.splitlines()
    assert all("/s]" in line for line in progress if line)
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


# --- three names for one thing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[str(ROOT / "cli.py")], ["-m", "toss_lightning"], ["-c", "import sys; from {} import {} as f; sys.exit(f())"]],
)
def test_script_module_and_console_script_are_one(command):
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["toss"]
    command = [part.format(*target.split(":")) for part in command]

    def output(*args: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command, *args], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    assert output("--version") == (0, f"{__version__}\n")
    assert output("--help") == (0, f"{HELP}\n")
    assert output("fitt") == (2, "error: unknown verb 'fitt'; did you mean 'fit'?\n")


def test_the_console_script_is_main():
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["toss"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_help_loads_no_torch():
    program = (
        "import sys; from toss_lightning.cli import main\n"
        "for args in ['-h'], ['--version'], ['fit', '--help'], ['validate', '-h'], ['fitt'], []: main(args)\n"
        "for args in ['fit', '--config', 'nope'], ['fit', '--ckpt_path', 'last']: assert main(args) == 2\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy', 'jsonargparse'} & {*sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


def test_help_names_only_keys_that_exist(capsys):
    main(["fit", "--help"])
    keys = [
        word.lstrip("-")
        for line in capsys.readouterr().out.splitlines()
        for word in line.split()[:1]
        if word.startswith("--") and "help" not in word
    ]
    resolved = printed(capsys)
    for key in keys:
        place = resolved
        for part in key.split("."):
            if key not in ("config", "print_config", ALONE.removeprefix("--")):
                place = place.get("init_args", place)[part]
    assert len(keys) > 15


def test_help_names_every_verb_and_what_is_most_often_needed(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  ") and line.split()[0] != "toss"] == [
        "fit",
        "score",
        "select",
        "test",
        "validate",
        "compare",
        "report",
        "methods",
    ]
    for verb in ("fit", "score", "select", "validate"):
        assert main([verb, "--help"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: toss {verb} ")
        for option in ("--ckpt_path FILE|last|auto", "--loop.rounds", "--loop.scores_from", "--loop.selection_from"):
            assert option in said
        assert "promote, promotion, refit, stop_early" in said
        for plug_in in ("--data.safety", "--data.mixture SafeInstr", "--model.correction SPF|SafeGrad|DualSelect"):
            assert plug_in in said
        assert {name for name in TITLES if name != "Everything"} <= {*re.findall(r"\w+", said)}
        assert all(len(line) <= 120 for line in said.splitlines())


def test_help_of_everything_and_of_one_class(capsys, started):
    from toss_lightning.lightning_cli import TossCLI

    for args, word in (
        (["--help-all"], "--trainer.limit_val_batches"),
        (["--loop.help=TossProLoop"], "--loop.reference_epochs"),
        (["--model.help=WeightedLoraModule"], "--model.lora.rslora"),
    ):
        assert main(["fit", *args]) == 0
        with pytest.raises(SystemExit) as done:
            TossCLI(started[-1])
        assert done.value.code in (0, None)
        assert word in capsys.readouterr().out


# --- configurations -------------------------------------------------------------------------------------------------


def test_the_demo_uses_the_bundled_model(capsys):
    config = printed(capsys)
    assert config["model"]["init_args"]["base"]["path"] == "bundled:smollm2-135m-instruct"
    assert config["data"]["init_args"]["custom"] == "sample:custom"


@pytest.mark.parametrize("given", [["--loop.selection.discard=null"], ["--loop.selection.discard", "null"]])
def test_null_reaches_a_class_inside_a_class(capsys, given):
    configs = ["--config=demo", "--config=methods/toss_chain"]
    found = printed(capsys, *configs, *given, "--loop.epochs=3")["loop"]["init_args"]
    selection = found["selection"]
    assert selection["class_path"].endswith("ChainSelection")
    assert selection["init_args"]["discard"] is None
    assert selection["init_args"]["stay"] == "fit"
    assert found["epochs"] == 3


def test_a_run_with_a_null_names_itself_as_any_other(capsys):
    options = ["--loop.selection.discard=null", "--data.custom=nowhere.jsonl"]
    told = failed(capsys, "fit", "--config=demo", "--config=methods/toss_chain", *options, code=1)
    assert told.startswith("nowhere.jsonl: ")


def test_null_within_what_an_option_says(capsys):
    wrapped = {"class_path": "ChainSelection", "init_args": {"discard": None, "threshold": 0.25}}
    given = f"--loop.selection.selection={json.dumps(wrapped)}"
    found = printed(capsys, "--config=demo", "--config=methods/toss_anchor", given)["loop"]["init_args"]["selection"]
    assert found["class_path"].endswith("Anchored")
    assert found["init_args"]["selection"]["class_path"].endswith("ChainSelection")
    assert found["init_args"]["selection"]["init_args"].items() >= wrapped["init_args"].items()


@pytest.mark.parametrize("said", ["null set", "{null: 1", '"null"'])
def test_a_value_that_only_mentions_null_stays_what_it_is(capsys, said):
    assert printed(capsys, f"--data.custom={said}")["data"]["init_args"]["custom"] == said


def test_files_overlay_and_options_win_wherever_they_stand(capsys):
    Path("one.yaml").write_text("loop: {epochs: 3, reference_epochs: 4}\ndata: {custom: x}\nmodel: {lora: {r: 2}}")
    Path("two.yaml").write_text(
        "loop: {class_path: TossProLoop, init_args: {epochs: 5}}\n"
        "data: {class_path: toss_lightning.data.TossDataModule, init_args: {utility: y}}\n"
        "model: {init_args: {lora: {alpha: 7}}}"
    )
    for order in (
        ["--config", "one.yaml", "--config=two.yaml", "--model.lora.dropout", "0.5", "--loop.reference_epochs=6"],
        ["--model.lora.dropout=0.5", "-c", "one.yaml", "--loop.reference_epochs", "6", "--config=two.yaml"],
    ):
        config = printed(capsys, *order)
        assert config["loop"]["init_args"]["epochs"] == 5
        assert config["loop"]["init_args"]["reference_epochs"] == 6
        assert config["data"]["init_args"]["custom"] == "x"
        assert config["data"]["init_args"]["utility"] == "y"
        assert {"r": 2, "alpha": 7, "dropout": 0.5}.items() <= config["model"]["init_args"]["lora"].items()


def test_a_printed_configuration_is_a_configuration(capsys):
    args = [
        "--config",
        "toss",
        "--model.lora.r=3",
        "--loop.selection=PerRowTopFraction",
        "--data.custom={path: x, rows: 3}",
    ]
    first = printed(capsys, *args)
    assert first["run_dir"] is None  # or every run of the file would write into the same directory
    Path("resolved.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", "resolved.yaml") == first
    assert printed(capsys, "--config", "resolved.yaml", "--model.lora.r=4")["model"]["init_args"]["lora"]["r"] == 4


@pytest.mark.parametrize("name", ["toss", "toss.yaml", "configs/toss.yaml", "configs/toss"])
def test_shipped_configs_are_found_from_anywhere(capsys, name):
    assert printed(capsys, "--config", name)["seed_everything"] == 42


def test_a_file_of_the_user_comes_before_a_shipped_one(capsys):
    Path("toss.yaml").write_text("seed_everything: 7")
    assert printed(capsys, "--config", "toss.yaml")["seed_everything"] == 7


def test_the_selection_is_swapped_by_its_bare_name(capsys):
    options = ["--loop.selection", "PerRowTopFraction", "--loop.selection.discard", "0.2"]
    chosen = printed(capsys, *options)["loop"]["init_args"]["selection"]
    assert chosen["class_path"] == "toss_lightning.selection.PerRowTopFraction"
    assert chosen["init_args"]["discard"] == 0.2
    # and without naming it, the default one takes the option
    Path("mine.yaml").write_text("data: {custom: x}")
    chosen = printed(capsys, "--config=mine.yaml", "--loop.selection.discard=0.3")["loop"]["init_args"]["selection"]
    assert chosen["class_path"] == "toss_lightning.selection.GlobalTopFraction"
    assert chosen["init_args"]["discard"] == 0.3


def test_every_selection_is_named_by_its_bare_name_over_the_arguments_of_another(capsys):
    for name in SELECTIONS:
        Path("mine.yaml").write_text(f"loop: {{selection: {{class_path: {name}}}}}")
        chosen = printed(capsys, "--config=toss", "--config=mine.yaml")["loop"]["init_args"]["selection"]
        assert chosen["class_path"] == f"toss_lightning.selection.{name}"
        # what it takes, and nothing that the other has left
        takes = inspect.signature(getattr(selection, name)).parameters
        assert chosen.get("init_args", {}).keys() == takes.keys()
        assert capsys.readouterr().err == ""


def test_a_selection_inside_another_is_named_the_same_way(capsys):
    Path("mine.yaml").write_text(
        "loop: {selection: {class_path: Anchored, init_args: {selection: {class_path: TossRows}, weight: 2}}}"
    )
    outer = printed(capsys, "--config=toss", "--config=methods/toss_anchor", "--config=mine.yaml")
    outer = outer["loop"]["init_args"]["selection"]["init_args"]
    assert (outer["weight"], outer["where"]) == (2, "masked")
    assert outer["selection"]["class_path"] == "toss_lightning.selection.TossRows"
    assert "protect_end" not in outer["selection"]["init_args"]
    options = ["--config=methods/toss_anchor", "--loop.selection.selection.discard=0.3"]
    inner = printed(capsys, "--config=toss", *options)["loop"]["init_args"]["selection"]["init_args"]["selection"]
    assert inner["class_path"] == "toss_lightning.selection.GlobalTopFraction"
    assert inner["init_args"]["discard"] == 0.3


def test_corrections_and_mixtures_are_named_by_their_bare_names(capsys):
    for name in CORRECTIONS:
        Path("mine.yaml").write_text(f"model: {{correction: {{class_path: {name}}}}}")
        # over others, whose arguments do not stay
        others = [f"--config=methods/{other}" for other in ("dualselect", "safegrad", "spf")]
        found = printed(capsys, "--config=toss", *others, "--config=mine.yaml")["model"]["init_args"]["correction"]
        assert found["class_path"] == f"toss_lightning.gradients.{name}"
        assert found["init_args"].keys() == inspect.signature(getattr(gradients, name)).parameters.keys()
        assert capsys.readouterr().err == ""
    options = ["--model.correction=SPF", "--model.correction.k=2", "--data.mixture=SafeInstr", "--data.mixture.rows=3"]
    config = printed(capsys, "--config=toss", *options)
    assert config["model"]["init_args"]["correction"]["init_args"]["k"] == 2
    assert config["data"]["init_args"]["mixture"]["class_path"].endswith(".SafeInstr")
    assert config["data"]["init_args"]["mixture"]["init_args"] == {"rows": 3, "share": None}
    off = printed(capsys, "--config=toss", "--config=methods/spf", "--model.correction=null")
    assert off["model"]["init_args"]["correction"] is None


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("where", ["options", "file"])
def test_classes_of_the_user(capsys, tiny_config, where):
    if where == "options":
        args = [
            *("--model=mine.MyModule", "--model.size", "2", "--data", "mine.MyData", "--data.size=3"),
            *("--loop=mine.MyLoop", "--loop.size=4", "--loop.selection", "mine.MySelection"),
            *("--loop.selection.flavour", "sour", "--loop.selection.discard=0.3"),
        ]
    else:
        Path("mine.yaml").write_text(
            "model: {class_path: mine.MyModule, init_args: {size: 2}}\n"
            "data: {class_path: mine.MyData, init_args: {size: 3}}\n"
            "loop:\n  class_path: mine.MyLoop\n  init_args:\n    size: 4\n"
            "    selection: {class_path: mine.MySelection, init_args: {discard: 0.3, flavour: sour}}\n"
        )
        args = ["--config", "mine.yaml"]
    assert main(["fit", "--config", tiny_config, "--run_dir", "run", *args]) == 0
    said = capsys.readouterr().out
    for line in ("my module: 2 4", "my data: 3 4", "my loop: 4 1", "my selection: 0.3 sour"):
        assert line in said
    assert Path("run/adapters/target/adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*rows stand in both")  # the tiny model reads every word as <unk>
@pytest.mark.parametrize("method", [one.config for one in METHODS if one.sets == ("safety",)])
def test_the_demo_has_what_a_method_draws_on(capsys, tiny_model, method):
    options = ["--model.base.path", tiny_model, "--model.base.quantization=none", "--data.max_length=100000"]
    options += ["--loop.epochs=1", "--trainer.enable_progress_bar=false", "--trainer.logger=false", "--run_dir=run"]
    assert main(["fit", "--config=demo", f"--config={method}", *options]) == 0
    said = capsys.readouterr().out
    table = said[said.index("Data") : said.index("Plan:")]
    assert re.search(r"safety +│ +24 │", table)
    assert max(len(line) for line in table.splitlines()) <= 80


# --- runs -----------------------------------------------------------------------------------------------------------


def adapters(run_dir: str) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in Path(run_dir).glob("adapters/*/*.safetensors")}


def checkpoints(run_dir: str) -> list[Path]:
    """Oldest first, as their names sort."""
    return sorted(Path(run_dir).glob("checkpoints/*.ckpt"))


def newest_checkpoint(run_dir: str) -> Path:
    return checkpoints(run_dir)[-1]


def test_the_saved_configuration_repeats_the_run(capsys, tiny_config, monkeypatch):
    assert main(["fit", "--config", tiny_config, "--model.lora.r=2"]) == 0
    run_dir = os.environ["TOSS_RUN_DIR"]
    assert run_dir.startswith("runs/tiny_toss-")
    first = adapters(run_dir)
    assert set(first) == {"utility", "degraded", "target"}
    saved = yaml.safe_load(Path(run_dir, "config.yaml").read_text())
    assert saved["run_dir"] == run_dir
    assert saved["model"]["init_args"]["lora"]["r"] == 2

    monkeypatch.delenv("TOSS_RUN_DIR")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    for path in Path(run_dir).glob("adapters/*/*.safetensors"):
        path.unlink()
    capsys.readouterr()
    assert main(["fit", "--config", f"{run_dir}/config.yaml"]) == 0
    assert "used as it is" in capsys.readouterr().out
    assert adapters(run_dir) == first
    assert [str(path) for path in Path("runs").iterdir()] == [run_dir]
    assert yaml.safe_load(Path(run_dir, "config.yaml").read_text()) == saved


def test_a_safety_set_that_no_method_draws_on_changes_nothing(tiny_config, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", some_pairs(6, start=3))
    assert main(["fit", "--config", tiny_config, "--run_dir", "without"]) == 0
    assert main(["fit", "--config", tiny_config, "--run_dir", "with", "--data.safety", more]) == 0
    assert artifacts(Path("with")) == artifacts(Path("without"))
    sets = [one["set"] for one in json.loads(Path("with/summary.json").read_text())["data"]]
    assert sets == ["custom", "utility", "harmful", "safety", "utility_val", "harmful_val"]


def test_resuming(capsys, tiny_config, monkeypatch):
    fit = ["fit", "--config", tiny_config]
    assert failed(capsys, *fit, "--ckpt_path", "last", code=2) == (
        "--ckpt_path last: no run of tiny_toss in runs/ has a checkpoint: name it with --run_dir"
    )
    assert failed(capsys, *fit, "--ckpt_path=last", "--run_dir=runs/empty", code=2) == (
        "--ckpt_path last: runs/empty has no checkpoint: leave it out to start from the beginning"
    )
    assert failed(capsys, *fit, "--ckpt_path", "runs/none.ckpt", code=2) == (
        "--ckpt_path runs/none.ckpt: no such file; give a .ckpt file, last, or auto"
    )
    assert not Path("runs").exists()

    for name in (
        "runs/tiny_toss-20260101-000000",
        "runs/tiny_toss-20250101-000000",
        "runs/tiny_toss-other-20260101-000000",
    ):
        assert main([*fit, "--run_dir", name, "--trainer.max_steps=4"]) == 0
    # the newest by its checkpoints, whatever the names say
    for age, name in enumerate(
        ("runs/tiny_toss-other-20260101-000000", "runs/tiny_toss-20250101-000000", "runs/tiny_toss-20260101-000000")
    ):
        for path in Path(name).glob("checkpoints/*.ckpt"):
            os.utime(path, (1_700_000_000 - 1000 * age, 1_700_000_000 - 1000 * age))
    monkeypatch.delenv("TOSS_RUN_DIR", raising=False)
    assert main([*fit, "--ckpt_path", "last"]) == 0
    assert set(adapters("runs/tiny_toss-20250101-000000")) == {"utility", "degraded", "target"}
    assert "target" not in adapters("runs/tiny_toss-20260101-000000")
    # the saved file repeats the run from its start
    assert "ckpt_path" not in yaml.safe_load(Path("runs/tiny_toss-20250101-000000/config.yaml").read_text())

    before = Path("runs/tiny_toss-20260101-000000/config.yaml").read_text()
    resume = ["--ckpt_path=last", "--run_dir=runs/tiny_toss-20260101-000000"]
    refused = failed(capsys, *fit, *resume, "--loop.selection.discard=0.3", code=1)
    assert refused.startswith("the checkpoint was made with another loop.selection")
    assert Path("runs/tiny_toss-20260101-000000/config.yaml").read_text() == before

    Path("resume.yaml").write_text("ckpt_path: last")
    assert main([*fit, "--config", "resume.yaml", "--run_dir", "runs/tiny_toss-20260101-000000"]) == 0
    assert adapters("runs/tiny_toss-20260101-000000") == adapters("runs/tiny_toss-20250101-000000")


@pytest.fixture
def undisturbed(tiny_config: str) -> dict[str, bytes]:
    """What a run leaves that was never stopped."""
    assert main(["fit", "--config", tiny_config, "--run_dir", "undisturbed"]) == 0
    return adapters("undisturbed")


def test_a_run_below_the_home_directory_is_found_where_it_was_written(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fit = ["fit", "--config", tiny_config, "--run_dir=~/run", "--loop.plan=[target]"]
    assert main([*fit, "--trainer.max_steps=2"]) == 0
    reached = newest_checkpoint("home/run")
    assert main([*fit, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0
    assert newest_checkpoint("home/run").name > reached.name
    assert main([*fit, f"--ckpt_path=~/run/checkpoints/{reached.name}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"home", "tiny_toss.yaml"}


def test_auto_starts_from_the_beginning_and_later_goes_on(capsys, tiny_config, undisturbed, monkeypatch):
    fit = ["fit", "--config", tiny_config, "--run_dir", "run", "--ckpt_path", "auto"]
    assert main([*fit, "--trainer.max_steps=8"]) == 0
    assert "target" not in adapters("run")
    reached = newest_checkpoint("run").name
    capsys.readouterr()
    assert main(fit) == 0
    assert adapters("run") == undisturbed
    assert newest_checkpoint("run").name > reached
    assert "scoring" not in capsys.readouterr().out
    # of a run that is not named, the newest
    assert main(["fit", "--config", tiny_config, "--ckpt_path=auto", "--trainer.max_steps=4"]) == 0
    named = os.environ["TOSS_RUN_DIR"]
    monkeypatch.delenv("TOSS_RUN_DIR")
    assert main(["fit", "--config", tiny_config, "--ckpt_path=auto"]) == 0
    assert os.environ["TOSS_RUN_DIR"] == named
    assert adapters(named) == undisturbed


def test_a_checkpoint_file_can_be_named(tiny_config, undisturbed):
    fit = ["fit", "--config", tiny_config, "--run_dir", "run"]
    assert main([*fit, "--trainer.max_steps=5"]) == 0
    earlier, newest = checkpoints("run")
    assert main([*fit, "--ckpt_path", str(earlier)]) == 0
    assert adapters("run") == undisturbed
    # what lies behind it is kept, for it belongs to another course of the run
    assert (Path("run/checkpoints/earlier") / newest.name).is_file()


def test_of_damaged_checkpoints(capsys, tiny_config, undisturbed):
    fit = ["fit", "--config", tiny_config, "--run_dir", "run"]
    assert main([*fit, "--trainer.max_steps=5"]) == 0
    newest = newest_checkpoint("run")
    newest.write_bytes(newest.read_bytes()[:-100])
    assert failed(capsys, *fit, "--ckpt_path", str(newest), code=1) == (
        f"--ckpt_path {newest}: the file is damaged (cut short by a crash?): try --ckpt_path last"
    )
    capsys.readouterr()
    assert main([*fit, "--ckpt_path", "last"]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert adapters("run") == undisturbed

    for path in checkpoints("run"):
        path.write_bytes(path.read_bytes()[:1000])
    for wanted in ("last", "auto"):
        error = failed(capsys, *fit, "--ckpt_path", wanted, code=1)
        assert error == "run/checkpoints: none of the 2 checkpoints is whole: start from the beginning"


def test_a_terminal_of_latin_letters_and_names_with_brackets(tiny_config, tmp_path):
    command = [sys.executable, "-m", "toss_lightning", "fit", "--config", tiny_config]
    options = ["--loop.plan=[utility, degraded]", "--run_dir=a[/b]"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, *options], capture_output=True, check=True, cwd=tmp_path, env=environment, text=True
    )
    # it has no arrow
    assert "Plan: utility ? degraded. Everything goes to a[/b]" in done.stdout
    assert "Adapters, scores and summary.json are in a[/b]" in done.stdout


def test_a_configuration_that_is_too_long_for_a_name(capsys):
    assert "no such file" in failed(capsys, "fit", "--config", "a: " + "b" * 300, code=2)


def test_runs_of_one_second_have_directories_of_their_own(tiny_config, monkeypatch):
    stamp = "20260101-000000"
    monkeypatch.setattr(time, "strftime", lambda form: stamp)
    for name in (f"runs/tiny_toss-{stamp}", f"runs/tiny_toss-{stamp}-2"):
        assert main(["fit", "--config", tiny_config, "--trainer.max_steps=4"]) == 0
        assert os.environ.pop("TOSS_RUN_DIR") == name
    for path in Path(name).glob("checkpoints/*.ckpt"):
        os.utime(path, (2_000_000_000, 2_000_000_000))
    assert main(["fit", "--config", tiny_config, "--ckpt_path=last"]) == 0
    assert os.environ["TOSS_RUN_DIR"] == name


def test_a_directory_of_runs_that_lies_nowhere(capsys, tiny_config):
    Path("runs").symlink_to("unplugged/disk")
    assert "cannot be written" in failed(capsys, "fit", "--config", tiny_config, code=1)


def test_a_run_that_never_began_leaves_no_directory(capsys, tiny_config):
    failed(capsys, "fit", "--config", tiny_config, "--trainer.max_epochs=3", code=2)
    assert not Path("runs").exists()


def test_processes_for_further_devices_are_started_with_the_same_arguments(monkeypatch):
    from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

    from toss_lightning import lightning_cli

    seen: list[list[str]] = []
    monkeypatch.setattr(lightning_cli, "run", lambda args: seen.append(_basic_subprocess_cmd()))
    monkeypatch.setattr(sys, "argv", ["toss", "fit", "--config", "toss", "--loop.epochs", "3"])
    assert main() == 0
    assert seen[0][-5:] == ["fit", "--config", "toss", "--loop.epochs", "3"]


def test_validate(capsys, tiny_config):
    fit = ["--config", tiny_config, "--loop.plan", "[target]", "--run_dir", "run"]
    assert main(["fit", *fit]) == 0
    capsys.readouterr()

    def losses(*args: str) -> str:
        assert main(["validate", "--config", tiny_config, *args]) == 0
        said = capsys.readouterr().out
        assert "task_loss" in said
        assert "harmful_loss" in said
        return said

    base = losses("--run_dir", "looked")
    trained = losses("--run_dir", "run", "--ckpt_path", "last")
    assert losses("--run_dir", "looked", "--ckpt_path", str(newest_checkpoint("run"))) == trained
    assert base != trained
    assert not Path("looked/adapters").exists()
    assert Path("run/config-validate.yaml").is_file()
    assert yaml.safe_load(Path("run/config.yaml").read_text())["loop"]["init_args"]["plan"] == ["target"]
    assert failed(capsys, "validate", *fit[:2], "--run_dir=nothing", "--ckpt_path=last", code=2).startswith(
        "--ckpt_path last: nothing has no checkpoint"
    )


@pytest.mark.parametrize("run_dir", ["taken", "taken/below"])
def test_a_run_directory_that_cannot_be_one(capsys, tiny_config, run_dir):
    Path("taken").write_text("mine")
    error = failed(capsys, "fit", "--config", tiny_config, "--run_dir", run_dir, code=1)
    assert error.startswith(f"{run_dir}: cannot be written (")
    assert error.endswith("choose another --run_dir")
    assert Path("taken").read_text() == "mine"


def test_score_once_then_select_and_train_anywhere(capsys, tiny_config):
    score = ["score", "--config", tiny_config, "--loop.rounds=1", "--loop.promote=2", "--run_dir", "scored"]
    assert main(score) == 0
    assert set(adapters("scored")) == {"utility", "degraded", "degraded-1"}
    assert not Path("scored/selection").exists()
    assert "Plan: utility → degraded → score → promote-1 → degraded-1 → score-1." in capsys.readouterr().out

    def masked(*args: str) -> int:
        assert main(["select", "--config", tiny_config, "--run_dir", "scored", *args]) == 0
        assert "response tokens masked" in capsys.readouterr().out
        return json.loads(Path("scored/selection/selection.json").read_text())["masked"]

    assert masked("--loop.selection.discard=0.4") > masked("--loop.selection.discard=0.1") > 0
    fit = ["fit", "--config", tiny_config, "--loop.plan", "[target]", "--run_dir", "trained"]
    assert main([*fit, "--loop.selection_from", "scored/selection"]) == 0
    trained = adapters("trained")
    assert set(trained) == {"target"}
    # the same by way of the scores
    fit = ["fit", "--config", tiny_config, "--loop.plan", "[select, target]", "--run_dir", "again"]
    assert main([*fit, "--loop.scores_from", "scored/scores"]) == 0
    assert adapters("again") == trained
    assert main([*fit[:-1], "first", "--loop.scores_from", "scored/scores", "--loop.scores_round=0"]) == 0
    assert adapters("first") != trained


def test_select_loads_no_model_and_no_data(capsys, tiny_config, monkeypatch):
    assert main(["score", "--config", tiny_config, "--run_dir", "scored"]) == 0
    missing = ["--model.base.path=nowhere", "--data.custom=nothing.jsonl"]
    assert main(["select", "--config", tiny_config, "--run_dir", "scored", *missing]) == 0
    # scores of another run
    other = ["--run_dir", "other", "--loop.scores_from", "scored/scores"]
    assert main(["select", "--config", tiny_config, *other, *missing]) == 0
    assert Path("other/selection/weights.arrow").read_bytes() == Path("scored/selection/weights.arrow").read_bytes()


def test_select_without_a_run_or_without_scores(capsys, tiny_config):
    select = ["select", "--config", tiny_config]
    assert failed(capsys, *select, code=2).startswith("--run_dir: name the run: its scores are selected from")
    assert failed(capsys, *select, "--run_dir=nothing", code=1).startswith("nothing/scores: no token scores here")
    assert failed(capsys, *select, "--run_dir=nothing", "--loop.selection.discard=2", code=2).startswith(
        "loop.selection.discard: 2.0 is not a share"
    )
    assert not Path("nothing").exists()


def test_a_method_that_corrects_gradients_can_be_scored_for(capsys, tiny_config, tmp_path):
    safety = write_rows(tmp_path / "safety.jsonl", some_pairs(3, start=9))
    score = ["score", "--config", tiny_config, "--run_dir", "scored", "--model.correction=SPF"]
    assert main([*score, "--data.safety", safety]) == 0
    assert failed(capsys, *score, code=2).startswith("data.safety: model.correction SPF draws on this set")


def test_score_needs_a_plan_that_scores(capsys, tiny_config):
    error = failed(capsys, "score", "--config", tiny_config, "--loop.plan", "[target]", "--run_dir=run", code=2)
    assert error == "loop.plan: no 'score' step in target: add it"


@pytest.mark.parametrize("verb", ["score", "select", "validate"])
def test_the_saved_configuration_serves_every_verb(capsys, tiny_config, verb):
    assert main(["fit", "--config", tiny_config, "--run_dir", "run"]) == 0
    elsewhere = ["--run_dir=other", "--loop.scores_from=run/scores"] if verb == "select" else []
    assert main([verb, "--config", "run/config.yaml", *elsewhere]) == 0
    assert main(["score", "--config", tiny_config, "--run_dir", "scored"]) == 0
    assert main([verb, "--config", "scored/config.yaml"]) == 0


def test_a_run_that_fails_is_one_line_and_exit_code_1(capsys, tiny_config, tmp_path):
    fit = ["fit", "--config", tiny_config, "--run_dir", "run"]
    assert failed(capsys, *fit, "--data.custom", "nothing.jsonl", code=1).startswith("nothing.jsonl: no such file")
    assert failed(capsys, *fit, "--model.base.path", "./nowhere", code=1).startswith(
        "model.base.path: ./nowhere: no such"
    )
    bad = write_rows(tmp_path / "bad.jsonl", [("w1 w2", "w3")])
    Path(bad).write_text(Path(bad).read_text() + "{broken\n")
    assert failed(capsys, *fit, "--data.custom", bad, code=1).startswith(f"{bad}:2: broken JSON")
    assert failed(capsys, *fit, "--data.harmful=null", code=2).startswith("data.harmful: step 'degraded'")


@pytest.mark.usefixtures("mine")
def test_an_interrupted_run_says_how_to_go_on(capsys, tiny_config, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Lightning would have pytest ignore Ctrl-C from now on
    fit = ["fit", "--config", tiny_config, "--run_dir", "run"]
    assert main([*fit, "--trainer.callbacks+=mine.Stop"]) == 130
    assert "go on with the same command and --ckpt_path auto" in capsys.readouterr().err
    assert main([*fit, "--ckpt_path", "last"]) == 0
    assert "target" in adapters("run")


def test_a_terminated_run_says_so_and_goes_on(tiny_config, undisturbed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = ["-m", "toss_lightning", "fit", "--config", tiny_config, "--run_dir", "run"]
    # every step after the first waits, so that the signal comes in the middle of training
    options = ["--trainer.callbacks+=slow.Slow"]
    Path("slow.py").write_text(SLOW)
    environment["PYTHONPATH"] = str(Path.cwd())
    process = programs.start([*program, *options], Path("out.txt"), Path("err.txt"), environment)
    deadline = time.monotonic() + 120
    while not Path("training").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.join(60)
    said = Path("err.txt").read_text()
    assert process.exitcode == 143, said
    assert said.splitlines()[-1] == (
        "stopped by SIGTERM, with a checkpoint; go on with the same command and --ckpt_path last"
    )
    assert "Traceback" not in said
    assert "target" not in adapters("run")
    assert not list(Path("run").rglob("*.tmp"))
    done = programs.run([*program, "--ckpt_path", "last"], environment)
    assert done.returncode == 0, done.stderr
    assert adapters("run") == undisturbed


@pytest.mark.parametrize("suffix", ["json", "csv", "jsonl", "parquet"])
def test_the_path_of_a_set_stays_a_path(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse would read the file of a set as a list of sources, and the set would be that many copies of it."""
    rows, config = tmp_path / f"rows.{suffix}", tmp_path / "mine.yaml"
    rows.write_text('[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]')
    config.write_text(f"data: {{utility: {rows}}}")
    data = printed(capsys, "--config=toss", f"--config={config}", f"--data.custom={rows}")["data"]["init_args"]
    assert data["custom"] == data["utility"] == str(rows)


@pytest.mark.parametrize(
    ("args", "unbuffered"),
    [
        *((args, unbuffered) for args in (["--help"], ["methods"]) for unbuffered in ("", "1")),
        (["compare", "compare/demo", "--dry_run"], ""),
        (["fit", "--print_config"], "1"),
    ],
)
def test_output_that_nobody_reads_any_more_ends_in_no_traceback(args, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command, settings = [sys.executable, "-m", "toss_lightning", *args], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=settings)
    os.close(writer)
    assert done.returncode == 141
    assert "Error" not in done.stderr


def test_a_pipe_of_something_else_that_breaks_is_an_error(monkeypatch):
    def breaks(argv):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run", breaks)
    with pytest.raises(BrokenPipeError):
        main(["fit"])


def test_without_an_output_at_all():
    command = f"{sys.executable} -m toss_lightning --version >&-"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0
