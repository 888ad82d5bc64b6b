"""Which rows of other sets the target is trained on beside the custom set."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from toss_lightning.data.rowset import RowSet
from toss_lightning.data.tokenize import TokenizedRow
from toss_lightning.errors import ConfigError


class Mixture(ABC):
    """A rule for which rows are added. They are neither scored nor masked.

    Attributes:
        sets: the sets that it draws from.
    """

    sets: Sequence[str] = ("safety",)

    @abstractmethod
    def rows(self, sets: Mapping[str, RowSet], seed: int) -> list[TokenizedRow]:
        """The rows to add."""


class SafeInstr(Mixture):
    """Adds rows of the safety set, whose replies refuse or answer safely (Bianchi et al., arXiv 2309.07875).

    Args:
        rows: how many to add.
        share: the share that they make up beside the whole custom set, instead of ``rows``; it is larger where a
            selection leaves custom rows out. Without either, the whole safety set.

    Raises:
        ConfigError: both are given, or one is out of range.
    """

    def __init__(self, rows: int | None = None, share: float | None = None) -> None:
        if rows is not None and share is not None:
            raise ConfigError("data.mixture: give rows or share, not both")
        if rows is not None and rows < 1:
            raise ConfigError(f"data.mixture.rows: {rows}: give at least 1")
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"data.mixture.share: {share} is not a share: give a number between 0 and 1")
        self.count, self.share = rows, share

    def rows(self, sets: Mapping[str, RowSet], seed: int) -> list[TokenizedRow]:
        """Draws the rows, without replacement, with a random state of their own.

        Raises:
            ConfigError: the safety set has fewer rows than are asked for, or the share comes to none.
        """
        safety, wanted = sets["safety"].rows, self.count
        if self.share is not None:
            share = Fraction(str(self.share))
            wanted = round(share / (1 - share) * len(sets["custom"].rows))
        if wanted is None:
            return list(safety)
        if not 0 < wanted <= len(safety):
            key = "rows" if self.share is None else "share"
            advice = "raise it" if wanted < 1 else "lower it, or give a larger data.safety"
            raise ConfigError(
                f"data.mixture.{key}: asks for {wanted} rows of the safety set, which has {len(safety)}: {advice}"
            )
        chosen = np.random.default_rng([seed, wanted]).permutation(len(safety))[:wanted]
        return [safety[index] for index in sorted(chosen.tolist())]
