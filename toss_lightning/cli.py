"""The ``toss`` command: help and first checks without torch, then the LightningCLI."""

import difflib
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from toss_lightning import __version__
from toss_lightning.cli_args import only_asks, with_configs, with_run_dir
from toss_lightning.errors import ConfigError, Stopped, TossError

VERBS = {
    "fit": "train the reference adapters, score, select, and train the target adapter",
    "score": "the part of fit up to the scores, rounds included: score once, then train anywhere",
    "select": "select from scores that are there; needs no model and no GPU",
    "test": "what adapters say: replies to prompts, read by judges; harm, refusals, over-refusal, utility",
    "validate": "held-out losses of the base, or of a checkpoint's adapter with --ckpt_path",
    "compare": "methods x seeds from one file, and which of their differences are more than noise",
    "report": "a page about a run: losses, judges, scores, and rows token by token with what was masked",
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
        one that was stopped, 141 where nobody reads what it prints any more, as behind ``| head``.
    """
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # as where a launcher has closed it
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        # what is left to be written would be tried again, and fail, while Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        verb = next(iter(sys.argv[1:] if argv is None else argv), "")
        if verb in ("fit", "score", "test"):
            with suppress(OSError):
                print(f"stopped, for nobody reads what is printed; {_how_to_go_on(verb)}", file=sys.stderr)
        return 128 + signal.SIGPIPE


def _how_to_go_on(verb: str) -> str:
    return f"go on with the same command{' and --ckpt_path auto' if verb in ('fit', 'score') else ''}"


def _is_unread(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(argv: Sequence[str] | None) -> int:
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
        if verb == "report":
            from toss_lightning.cli_report import HELP as REPORT_HELP
            from toss_lightning.cli_report import report

            if "-h" in args or "--help" in args:
                print(REPORT_HELP)
            else:
                report(args[1:])
            return 0
        if verb == "compare":
            from toss_lightning.cli_compare import compare

            return compare(args[1:])
        if "-h" in args or "--help" in args:
            print((METHODS_HELP if verb == "methods" else VERB_HELP).format(verb=verb, text=VERBS[verb]))
            return 0
        if verb == "methods":
            from toss_lightning.cli_methods import show_methods

            show_methods(args[1:])
            return 0
        args = ["--help" if arg == "--help-all" else arg for arg in args]
        args = with_configs(args)
        if not only_asks(args):
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
        print(f"stopped; {_how_to_go_on(args[0])}", file=sys.stderr)
        return 130
    finally:
        if made := os.environ.get("TOSS_RUN_DIR"):
            with suppress(OSError):  # it holds something
                os.removedirs(made)
    return 0


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
