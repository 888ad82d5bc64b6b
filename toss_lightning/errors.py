"""Errors that a person can act on: one line each, saying what is wrong, where, and what to do."""

import signal
from collections.abc import Iterable
from typing import Any, get_args


class TossError(Exception):
    """Base of all errors that the command line prints without a traceback."""


class ConfigError(TossError):
    """A setting, or a combination of settings, that cannot work."""


def check_settings(key: str, settings: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Refuses settings that cannot be used.

    Args:
        key: what a message names as their place.
        settings: what holds them.
        rules: name, whether its value is valid, and what is wanted.

    Raises:
        ConfigError: one is not valid.
    """
    for name, is_valid, wanted in rules:
        if not is_valid:
            raise ConfigError(f"{key}.{name}: {getattr(settings, name)} cannot be used: give {wanted}")


def check_choice(key: str, value: object, choices: Any) -> None:
    """Refuses a value that is none of a ``Literal``'s.

    Args:
        key: what a message names as its place.
        value: what was given.
        choices: the ``Literal``.

    Raises:
        ConfigError: it is none of them.
    """
    if value not in get_args(choices):
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(get_args(choices))}")


class DataError(TossError):
    """A dataset, a row or a chat template that cannot be read."""


class ModelError(TossError):
    """A base model or an adapter that cannot be used as asked."""


class StoreError(TossError):
    """Scores, a selection or a run directory that cannot be read, written, or does not belong to this run."""


class TrainingError(TossError):
    """A training run that must not go on."""


class Stopped(Exception):
    """The run was told to stop by a signal.

    Args:
        signum: the signal.
        saved: there is a checkpoint to go on from.
    """

    def __init__(self, signum: int, saved: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.saved = signum, saved


def first_line(error: Exception) -> str:
    """What someone else's code failed with, in one line: its kind, and what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'it does not say why').splitlines()[0]}"
