"""The judges of an evaluation: each reads every reply, and one that cannot costs neither replies nor other judges."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer

from toss_lightning.errors import ConfigError, TossError, first_line
from toss_lightning.evaluation.judges import Judge
from toss_lightning.evaluation.records import Response, Verdict
from toss_lightning.evaluation.verdicts import judging, known_verdicts, remember_code
from toss_lightning.evaluation.win_rates import WinRates, Wins, compare_all, known_wins
from toss_lightning.ranks import on_first_rank

DONE = object()
"""What a judge that has read everything comes back with."""


@dataclass(frozen=True)
class Judged:
    """What the judges of a panel said.

    Attributes:
        verdicts: judge -> adapter -> a verdict on each response; known on the first rank alone.
        wins: which replies a judge prefers, where one compares.
        failed: judge that could not read everything -> why; it has no verdicts.
    """

    verdicts: dict[str, dict[str, list[Verdict]]]
    wins: Wins | None
    failed: dict[str, str]


class JudgePanel:
    """Who reads the replies of all adapters, on the first rank; the other ranks hear how far that is.

    Args:
        judges: who reads each reply.
        win_rate: who compares replies of two adapters, if anyone does.
        trainer: holds the strategy.
        directory: where verdicts are kept.

    Raises:
        ConfigError: a judge stands twice.
    """

    def __init__(self, judges: Sequence[Judge], win_rate: WinRates | None, trainer: Trainer, directory: Path) -> None:
        names = [judge.name for judge in judges]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"loop.evaluation.judges: {repeated[0]} stands twice: leave one out")
        self.judges, self.win_rate, self.trainer, self.directory = judges, win_rate, trainer, directory

    def check(self, sets: Sequence[str]) -> None:
        """Refuses what cannot work before anything is trained; takes down the judges' code.

        Args:
            sets: names of the prompt sets that are asked.

        Raises:
            ConfigError: a setting cannot work, or a key is not there.
            ModelError: the model of a judge is not to be had.
        """
        for judge in self.judges:
            judge.check()
            remember_code(judge)
        if self.win_rate is not None:
            self.win_rate.check(sets)

    def read(self, responses: Mapping[str, list[Response]], between: Callable[[], None]) -> Judged:
        """What each judge says of the replies.

        Args:
            responses: adapter -> its response to each prompt.
            between: called on every rank, equally often, whenever verdicts are on disk.
        """
        failed: dict[str, str] = {}
        return Judged(self._judge(responses, failed, between), self._compare(responses, failed, between), failed)

    def _judge(
        self, responses: Mapping[str, list[Response]], failed: dict[str, str], between: Callable[[], None]
    ) -> dict[str, dict[str, list[Verdict]]]:
        """Verdicts; a reason is added to ``failed`` where a judge gives none."""
        found: dict[str, dict[str, list[Verdict]]] = {}
        judged = [one for of_adapter in responses.values() for one in of_adapter if one.prompt.label is not None]
        device = self.trainer.strategy.root_device
        for judge in self.judges if judged else ():
            problem = self._carry_out(judging(judge, judged, self.directory, device), between)
            if problem is not None:
                failed[judge.name] = problem
                continue
            if self.trainer.is_global_zero:
                verdicts = iter(known_verdicts(judge, judged, self.directory))
                found[judge.name] = {
                    name: [Verdict() if one.prompt.label is None else next(verdicts) for one in of_adapter]
                    for name, of_adapter in responses.items()
                }
        return found

    def _compare(
        self, responses: Mapping[str, list[Response]], failed: dict[str, str], between: Callable[[], None]
    ) -> Wins | None:
        """Which replies the judge of win rates prefers; a reason is added where it cannot say."""
        if (wanted := self.win_rate) is None:
            return None
        work = compare_all(wanted, responses, self.directory, self.trainer.strategy.root_device)
        problem = self._carry_out(work, between)
        if problem is not None:
            failed[wanted.judge.name] = problem
            return None
        return on_first_rank(self.trainer, lambda: known_wins(wanted, responses, self.directory))

    def _carry_out(self, work: Iterator[None], between: Callable[[], None]) -> str | None:
        """Does a judge's work on the first rank; why it could not, for that costs neither replies nor other judges."""
        # the others hear of every part, for who waits too long in one place is taken for dead
        while (said := on_first_rank(self.trainer, partial(_goes_on, work))) is True:
            between()
        return said if isinstance(said, str) else None


def _goes_on(work: Iterator[None]) -> bool | str:
    """Does the next part of a judge's work; whether there was one, or why it cannot be done."""
    try:
        return next(work, DONE) is not DONE
    except TossError as error:
        return str(error)
    except Exception as error:  # a judge of one's own may raise anything, and a model run out of memory
        return first_line(error)
