"""What the configuration parser complains about, in one line with the nearest valid name."""

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

UNKNOWN_KEY = (
    re.compile(r"Option '([\w.]+)' is not accepted"),
    re.compile(r"does not accept option '([\w.]+)'"),
    re.compile(r"unrecognized arguments: --([\w.]+)"),
)
UNKNOWN_CLASS = (
    re.compile(r"Expected a dot import path string: (\S+)"),
    re.compile(r"(?:Problem with given class_path|Unable to import|No module named|Import path) '([\w.]+)'"),
)
WRONG_VALUE = re.compile(r"Expected a (?:<class '(\w+)'>|(.+?))\. Got value: (.+)")


def explain(message: str, parser: Any, classes: Mapping[str, type]) -> str:
    """Turns a parser's error into one line.

    Args:
        message: what jsonargparse says, often nested over many lines.
        parser: the subcommand's parser, for the keys that there are.
        classes: bare name -> class, for the class paths that there are.
    """
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    for pattern in UNKNOWN_KEY:
        if found := pattern.search(message):
            return _unknown_key(found[1], message, keys[0] if keys else "", parser, classes)
    values = list(WRONG_VALUE.finditer(message))
    if values and (len(keys) > 1 or "import path" not in message):
        kind, value = values[-1][1] or values[-1][2], values[-1][3].strip()
        return f"{'.'.join(keys)}: expected {kind}, got {value!r}"
    for pattern in UNKNOWN_CLASS:
        if found := pattern.search(message):
            where = ".".join(dict.fromkeys(keys)) or "class_path"
            return f"{where}: no class {found[1]!r}{_nearest(found[1].rpartition('.')[2], classes)}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    return " ".join(lines[:3])


def _unknown_key(key: str, message: str, under: str, parser: Any, classes: Mapping[str, type]) -> str:
    if group := re.search(r"Group '([\w.]+)' does not accept option", message):
        key = f"{group[1]}.{key}"
    inside = re.findall(r"Problem with given class_path '([\w.]+)'", message)
    if inside and inside[-1].rpartition(".")[2] in classes:
        owner = inside[-1].rpartition(".")[2]
        known = list(_parameters(classes[owner]))
        return f"{under}: {owner} has no {key!r}{_nearest(key, known)}"
    known = [*parser.get_defaults().keys(), "model", "data", "loop", "trainer", "config"]
    return f"unknown key {key!r}{_nearest(key, known)}"


def _parameters(owner: type) -> Iterator[str]:
    """Names of what a class takes, fields of its dataclass arguments included."""
    hints = typing.get_type_hints(owner.__init__)
    for name in inspect.signature(owner).parameters:
        yield name
        kind = hints.get(name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from (f"{name}.{field.name}" for field in dataclasses.fields(kind))


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not close:
        last = {str(item).rpartition(".")[2]: str(item) for item in known}
        close = [last[item] for item in difflib.get_close_matches(name.rpartition(".")[2], list(last), 1, 0.5)]
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(sorted(map(str, known))[:12])}"
