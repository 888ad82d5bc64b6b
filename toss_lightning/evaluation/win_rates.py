"""Win rates of a run's adapters: whose replies a judge prefers to those of plain fine-tuning, or of the base."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toss_lightning.errors import ConfigError, TossError
from toss_lightning.evaluation.judges import PairwiseJudge
from toss_lightning.evaluation.judges.pairwise import Outcome
from toss_lightning.evaluation.records import Response
from toss_lightning.evaluation.verdicts import Pair, comparing, digest_of_pair, known_outcomes, remember_code
from toss_lightning.models.adapters import BASE

KEY = "loop.evaluation.win_rate.judge"
PLAIN = "sft"
WORTH: dict[Outcome | None, float | None] = {"win": 1.0, "tie": 0.5, "loss": 0.0, None: None}
"""Of an outcome in a win rate; None where an answer was out of form."""


@dataclass(frozen=True)
class WinRates:
    """Who compares each adapter's replies with another's, in both orders, as the TOSS paper's win rate does."""

    judge: PairwiseJudge
    """Who compares."""
    against: str | None = None
    """The adapter whose replies the others' are compared with: sft where it is among those that reply, else base."""
    prompts: list[str] | None = None
    """Prompt sets; all of them by default."""

    def check(self, sets: Sequence[str]) -> None:
        """Refuses what cannot work before anything is trained; takes down the judge's code.

        Args:
            sets: names of the prompt sets that are asked.

        Raises:
            ConfigError: there is no such set, or none at all, or the judge lacks a key.
            ModelError: its model is not to be had.
        """
        if unknown := [name for name in self.prompts or () if name not in sets]:
            raise ConfigError(
                f"loop.evaluation.win_rate.prompts: {unknown[0]} is none of the prompt sets; there is {', '.join(sets)}"
            )
        if not sets:
            raise ConfigError("loop.evaluation.win_rate: no prompts are asked, so there are no replies to compare")
        try:
            self.judge.check()
            remember_code(self.judge)
        except TossError as error:
            raise of_win_rate(error, KEY) from error

    def opponent(self, adapters: Sequence[str]) -> str:
        """Whose replies the others' are compared with.

        Args:
            adapters: those that reply.

        Raises:
            ConfigError: the one that is named does not, or there is nobody else.
        """
        name = self.against or (PLAIN if PLAIN in adapters else BASE)
        if name not in adapters or len(adapters) < 2:
            there = ", ".join(adapters)
            raise ConfigError(f"loop.evaluation.win_rate.against: {name}: needs it and another to reply; {there} do")
        return name


@dataclass(frozen=True)
class Wins:
    """What was found.

    Attributes:
        judge: who compared.
        opponent: whose replies the others' were compared with.
        of: prompt set -> adapter -> what each of its replies is worth, see :data:`WORTH`; the opponent's are worth 1/2.
    """

    judge: str
    opponent: str
    of: Mapping[str, Mapping[str, list[float | None]]]


def compare_all(
    wanted: WinRates, responses: Mapping[str, Sequence[Response]], directory: Path, device: torch.device
) -> Iterator[None]:
    """Has all replies compared, as far as they are not yet; comes back after each part that is filed.

    Raises:
        ConfigError: the judge lacks a key, or there is nobody to compare with.
        ModelError: it cannot be loaded, or gives no answers.
        StoreError: the directory cannot be written, or holds a damaged file.
    """
    pairs = [pair for of_adapter in _pairs(wanted, responses).values() for pair in of_adapter]
    try:
        yield from comparing(wanted.judge, pairs, directory, device)
    except TossError as error:
        raise of_win_rate(error, KEY) from error


def known_wins(wanted: WinRates, responses: Mapping[str, Sequence[Response]], directory: Path) -> Wins:
    """What the judge has said by now, of all replies.

    Raises:
        StoreError: the directory holds a damaged file.
    """
    outcomes, opponent = known_outcomes(wanted.judge, directory), wanted.opponent([*responses])
    found: dict[str, dict[str, list[float | None]]] = {}
    for name, pairs in _pairs(wanted, responses).items():
        for pair in pairs:
            of_set = found.setdefault(pair[0].prompt.set, {})
            of_set.setdefault(name, []).append(WORTH[outcomes[digest_of_pair(pair)]])
    for of_set in found.values():
        of_set[opponent] = [0.5] * len(next(iter(of_set.values())))
    return Wins(wanted.judge.name, opponent, found)


def _pairs(wanted: WinRates, responses: Mapping[str, Sequence[Response]]) -> dict[str, list[Pair]]:
    """Adapter -> each of its replies beside the opponent's."""
    opponent = wanted.opponent([*responses])
    return {
        name: [
            pair
            for pair in zip(ours, responses[opponent], strict=True)
            if wanted.prompts is None or pair[0].prompt.set in wanted.prompts
        ]
        for name, ours in responses.items()
        if name != opponent
    }


def of_win_rate(error: TossError, key: str) -> TossError:
    """A judge's complaint, with the key at which it stands.

    Args:
        error: the complaint, which takes it for one of the judges of an evaluation.
        key: where it stands.
    """
    return type(error)(str(error).replace("loop.evaluation.judges", key))
