"""What a run's settings are, read from its files as the command line overlays them; importing this loads no torch.

The parser that knows every default needs torch. What is asked here needs no defaults: the plan, whether a run was made
from other settings, and in which settings methods differ.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from toss_lightning.errors import ConfigError
from toss_lightning.files import digest_of, digest_of_file

DEFAULT_PLAN = ("utility", "degraded", "score", "select", "target")
"""The plan where no file names one; that of the loop."""
CONTROL = "sft"
"""A step of a plan that trains a control beside the target: another method of the comparison does so here."""
OWN = (
    *("loop.class_path", "loop.plan", "loop.selection", "loop.rounds", "loop.promote", "loop.promotion"),
    *("loop.promote_again", "loop.refit", "loop.stop_early", "model.correction", "data.mixture"),
    *("loop.scores_from", "loop.scores_round", "loop.selection_from", "model.references"),
)
"""Keys that make a method what it is, or give it what it would make itself."""
GIVEN = ("loop.scores_from", "loop.selection_from", "model.references.utility", "model.references.degraded")
"""Keys that give a method what it would otherwise take time to make."""
CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
"""A class that is named by its path."""
MANAGED = ("run_dir", "ckpt_path", "seed_everything", "loop.plan")
"""Keys that the comparison gives every run, whatever its files say."""

Flat = dict[str, Any]


def flatten(content: Mapping[str, Any], under: str = "") -> Flat:
    """Dotted keys -> values, as options of the command line would name them: without ``init_args``."""
    flat: Flat = {}
    for name, value in content.items():
        key = under if name == "init_args" else f"{under}.{name}".lstrip(".")
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, key)
        else:
            flat[key] = value
    return flat


def find_plan(overlays: Sequence[Flat], name: str) -> list[str]:
    """The plan of a method, with the step ``test`` at its end and without the control.

    Args:
        overlays: the settings, the later ones winning.
        name: the method.

    Raises:
        ConfigError: the plan has no target, or no file names it and the loop is one of the user's.
    """
    named = [flat["loop.plan"] for flat in overlays if flat.get("loop.plan")]
    loop = [str(flat["loop.class_path"]) for flat in overlays if flat.get("loop.class_path")]
    if not named and loop and loop[-1].rpartition(".")[2] not in ("TossLoop", "TossProLoop"):
        raise ConfigError(f"methods.{name}: {loop[-1]} has a plan that no file names: add loop.plan to its set")
    plan = named[-1] if named else list(DEFAULT_PLAN)
    if not isinstance(plan, list) or "target" not in plan:
        raise ConfigError(f"methods.{name}: its plan {plan} has no step target, so there is nothing to compare: add it")
    return [*(step for step in plan if step not in (CONTROL, "test")), "test"]


def fingerprint(overlays: Sequence[Flat], plan: Sequence[str], seed: int) -> dict[str, str]:
    """Identifies what a run is trained from, and what it is asked afterwards.

    Files that the settings name count with their content, and so does the file of a class that is not of this package;
    directories and hub datasets count with their name.

    Raises:
        ConfigError: such a file cannot be read.
    """
    parts: dict[str, list[Any]] = {"training": [list(plan), seed], "evaluation": []}
    for flat in overlays:
        for key, value in flat.items():
            if key not in MANAGED:
                part = "evaluation" if key.startswith("loop.evaluation") else "training"
                try:
                    parts[part].append([key, value, _content(value)])
                except OSError as error:
                    raise ConfigError(
                        f"{key}: {error.filename or value}: cannot be read ({error.strerror}): give a file that can be"
                        " read"
                    ) from error
    return {part: digest_of(json.dumps(facts, default=str)) for part, facts in parts.items()}


def given(methods: Mapping[str, Sequence[Flat]]) -> list[str]:
    """Methods that are given what others make: name -> its settings, the later ones winning."""
    merged = {name: _merge(overlays) for name, overlays in methods.items()}
    return [name for name, flat in merged.items() if any(flat.get(key) for key in GIVEN)]


def differing(methods: Mapping[str, Sequence[Flat]]) -> dict[str, dict[str, Any]]:
    """Settings in which methods differ beside those that make them what they are.

    A difference in these says nothing of the methods: ``toss`` over ``demo`` brings a learning rate of its own.

    Args:
        methods: name -> its settings, the later ones winning.

    Returns:
        Key -> method -> value; "default" where no file says.
    """
    merged = {name: _merge(overlays) for name, overlays in methods.items()}
    keys = sorted({key for flat in merged.values() for key in flat})
    found = {}
    for key in keys:
        if key in MANAGED or any(key == own or key.startswith(f"{own}.") for own in OWN):
            continue
        values = {name: flat.get(key, "default") for name, flat in merged.items()}
        if len({json.dumps(value, default=str) for value in values.values()}) > 1:
            found[key] = values
    return found


def say_differing(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The same in words, a line for each key."""
    lines = []
    for key, values in found.items():
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            groups.setdefault(str(value), []).append(name)
        lines.append(f"{key}: " + "; ".join(f"{value} in {', '.join(names)}" for value, names in groups.items()))
    return lines


def _merge(overlays: Sequence[Flat]) -> Flat:
    merged: Flat = {}
    for flat in overlays:
        merged |= flat
    return merged


def _content(value: Any) -> list[str]:
    """Digests of the files that a value names, itself or as a class that stands in one."""
    if isinstance(value, list | tuple):
        return [one for inner in value for one in _content(inner)]
    if isinstance(value, Mapping):
        return [one for inner in value.values() for one in _content(inner)]
    if not isinstance(value, str):
        return []
    file = value if _is_file(value) else _source_of(value)
    return [] if file is None else [digest_of_file(file)]


def _source_of(name: str) -> str | None:
    """The file of a class that is named by its path; nothing is imported."""
    parts = name.split(".")
    if not CLASS.fullmatch(name) or parts[0] == __name__.partition(".")[0]:
        return None
    # runs are started as python -m, which looks here first
    places: Sequence[str] = [os.getcwd(), *sys.path]
    file = None
    for part in parts[:-1]:
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            break
        file, places = spec.origin, spec.submodule_search_locations or []
    return file if file is not None and _is_file(file) else None


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (ValueError, RuntimeError):  # a zero byte, no such home
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
