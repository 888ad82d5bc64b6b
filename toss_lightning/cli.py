"""The ``toss`` command: help and first checks without torch, then the LightningCLI."""

import difflib
import glob
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import yaml

from toss_lightning import __version__
from toss_lightning.config_files import configs_directory, find_config, read_config
from toss_lightning.errors import ConfigError, Stopped, TossError

STAMP = f"{'[0-9]' * 8}-{'[0-9]' * 6}*"
"""What stands behind the config's name in a run's: when it began, and a number where two began in one second."""
VERBS = {
    "fit": "train the reference adapters, score, select, and train the target adapter",
    "score": "the part of fit up to the scores, rounds included: score once, then train anywhere",
    "select": "select from scores that are there; needs no model and no GPU",
    "test": "what adapters say: replies to prompts, read by judges; harm, refusals, over-refusal, utility",
    "validate": "held-out losses of the base, or of a checkpoint's adapter with --ckpt_path",
    "compare": "methods x seeds from one file, and which of their differences are more than noise",
    "methods": "TOSS and what else there is to choose from; with a name, all about one",
}
HELP = f"""toss {__version__}: safe LLM fine-tuning; the riskiest response tokens are left out of the loss

usage: toss VERB [--config FILE ...] [--KEY VALUE ...]

{chr(10).join(f"  {verb:10}{text}" for verb, text in VERBS.items())}

  toss VERB --help      the keys that matter most
  toss --version

Without --config, fit runs the demo on the bundled model. Several --config files overlay, the later one wins:
  toss fit --config configs/toss.yaml --config configs/models/llama32_1b.yaml --config my_data.yaml
A method is a file too, laid over configs/toss.yaml or, to try it, over the demo:
  toss fit --config demo --config methods/spf
"""
OWN_CONFIG = "--own_config"
ALONE = f"{OWN_CONFIG}=false"
"""Has ``test`` leave out the configuration of the run, which otherwise lies beneath the files that are given."""
METHODS_HELP = """usage: toss methods [NAME]

{text}

  toss methods             a table; into a pipe, a line for each with tabs between its facts
  toss methods spf         one method: what it needs and costs, its page, its configuration
"""
VERB_HELP = """usage: toss {verb} [--config FILE ...] [--KEY VALUE ...]

{text}

  --config FILE            YAML; several overlay, the later one wins; demo.yaml by default (fit)
  --run_dir DIR            where everything goes; runs/<config>-<time> by default
  --ckpt_path FILE|last|auto   resume; last takes the newest whole checkpoint of the run (or of the newest run of this
                           config); auto does so too, and starts from the beginning where there is none
  --seed_everything N
  --checkpoint_every N     optimizer steps between checkpoints
  --data.custom PATH       the rows to learn from: a file, a hub dataset, or sample:NAME
  --data.utility PATH      rows of high quality for the same task
  --data.harmful PATH      harmful requests with replies that comply
  --data.safety PATH       harmful requests with safe replies, for methods that draw on them
  --data.mixture SafeInstr|your.Class   rows that are trained on besides; --data.mixture.rows N
  --data.batch_size N      rows per optimizer step, over all devices
  --data.max_tokens N      tokens that a device holds at once
  --model.base.path NAME   a hub id, a directory, a .gguf file, or bundled:smollm2-135m-instruct
  --model.base.quantization nf4|int8|none
  --model.lora.r N         rank of the adapters; also alpha, targets, dora, rslora
  --model.optim.lr X
  --model.normalize all|kept|row
  --model.correction SPF|SafeGrad|DualSelect|your.Class   of the task gradient, in each step of the target
  --loop.plan "[utility, degraded, score, select, target]"
  --loop.selection GlobalTopFraction|PerRowTopFraction|ChainSelection|MaskFirst|DrSft|ConstrainedSft|Rho1|TokenCleaning
                           over tokens; RandomRows|TossRows|Dsir|Seal|Sot over rows; Anchored; your.Class
  --loop.selection.discard X   share of the response tokens (of the rows) that is left out
  --loop.rounds N          rounds of TOSS-Pro; also promote, promotion, refit, stop_early
  --loop.scores_from DIR   select from these scores; --loop.selection_from DIR trains with this selection
  --config evaluation/demo     an example of what the step test and the verb test ask, and who judges
  --own_config=false       test: leave out the run's config.yaml, which otherwise lies beneath the files given
  --loop.epochs N          passes over the custom set
  --loop.reference_epochs N    passes of the references over theirs; --loop.keep_epoch best keeps the best of them
  --trainer.devices N      and every other argument of lightning.Trainer
  --print_config           every key with its value, instead of running
  --help-all               every key (slow); --model.help=CLASS, --data.help=CLASS, --loop.help=CLASS: those of a class
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for a command or configuration that cannot work, 130 and 143 for
        one that was stopped.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a file that knows Latin letters alone ends no run
        sys.stdout.reconfigure(errors="replace")
    try:
        if not args or args[0] in ("-h", "--help"):
            print(HELP)
            return 0
        if args[0] == "--version":
            print(__version__)
            return 0
        verb = check_verb(args)
        if verb == "compare":
            from toss_lightning.cli_compare import compare

            return compare(args[1:])
        if "-h" in args or "--help" in args:
            print((METHODS_HELP if verb == "methods" else VERB_HELP).format(verb=verb, text=VERBS[verb]))
            return 0
        if verb == "methods":
            show_methods(args[1:])
            return 0
        args = ["--help" if arg == "--help-all" else arg for arg in args]
        args = with_configs(args)
        if not _only_asks(args):
            args = with_run_dir(args)
        # at import it asks CPU users for a package that only makes it faster
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from toss_lightning.lightning_cli import run

        run(args)
    except TossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Stopped as end:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            how = ", with a checkpoint; go on with the same command and --ckpt_path last" if end.saved else ""
            how = "; the same command goes on" if args[0] == "test" else how
            print(f"{end}{how}", file=sys.stderr)
        return 128 + end.signum
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning turns the one into the other
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        how = " and --ckpt_path auto" if args[0] in ("fit", "score") else ""
        print(f"stopped; go on with the same command{how}", file=sys.stderr)
        return 130
    finally:
        if made := os.environ.get("TOSS_RUN_DIR"):
            with suppress(OSError):  # it holds something
                os.removedirs(made)
    return 0


def show_methods(names: Sequence[str]) -> None:
    """Prints all methods, or those that are named.

    Raises:
        ConfigError: there is no such method.
    """
    from toss_lightning.cli_methods import find_method, list_methods, show_method

    for method in [find_method(name) for name in names]:
        show_method(method, configs_directory() / f"{method.config}.yaml")
    if not names:
        list_methods()


def check_verb(args: Sequence[str]) -> str:
    """The verb, which must come first.

    Raises:
        ConfigError: there is none, or an option stands before it.
    """
    if args[0].startswith("-"):
        verb = next((arg for arg in args if arg in VERBS), "fit")
        raise ConfigError(f"{args[0].partition('=')[0]} stands before the verb: write toss {verb} {args[0]} ...")
    if args[0] not in VERBS:
        near = difflib.get_close_matches(args[0], VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(VERBS)}"
        raise ConfigError(f"unknown verb {args[0]!r}; {hint}")
    return args[0]


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
        own = Path(run_dir or ".") / "config.yaml"
        if own.is_file():
            configs = [own, *configs]
            # a run directory that one stands in: what its configuration calls it is seen from elsewhere
            options += [] if run_dir else ["--run_dir=."]
        elif run_dir and configs and not _only_asks(options):
            print(f"{own} is not there: what is given configures this {args[0]} alone")
    if not configs:
        configs = [configs_directory() / "demo.yaml"]
        if not _only_asks(options):
            print(f"No --config given: running {_shown(configs[0])}")
    for path in configs:
        read_config(path)
    options, nulls = _without_nulls(options)
    return [args[0], *(f"--config={path}" for path in configs), *nulls, *options]


def _without_nulls(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options, and those whose value is or holds a ``null`` as inline configurations.

    jsonargparse hands an option on to a class inside a class as text, in which null has become the word None.
    """
    kept: list[str] = []
    nulls: list[str] = []
    rest = iter(options)
    for option in rest:
        name, equals, value = option.partition("=")
        if name.startswith("--") and "." in name:
            value = value if equals else next(rest, "")
            if "null" in value and _holds_null(parsed := _parsed(value)):
                nulls.append(f"--config={json.dumps({name.removeprefix('--'): parsed})}")
                continue
            kept += [option] if equals else [option, *([value] if value else [])]
        else:
            kept.append(option)
    return kept, nulls


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


def _only_asks(args: Sequence[str]) -> bool:
    """Nothing is to run: the parser prints a configuration or a help, and only that."""
    return any(re.match(r"--(print_config|help|[\w.]+\.help)(=|$)", arg) for arg in args)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
