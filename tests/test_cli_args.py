"""What becomes of the arguments before the parser sees them: which configurations, and which run directory."""

import os
from pathlib import Path

import pytest
import yaml

from toss_lightning.cli import main
from toss_lightning.cli_args import with_configs, with_run_dir
from toss_lightning.config_files import configs_directory
from toss_lightning.errors import ConfigError

pytestmark = pytest.mark.usefixtures("somewhere")


def resolved(*args: str) -> list[str]:
    """What the parser gets of ``toss fit``."""
    return with_run_dir(with_configs(["fit", *args]))


def test_without_config_the_demo_runs_and_says_so(capsys):
    verb, config, run_dir = resolved()
    assert "No --config given: running" in (said := capsys.readouterr().out)
    assert "demo.yaml" in said
    assert verb == "fit"
    assert Path(config.removeprefix("--config=")).samefile(configs_directory() / "demo.yaml")
    assert run_dir.startswith("--run_dir=runs/demo-")


def test_a_last_checkpoint_asked_for_in_a_file():
    Path("resume.yaml").write_text("ckpt_path: last")
    with pytest.raises(ConfigError, match=r"^--ckpt_path last: no run of toss in runs/"):
        resolved("--config=toss", "--config=resume.yaml")


def test_the_run_directory_of_several_processes(monkeypatch):
    fit = ["--config", "toss"]
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        with monkeypatch.context() as context:
            context.setenv(name, "0")
            with pytest.raises(ConfigError, match=r"^--run_dir: name the run"):
                resolved(*fit)
            assert resolved(*fit, "--run_dir", "runs/named")[-2:] == ["--run_dir", "runs/named"]
    # a process that Lightning starts for a further device finds the name and its rank in the environment
    parents = resolved(*fit)[-1]
    assert parents == f"--run_dir={os.environ['TOSS_RUN_DIR']}"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolved(*fit)[-1] == parents


def test_the_configuration_of_a_run_lies_beneath_however_the_run_is_named(monkeypatch):
    run = Path("runs/mine")
    run.mkdir(parents=True)
    for file in (run / "config.yaml", Path("asked.yaml")):
        file.write_text("run_dir: runs/mine")
    Path("config.yaml").write_text("{}")  # of something else
    Path("plain.yaml").write_text("{}")
    beneath = f"--config={run / 'config.yaml'}"
    assert with_configs(["test", "--config=asked.yaml"])[1] == beneath
    assert with_configs(["test", "--config=plain.yaml", "--run_dir", str(run)])[1] == beneath
    monkeypatch.chdir(run)
    assert with_configs(["test", "--config=../../plain.yaml"]) == [
        "test",
        "--config=config.yaml",
        "--config=../../plain.yaml",
        "--run_dir=.",
    ]


def test_the_configuration_of_a_run_below_the_home_directory_lies_beneath(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    own = tmp_path / "home/run/config.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert with_configs(["test", "--run_dir=~/run"])[1] == f"--config={own}"


@pytest.mark.parametrize("option", [["--own_config=false"], ["--own_config", "false"]])
def test_the_configuration_of_a_run_is_left_out_where_that_is_asked_for(option):
    Path("run").mkdir()
    for file in ("run/config.yaml", "asked.yaml"):
        Path(file).write_text("{}")
    test = ["test", "--config=asked.yaml", "--run_dir=run"]
    assert with_configs([*test, *option]) == test
    assert with_configs([*test, "--own_config=true"])[1] == "--config=run/config.yaml"
    with pytest.raises(ConfigError, match="--own_config: 'no': give true or false"):
        with_configs([*test, "--own_config=no"])


def test_an_option_with_a_null_keeps_its_place():
    options = ["--loop.selection", "ChainSelection", "--loop.selection.discard", "null", "--loop.selection.stay=0.5"]
    assert resolved("--config=toss", *options, "--run_dir=run")[2:] == [
        *options[:2],
        '--config={"loop.selection.discard": null}',
        *options[4:],
        "--run_dir=run",
    ]


@pytest.mark.parametrize(
    ("options", "discard"),
    [
        (["--loop.selection.discard", "0.2", "--loop.selection.discard", "null"], None),
        (["--loop.selection.discard=0.2", "--loop.selection.discard=null"], None),
        (["--loop.selection.discard=null", "--loop.selection.discard=0.2"], 0.2),
    ],
)
def test_the_last_of_two_options_wins_though_one_is_null(capsys, options, discard):
    chain = ["--loop.selection", "ChainSelection", "--loop.selection.stay=0.5"]
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config=toss", *chain, *options, "--print_config"])
    assert done.value.code in (0, None)
    selection = yaml.safe_load(capsys.readouterr().out)["loop"]["init_args"]["selection"]
    assert selection["class_path"].endswith("ChainSelection")
    assert (selection["init_args"]["discard"], selection["init_args"]["stay"]) == (discard, 0.5)
