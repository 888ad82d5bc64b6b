"""``toss report``: a page about a run, or some of its rows in the terminal."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.files import nearest, user_path, write_text

PAGE = "report.html"
HELP = f"""usage: toss report RUN_DIR [--out FILE] [--rows N]
       toss report RUN_DIR --row ID [ID ...]

Writes RUN_DIR/{PAGE}, a page about a run of fit, score, select or test: held-out losses, what judges said, replies
side by side, how the scores are distributed and how well they tell harmful rows from others, what was masked, and rows
token by token. It is one file that needs no network, and to write it takes no model. It holds texts of the custom set
and of the prompts: what is not labelled benign is hidden until one asks for it, but it is in the file.

  --out FILE               where the page goes instead
  --rows N                 rows of each kind, and prompts of each set, that are shown: 6 by default
  --row ID ...             these rows in the terminal, and no page; into a pipe, a line for each response token
  --scores DIR             the scores that were selected from, where neither RUN_DIR nor its configuration has them
  --tokenizer NAME         directory or hub id of the base that the rows were tokenised for, where RUN_DIR does not say
"""


def report(args: Sequence[str]) -> None:
    """Runs the verb.

    Raises:
        ConfigError: the command cannot work.
        StoreError: what the run left behind is damaged, or the page cannot be written.
    """
    command = read_command(args)
    # they load torch and transformers
    from rich.console import Console

    from toss_lightning.report.finished import read_run
    from toss_lightning.report.page import ROWS, render
    from toss_lightning.report.shades import Shade
    from toss_lightning.report.terminal import print_row
    from toss_lightning.report.tokens import Rows, risk_score

    try:
        run = read_run(command.run_dir, command.scores)
        tokenizer = run.tokenizer(command.tokenizer) if run.scores is not None or command.row else None
    except OSError as error:
        raise StoreError(f"{command.run_dir}: cannot be read ({error.strerror or error})") from error
    for warning in run.warnings:
        print(f"note: {warning}", file=sys.stderr)
    if run.scores is not None and tokenizer is not None and command.row:
        score = risk_score(run.scores)
        rows, shade = Rows(run.scores, run.weights, tokenizer, score), Shade(score)
        for row in [rows[row_id] for row_id in command.row]:
            print_row(row, shade, Console(highlight=False))
        return
    page = command.out or command.run_dir / PAGE
    write_text(
        Path(os.path.realpath(page)), render(run, tokenizer, command.rows or ROWS), "name another file with --out"
    )
    print(page)


def read_command(args: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments behind the verb.

    Raises:
        ConfigError: one of them is wrong.
    """
    parser = _Parser(prog="toss report", add_help=False, allow_abbrev=False)
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR")
    parser.add_argument("--out", type=user_path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--row", type=int, nargs="+", default=[])
    parser.add_argument("--scores", type=user_path)
    parser.add_argument("--tokenizer")
    command = parser.parse_args(args)
    if command.rows is not None and command.rows < 1:
        raise ConfigError(f"toss report --rows {command.rows}: give at least 1")
    if command.row and (command.out is not None or command.rows is not None):
        raise ConfigError(
            "toss report: --row prints rows; --out and --rows are of the page: leave one or the other out"
        )
    # what is there and is no file, such as a device, would be replaced by the page
    out = command.out
    if out is not None and (not out.name or (os.path.exists(out) and not os.path.isfile(out))):
        raise ConfigError(f"toss report --out {out}: not the name of a file: give one, such as {PAGE}")
    # os.path calls a text that is too long for a name no directory, where pathlib raises
    if not os.path.isdir(command.run_dir):
        like = nearest(command.run_dir) if os.path.isdir(command.run_dir.parent) else ""
        what = "a file" if os.path.isfile(command.run_dir) else f"no such directory{like}"
        raise ConfigError(f"toss report {command.run_dir}: {what}: name the directory of a run")
    return command


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as all of the command line does."""

    def error(self, message: str) -> NoReturn:
        """Raises it."""
        raise ConfigError(f"toss report: {message}; toss report --help says what there is")
