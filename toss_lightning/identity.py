"""What a run depends on, as text, so that a checkpoint of another run is refused by naming the difference."""

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from toss_lightning.errors import StoreError


def settings_of(owner: object) -> str:
    """The settings of an object that a configuration can hold, as text that is the same in every process."""
    plain = (bool, int, float, str, list, tuple, dict, type(None), set, frozenset, Path, Enum, re.Pattern)
    values = {name: value for name, value in vars(owner).items() if isinstance(value, plain)}
    return ", ".join(f"{name}={_told(values[name])}" for name in sorted(values) if not name.startswith("_"))


def _told(value: object) -> str:
    """The order in which a set is listed is another in every process."""
    return ", ".join(sorted(map(repr, value))) if isinstance(value, set | frozenset) else str(value)


def check_identity(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Compares what a checkpoint depends on with what this run depends on.

    Raises:
        StoreError: a part differs.
    """
    for part, value in ours.items():
        if theirs.get(part) != value:
            raise StoreError(
                f"the checkpoint was made with another {part} ({theirs.get(part)}, now {value}), which gives other"
                " optimizer steps: resume with the same, or start a new run"
            )


def name_plugin(plugin: object | None) -> str:
    """A plug-in's class and settings, those of plug-ins inside it too; ``none`` where there is none."""
    if plugin is None:
        return "none"
    inner = [
        name_plugin(value)
        for name, value in sorted(vars(plugin).items())
        if name[0] != "_" and hasattr(value, "__dict__")
    ]
    return " ".join([type(plugin).__name__, settings_of(plugin), *(f"({one})" for one in inner)])
