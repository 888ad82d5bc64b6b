"""Win rates: which of two methods' replies a judge prefers, shown to it in both orders."""

from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from toss_lightning.cli_errors import explain, one_line
from toss_lightning.compare.comparison import Comparison, WinRate
from toss_lightning.compare.measured import BASE, Measured
from toss_lightning.compare.runs import Run
from toss_lightning.errors import ConfigError, StoreError, TossError
from toss_lightning.evaluation.judges import PairwiseJudge
from toss_lightning.evaluation.responses import read_responses
from toss_lightning.evaluation.statistics import t_interval
from toss_lightning.evaluation.verdicts import Pair, comparing, digest_of_pair, known_outcomes, remember_code
from toss_lightning.evaluation.win_rates import WORTH, of_win_rate

KEY = "win_rate.judge"


@dataclass(frozen=True)
class _Match:
    """The replies of a run to a prompt set, beside the opponent's."""

    run: Run
    set: str
    pairs: list[Pair]


def make_judge(win_rate: WinRate) -> PairwiseJudge:
    """The judge that a comparison names; its model is not loaded yet.

    Raises:
        ConfigError: there is no such judge, or it cannot be made so.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--judge", type=PairwiseJudge)
    given = {"judge": dict(win_rate.judge)}
    try:
        judge: PairwiseJudge = parser.instantiate_classes(parser.parse_object(given)).judge
    except (ArgumentError, TypeError, ValueError) as error:
        problem = explain([("win_rate", given)], {"judge": PairwiseJudge}, {}) or f"win_rate: {one_line(str(error))}"
        raise ConfigError(problem) from error
    except ConfigError as error:
        raise of_win_rate(error, KEY) from error
    return judge


def check_judge(win_rate: WinRate) -> None:
    """Makes sure, before hours of training, that there is such a judge, and that it has what it needs.

    Raises:
        ConfigError: the judge cannot be made, or lacks a key.
        ModelError: its model is not to be had.
    """
    judge = make_judge(win_rate)
    try:
        judge.check()
    except TossError as error:
        raise of_win_rate(error, KEY) from error
    remember_code(judge)


def judge_win_rates(comparison: Comparison, runs: Sequence[Run]) -> None:
    """Has the replies of all runs that are done compared, as far as they are not yet.

    Raises:
        ConfigError: the judge cannot be made, or lacks a key.
        ModelError: it cannot be loaded, or gives no answers.
        StoreError: replies cannot be read, are to different prompts, or outcomes cannot be written.
    """
    win_rate = comparison.win_rate
    if win_rate is None:
        return
    pairs = [pair for match in _matches(win_rate, comparison.baseline, runs) for pair in match.pairs]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for _ in comparing(make_judge(win_rate), pairs, _outcomes_of(comparison), device):
            pass
    except TossError as error:
        raise of_win_rate(error, KEY) from error


def measure_win_rates(comparison: Comparison, runs: Sequence[Run]) -> tuple[list[Measured], list[str]]:
    """A measure for each prompt set, from what has been judged; asks nobody.

    A win is worth 1, a tie 1/2, a loss 0. The opponent has 1/2 for each prompt: what a method has beyond that is what
    its replies are preferred by.

    Returns:
        The measures, and the titles of runs whose replies are still to be compared.

    Raises:
        ConfigError: the judge cannot be made.
        StoreError: replies or outcomes cannot be read, or are to different prompts.
    """
    win_rate = comparison.win_rate
    if win_rate is None:
        return [], []
    judge = make_judge(win_rate)
    known = known_outcomes(judge, _outcomes_of(comparison))
    opponent = BASE if win_rate.against == "base" else comparison.baseline
    found: dict[str, Measured] = {}
    unjudged: dict[str, None] = {}
    for match in _matches(win_rate, comparison.baseline, runs):
        digests = [digest_of_pair(pair) for pair in match.pairs]
        if not known.keys() >= {*digests}:
            unjudged[match.run.title] = None
            continue
        is_task = all(ours.prompt.label is None for ours, _ in match.pairs)
        name = f"win rate against {opponent}, {match.set}"
        new = Measured(name, "higher", True, judge.name, False, is_task, True, of={})
        measure = found.setdefault(match.set, new)
        method, seed = match.run.method, match.run.seed
        values = [WORTH[known[one]] for one in digests]
        whose = (method, "base") if win_rate.against == "base" else (comparison.baseline, "target")
        for (owner, adapter), of in (((method, "target"), values), (whose, [0.5] * len(values))):
            measure.of.setdefault(owner, {}).setdefault(adapter, {})[seed] = of
        measure.intervals.setdefault(method, {})[seed] = _interval(values)
    return [*found.values()], [*unjudged]


def _matches(win_rate: WinRate, baseline: str, runs: Sequence[Run]) -> Iterator[_Match]:
    """Of every run that is done, and has an opponent."""
    replies = {
        (run.method, run.seed): read_responses(run.evaluation.with_name("responses.jsonl"))
        for run in runs
        if run.is_measured
    }
    for run in runs:
        of_base = win_rate.against == "base"
        key = (run.method if of_base else baseline, run.seed)
        if (run.method, run.seed) not in replies or key not in replies or (run.method == baseline and not of_base):
            continue
        ours, theirs = replies[run.method, run.seed]["target"], replies[key]["base" if of_base else "target"]
        if [one.prompt for one in ours] != [one.prompt for one in theirs]:
            raise StoreError(
                f"{run.title} and {baseline} were asked different prompts: delete the evaluation of one, and run the"
                " comparison again"
            )
        pairs = [*zip(ours, theirs, strict=True)]
        for name in dict.fromkeys(one.prompt.set for one in ours):
            if not win_rate.prompts or name in win_rate.prompts:
                yield _Match(run, name, [pair for pair in pairs if pair[0].prompt.set == name])


def _outcomes_of(comparison: Comparison) -> Path:
    return comparison.run_dir / "cache" / "verdicts"


def _interval(values: Sequence[float | None]) -> Mapping[str, float | None]:
    """Student's over the prompts, as of a share."""
    decided = [value for value in values if value is not None]
    if len(decided) < 2:
        return {"low": None, "high": None}
    interval = t_interval(decided, bounded=True)
    return {"low": interval.low, "high": interval.high}
