"""What selections refuse: arguments that cannot work, and scores that say nothing."""

import math
from pathlib import Path

import numpy as np

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores.ranking import share_of

SAME_REFERENCES = "are both references the same adapter? Give two that differ, and score again"
"""What to ask where no score differs from another."""


def check_discard(discard: float) -> None:
    """Checks a share to leave out.

    Raises:
        ConfigError: it is outside [0, 1).
    """
    if not 0 <= discard < 1:
        raise ConfigError(f"loop.selection.discard: {discard} is not a share: give a number in [0, 1)")


def masked_count(discard: float, tokens: int, free: int) -> int:
    """How many tokens a share leaves out: ``floor(discard * tokens)``.

    Args:
        discard: the share.
        tokens: response tokens.
        free: those that may be left out, which are not end-of-turn tokens.

    Raises:
        ConfigError: there are not so many.
    """
    count = share_of(discard, tokens)
    if count > free:
        raise ConfigError(
            f"loop.selection.discard: {discard} asks for {count} of {tokens} tokens, but only {free} are not"
            " end-of-turn tokens: lower it, or set protect_end: false"
        )
    return count


def check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks an option of few values.

    Raises:
        ConfigError: it has another.
    """
    if value not in choices:
        raise ConfigError(f"loop.selection.{name}: {value!r} is none of its values: use {', '.join(choices)}")


def check_above_zero(**numbers: float) -> None:
    """Checks arguments that must be finite and above 0.

    Raises:
        ConfigError: one is not.
    """
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"loop.selection.{name}: {value} cannot be used: give a number above 0")


def check_at_least(least: int, **numbers: float) -> None:
    """Checks arguments that must be finite and not too low.

    Raises:
        ConfigError: one is not.
    """
    for name, value in numbers.items():
        if not least <= value < math.inf:
            raise ConfigError(f"loop.selection.{name}: {value} cannot be used: give {least} or more")


def check_score_weights(utility_weight: float, degraded_weight: float) -> None:
    """Checks what the two losses count in a token score.

    Raises:
        ConfigError: one is not finite, or both are 0.
    """
    for name, value in (("utility_weight", utility_weight), ("degraded_weight", degraded_weight)):
        if not math.isfinite(value):
            raise ConfigError(f"loop.selection.{name}: {value} is no weight: give a finite number")
    if not utility_weight and not degraded_weight:
        raise ConfigError(
            "loop.selection.utility_weight: with degraded_weight it is 0, which makes every score 0: give one of them"
            " another value"
        )


def check_told_apart(values: np.ndarray, count: int, where: Path, what: str, question: str) -> None:
    """Refuses values that are all equal, where some are to be chosen and others not: only their order would decide.

    Args:
        values: Shape ``[N]``.
        count: how many are to be chosen.
        where: the store that they are of.
        what: whose values they are, in the plural.
        question: what may be wrong, and what to do.

    Raises:
        StoreError: they are all equal, and ``count`` is neither 0 nor N.
    """
    if 0 < count < len(values) and (values == values[0]).all():
        raise StoreError(
            f"{where}: all {len(values)} {what} have the same score ({values[0]:g}), so that only their order would say"
            f" which go: {question}"
        )
