"""``toss compare``: methods x seeds from one file; reading it, ``--dry_run`` and bad input load no torch."""

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toss_lightning.compare.comparison import Comparison, WinRate
from toss_lightning.compare.running import lock, run_all
from toss_lightning.compare.runs import Run, list_runs, overlays, show_runs
from toss_lightning.compare.settings import differing, given, say_differing
from toss_lightning.compare.spec import KEYS, load_comparison
from toss_lightning.config_files import find_config
from toss_lightning.errors import ConfigError, Stopped, TossError

SWITCHES = ("dry_run", "report")
HELP = """usage: toss compare FILE.yaml [--dry_run] [--report] [--KEY VALUE ...]

Runs every method of the file with every seed, each in a directory of its own, and says which differences are more than
noise. The same command goes on where a stopped one left off; what is done is not done again.

  --dry_run                what would be run, with the commands, and nothing more
  --report                 the report of the runs that are done, and nothing more
  --run_dir DIR            where everything goes; this and what follows stand in place of the file's
  --seeds "[1, 2, 3]"
  --jobs N|auto            runs at once, if memory allows; auto: as many as memory and cores allow
  --threads N              of each run; by default the cores shared out
  --gpus "[0, 1]"          what each of the runs at once sees
  --baseline NAME          the method that the others are compared with
  --oracle NAME            the best there could be: what share of the way to it the others go
  --against "[NAME]"       methods that the others are compared with too

The demo, nine runs of a few minutes: toss compare compare/demo. Its file, configs/compare/demo.yaml, says what every
key means, and docs/comparing.md what every number means.
"""


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    file: str
    options: dict[str, str]
    """Keys that stand in place of the file's."""
    dry_run: bool = False
    report: bool = False


def compare(args: Sequence[str]) -> int:
    """Runs the verb.

    Returns:
        The exit code: 0, 1 where runs failed, 130 and 143 where it was stopped.

    Raises:
        ConfigError: the command or the file cannot work.
        StoreError: the disk refuses, or what runs left behind is damaged.
    """
    if "-h" in args or "--help" in args:
        print(HELP)
        return 0
    command = read_command(args)
    comparison = load_comparison(_find(command.file), command.options)
    runs = list_runs(comparison)
    settings = {one.name: overlays(comparison, one) for one in comparison.methods}
    differ = say_differing(differing(settings))
    for line in differ:
        print(f"note: methods differ in {line}", flush=True)
    if command.dry_run:
        show_runs(comparison, runs)
        return 0
    if comparison.win_rate is not None and not command.report:
        if comparison.gpus:  # the judge keeps to them too; torch, which reads this, is not imported yet
            os.environ["CUDA_VISIBLE_DEVICES"] = comparison.gpus[0]
        _check_judge(comparison.win_rate)
    unjudged = None
    failed: list[str] = []
    try:
        if not command.report:
            with lock(comparison.run_dir) as held:
                failed = run_all(comparison, runs, held)
                runs = list_runs(comparison)  # files may have been edited meanwhile
                if comparison.win_rate is not None:
                    unjudged = _judge(comparison, runs)
    except (KeyboardInterrupt, Stopped) as end:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + end.signum if isinstance(end, Stopped) else 130
    try:
        if not failed or any(run.is_measured for run in runs):
            _report(comparison, runs, differ, given(settings))
    finally:
        for problem in failed:
            print(problem, file=sys.stderr)
        if failed:
            print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
    if unjudged:
        print(f"{unjudged}; the same command goes on comparing replies", file=sys.stderr)
    return 1 if failed or unjudged else 0


def read_command(args: Sequence[str]) -> Command:
    """Reads the arguments behind the verb.

    Raises:
        ConfigError: an option is unknown or lacks its value, or there is not one file.
    """
    files, options, switches = [], {}, set()
    rest = list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        key = name.removeprefix("--")
        if not name.startswith("-"):
            files.append(name + equals + value)
        elif key in SWITCHES and not equals:
            switches.add(key)
        elif name.startswith("--") and key in KEYS:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"{name}: needs a value")
                value = rest.pop(0)
            options[key] = value
        else:
            near = difflib.get_close_matches(key.strip("-"), (*SWITCHES, *KEYS), 1)
            hint = f"did you mean --{near[0]}?" if near else "toss compare --help lists them"
            raise ConfigError(f"toss compare: no option {name}; {hint}")
    if len(files) != 1:
        found = f"{len(files)} files ({', '.join(files)})" if files else "no file"
        raise ConfigError(f"toss compare: {found}: give one YAML file; toss compare compare/demo runs the demo")
    return Command(files[0], options, **dict.fromkeys(switches, True))


def _find(name: str) -> Path:
    try:
        return find_config(name)
    except ConfigError as error:
        raise ConfigError(f"toss compare {str(error).removeprefix('--config ')}") from error


# what follows loads torch, for which reading a file or a dry run need not wait


def _check_judge(win_rate: WinRate) -> None:
    _hush()
    from toss_lightning.compare.win_rate import check_judge

    check_judge(win_rate)


def _judge(comparison: Comparison, runs: Sequence[Run]) -> str | None:
    """Has replies compared, and says what keeps the judge from it, which is not to cost the report of the runs."""
    from toss_lightning.compare.win_rate import judge_win_rates

    try:
        judge_win_rates(comparison, runs)
    except TossError as error:
        return str(error)
    except Exception as error:  # one's own backend may raise anything, and a model run out of memory
        return f"win_rate.judge: {type(error).__name__}: {error}"
    return None


def _report(comparison: Comparison, runs: Sequence[Run], differ: Sequence[str], helped: Sequence[str]) -> None:
    _hush()
    from toss_lightning.compare.report import report_comparison

    report_comparison(comparison, runs, differ, helped)


def _hush() -> None:
    # at import it asks CPU users for a package that only makes it faster
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
