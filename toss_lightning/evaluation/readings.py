"""What adapters say of given replies, kept on disk so that no adapter reads the same replies twice."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.likelihood import Reading, measure, opener_tokens, reply_ordinals
from toss_lightning.files import CACHE, digest_of, write_json

FILED = ("loss", "opening", "divergence")
"""What an adapter says, the last where it is taken; which token is which, the rows tell."""


class Readings:
    """Has the adapters of a module read replies, with whatever strategy a Trainer holds.

    Args:
        trainer: holds the module and the strategy.
        chat: knows the tokens that refusals begin with.
        directory: where it is kept what they say; the names of its files say what that depends on.
        max_tokens: padded tokens that a device holds at once.
    """

    def __init__(self, trainer: Trainer, chat: ChatTokenizer, directory: Path, max_tokens: int) -> None:
        self.trainer, self.chat, self.directory, self.max_tokens = trainer, chat, directory, max_tokens

    @cached_property
    def openers(self) -> list[int]:
        """See :func:`toss_lightning.evaluation.likelihood.opener_tokens`; of no use where nothing is read."""
        return opener_tokens(self.chat)

    def of(
        self, rows: Sequence[TokenizedRow], adapter: str, name: str, divergences: bool, openings: bool = True
    ) -> Reading:
        """What an adapter says of some rows; the same on every rank.

        Args:
            rows: the rows, responses included.
            adapter: the one of the module that reads; ``base`` for none.
            name: what a progress bar says.
            divergences: the divergence from the base is taken too, which costs a pass of the base; else it is 0.
            openings: the probability of a refusal's first token is taken; else it is no number.

        Raises:
            StoreError: the directory cannot be written, or holds a damaged file.
        """
        openers = self.openers if openings else []
        file = self.directory / f"{self._digest(rows, adapter, divergences, openers)}.json"
        if self.trainer.strategy.broadcast(file.exists()):
            return _read(file, rows)
        found = measure(self.trainer, rows, adapter, openers, self.max_tokens, name, divergences)
        if self.trainer.is_global_zero:
            kept = FILED if divergences else FILED[:-1]  # a zero for each token would say nothing
            write_json(file, {key: getattr(found, key).tolist() for key in kept}, CACHE)
        return found

    def _digest(self, rows: Sequence[TokenizedRow], adapter: str, divergences: bool, openers: Sequence[int]) -> str:
        module: Any = self.trainer.lightning_module
        facts = [
            sorted(module.fingerprints().items()),
            module.digest(adapter),
            [row.ids_hash for row in rows],
            [list(openers), self.max_tokens, divergences],
        ]
        return digest_of(json.dumps(facts))


def _read(file: Path, rows: Sequence[TokenizedRow]) -> Reading:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        said = {key: np.array(content[key], np.float64) for key in FILED[:-1]}
        ordinal = reply_ordinals(rows)
        divergence = np.array(content.get("divergence", np.zeros(len(ordinal))), np.float64)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{file}: damaged ({error}): delete it and run the test again") from error
    return Reading(**said, divergence=divergence, ordinal=ordinal)
