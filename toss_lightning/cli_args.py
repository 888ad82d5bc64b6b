"""What is done to the arguments of a command before the parser sees them; loads no torch."""

import glob
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import yaml

from toss_lightning.config_files import configs_directory, find_config, read_config
from toss_lightning.errors import ConfigError
from toss_lightning.files import user_path

STAMP = f"{'[0-9]' * 8}-{'[0-9]' * 6}*"
"""What stands behind the config's name in a run's: when it began, and a number where two began in one second."""
OWN_CONFIG = "--own_config"
ALONE = f"{OWN_CONFIG}=false"
"""Has ``test`` leave out the configuration of the run, which otherwise lies beneath the files that are given."""


def with_configs(args: Sequence[str]) -> list[str]:
    """Resolves every --config, puts them before all other options, which win, and takes the demo where there is none.

    Raises:
        ConfigError: a file is missing or is not YAML, or --own_config is neither true nor false.
    """
    configs: list[Path] = []
    options: list[str] = []
    alone = False
    rest = iter(args[1:])
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c"):
            value = value if equals else next(rest, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"{name}: needs the path of a YAML file")
            configs.append(find_config(value))
        elif name == OWN_CONFIG:
            value = value if equals else next(rest, "")
            if value not in ("true", "false"):
                raise ConfigError(f"{name}: {value!r}: give true or false")
            alone = value == "false"
        else:
            options.append(arg)
    if not alone and (args[0] == "test" or (args[0] == "select" and not configs)):
        run_dir = _run_dir_of(options, configs)
        own = user_path(run_dir or ".") / "config.yaml"
        if own.is_file():
            configs = [own, *configs]
            # a run directory that one stands in: what its configuration calls it is seen from elsewhere
            options += [] if run_dir else ["--run_dir=."]
        elif run_dir and configs and not only_asks(options):
            print(f"{own} is not there: what is given configures this {args[0]} alone")
    if not configs:
        configs = [configs_directory() / "demo.yaml"]
        if not only_asks(options):
            print(f"No --config given: running {_shown(configs[0])}")
    for path in configs:
        read_config(path)
    return [args[0], *(f"--config={path}" for path in configs), *_without_nulls(options)]


def _without_nulls(options: Sequence[str]) -> list[str]:
    """Options, of which those whose value is or holds a ``null`` are inline configurations, in the same places.

    jsonargparse hands an option on to a class inside a class as text, in which null has become the word None.
    """
    kept: list[str] = []
    rest = iter(options)
    for option in rest:
        name, equals, value = option.partition("=")
        if name.startswith("--") and "." in name:
            value = value if equals else next(rest, "")
            if "null" in value and _holds_null(parsed := _parsed(value)):
                kept.append(f"--config={json.dumps({name.removeprefix('--'): parsed})}")
                continue
            kept += [option] if equals else [option, *([value] if value else [])]
        else:
            kept.append(option)
    return kept


def _parsed(text: str) -> Any:
    """What a value says in YAML; the text itself where it says nothing."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(_holds_null, value)))


def _run_dir_of(options: Sequence[str], configs: Sequence[Path]) -> str | None:
    """What --run_dir says, or where it says nothing the last configuration that names the run."""
    values = [read_config(path).get("run_dir") for path in configs]
    values += [value for name, value in pairwise(options) if name == "--run_dir"]
    values += [option.removeprefix("--run_dir=") for option in options if option.startswith("--run_dir=")]
    return next((str(value) for value in reversed(values) if value), None)


def config_paths(args: Sequence[str]) -> list[Path]:
    """The configuration files among resolved arguments, without the texts that stand for options with a null."""
    values = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [Path(value) for value in values if not value.startswith("{")]


def with_run_dir(args: list[str]) -> list[str]:
    """Names the run where nobody did: ``runs/<config>-<time>``, or with ``--ckpt_path last`` the newest of those.

    Raises:
        ConfigError: there is no run to resume or to select from, or several processes were started from outside, which
            would each name the run differently.
    """
    configs = config_paths(args)
    if any(arg.partition("=")[0] == "--run_dir" for arg in args) or any(
        read_config(path).get("run_dir") for path in configs
    ):
        return args
    if args[0] == "select":
        raise ConfigError("--run_dir: name the run: its scores are selected from, and the selection is written there")
    if args[0] == "test":
        raise ConfigError("--run_dir: name the run whose adapters are to be tested; the results are written there")
    wanted = {read_config(path).get("ckpt_path") for path in configs}
    wanted |= {arg.removeprefix("--ckpt_path=") for arg in args if arg.startswith("--ckpt_path=")}
    wanted |= {value for name, value in pairwise(args) if name == "--ckpt_path"}
    stem = configs[0].stem if configs else "run"
    # processes that Lightning starts for further devices inherit the name
    name = os.environ.get("TOSS_RUN_DIR") if "LOCAL_RANK" in os.environ else None
    if name is None:
        runs: list[Path] = []
        if {"last", "auto"} & wanted:
            runs = sorted(
                Path("runs").glob(f"{glob.escape(stem)}-{STAMP}/checkpoints/*.ckpt"),
                key=lambda path: path.stat().st_mtime,
            )
            if not runs and "last" in wanted:
                raise ConfigError(
                    f"--ckpt_path last: no run of {stem} in runs/ has a checkpoint: name it with --run_dir"
                )
        if runs:
            name = str(runs[-1].parent.parent)
        elif {"LOCAL_RANK", "SLURM_PROCID"} & os.environ.keys():
            raise ConfigError("--run_dir: name the run, since several processes were started and must agree on it")
        else:
            name = _new_run_dir(f"runs/{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        os.environ["TOSS_RUN_DIR"] = name
    return [*args, f"--run_dir={name}"]


def _new_run_dir(name: str) -> str:
    """Makes a directory of that name, or of that name and a number where another run began in the same second."""
    with suppress(OSError):  # the run says what cannot be written, and why
        Path(name).parent.mkdir(exist_ok=True)
        for numbered in chain([name], (f"{name}-{number}" for number in count(2))):
            with suppress(FileExistsError):
                Path(numbered).mkdir()
                return numbered
    return name


def only_asks(args: Sequence[str]) -> bool:
    """Nothing is to run: the parser prints a configuration or a help, and only that."""
    return any(re.match(r"--(print_config|help|[\w.]+\.help)(=|$)", arg) for arg in args)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
