"""What a run depends on, as text, so that a checkpoint of another run is refused by naming the difference."""

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from toss_lightning.errors import StoreError

PLAIN = (bool, int, float, str, list, tuple, dict, type(None), set, frozenset, Path, Enum, re.Pattern, np.ndarray)
"""What a setting may be; a list, tuple or dict may hold plug-ins."""


def settings_of(owner: object) -> str:
    """The settings of an object that a configuration can hold, as text that is the same in every process."""
    values = {name: value for name, value in vars(owner).items() if isinstance(value, PLAIN)}
    return ", ".join(f"{name}={_told(values[name])}" for name in sorted(values) if not name.startswith("_"))


def _told(value: Any) -> str:
    if isinstance(value, set | frozenset):
        # the order in which a set is listed is another in every process
        return ", ".join(sorted(map(repr, value)))
    if isinstance(value, np.ndarray):
        # printed in full it could be long, and in short be that of another one
        return f"{value.dtype}{value.shape} {hashlib.blake2b(value.tobytes(), digest_size=12).hexdigest()}"
    if isinstance(value, list | tuple) and any(map(is_plugin, value)):
        return f"[{', '.join(name_plugin(one) if is_plugin(one) else _told(one) for one in value)}]"
    if isinstance(value, dict) and any(map(is_plugin, value.values())):
        return f"{{{', '.join(f'{key}: {_told([one])}' for key, one in value.items())}}}"
    return str(value)


def is_plugin(value: object) -> bool:
    """Whether a value has settings of its own, which :func:`name_plugin` tells."""
    return hasattr(value, "__dict__") and not isinstance(value, PLAIN)


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
    inner = [name_plugin(value) for name, value in sorted(vars(plugin).items()) if name[0] != "_" and is_plugin(value)]
    return " ".join([type(plugin).__name__, settings_of(plugin), *(f"({one})" for one in inner)])


def identify(plugin: object | None) -> str:
    """A plug-in as :func:`name_plugin` tells it, with the code of classes of one's own, which may be edited."""
    told = name_plugin(plugin)
    if plugin is None:
        return told
    code = {f"{kind.__module__}.{kind.__qualname__}": code_of(kind) for part in parts_of(plugin) for kind in own(part)}
    digests = [
        f"{name} {hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}" for name, text in code.items() if text
    ]
    return f"{told}, code of {', '.join(digests)}" if digests else told


def parts_of(plugin: object) -> Iterator[object]:
    """A plug-in, and those that its settings hold."""
    yield plugin
    for name, value in sorted(vars(plugin).items()):
        if name[0] != "_":
            held = [*value.values()] if isinstance(value, dict) else value
            for one in filter(is_plugin, held if isinstance(held, list | tuple) else [held]):
                yield from parts_of(one)


def own(plugin: object) -> Iterator[type]:
    """The classes of a plug-in that do not come with this package, from its own up."""
    for kind in type(plugin).__mro__:
        if kind.__module__.partition(".")[0] in (__name__.partition(".")[0], "builtins"):
            break
        yield kind


@cache
def code_of(kind: type) -> str | None:
    """The file of a class, which may hold its phrases and its helpers; None of one that was typed at a prompt.

    It is as it was when it was first asked for, which is what this process runs.
    """
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):
        return None
