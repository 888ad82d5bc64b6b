"""What is wrong in a configuration that the parser refused: one line, with the nearest valid name.

jsonargparse nests its message over many lines. So the files and the options are walked once more, in the order in which
they overlay, along the types of what they configure. Whether one value fits its type is asked of jsonargparse itself.
"""

import collections.abc
import copy
import dataclasses
import difflib
import importlib
import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
MANY = 16
"""Names that a message lists at most."""
LISTS = (list, set, collections.abc.Sequence, collections.abc.Iterable)


def explain(
    sources: Iterable[tuple[str, Mapping[str, Any]]], kinds: Mapping[str, Any], classes: Mapping[str, type]
) -> str:
    """Finds the first thing that is wrong.

    Args:
        sources: name -> content of each file, and ``--`` -> what the options say.
        kinds: top-level key -> its type.
        classes: key -> the class that is configured there where nobody names one.

    Returns:
        One line, or nothing where everything looks right from here.
    """
    walk = _Walk(dict(classes))
    for name, content in sources:
        walk.place = name
        for problem in walk.fields("", content, kinds):
            return problem
    return ""


def one_line(message: str) -> str:
    """The parser's own message, shortened, for what :func:`explain` cannot explain."""
    return " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))[:300]


def read_options(args: Sequence[str]) -> dict[str, Any]:
    """What options say, nested as in YAML. Lists and mappings are read; all other values stay text.

    Raises:
        ValueError: an argument is no option, or an option lacks its value; the message says which.
    """
    content: dict[str, Any] = {}
    rest = list(args)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise ValueError(f"unexpected argument {option!r}: an option looks like --loop.epochs 2")
        if option in ("--config", "--print_config", "--help") or option.endswith(".help"):
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{option}: needs a value")
            value = rest.pop(0)
        try:
            read: Any = yaml.safe_load(value) if value[:1] in ("[", "{") else value
        except yaml.YAMLError as error:
            raise ValueError(f"{option}: {value} is not a list or mapping (is a bracket missing?)") from error
        *path, last = option[2:].split(".")
        inner = content
        for key in path:
            inner = _opened(inner, key)
        if last.endswith("+"):
            last = last[:-1]
            read = [*(inner[last] if isinstance(inner.get(last), list) else []), read]
        inner[last] = read
    return content


def _opened(holder: Any, key: Any) -> dict[str, Any]:
    """The mapping that ``--a.b`` writes into, after ``--a Some.Class`` or ``--a+ Some.Class`` too."""
    value = holder[key] if key in holder or key == -1 else {}
    if isinstance(value, list) and value:
        return _opened(value, -1)
    holder[key] = value if isinstance(value, dict) else {"class_path": value}
    return holder[key]


class _Walk:
    """Keeps which class is configured at which key while the sources overlay."""

    def __init__(self, classes: dict[str, type]) -> None:
        self.classes, self.place = classes, "--"

    def say(self, key: str, text: str) -> str:
        """A problem, with the place where it stands in front."""
        return f"--{key}{text}" if self.place == "--" else f"{self.place}: {key}{text}"

    def fields(self, under: str, content: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
        """Problems of the keys below ``under``."""
        for name, value in content.items():
            name, _, inner = str(name).partition(".")
            key = f"{under}.{name}".lstrip(".")
            if name in known:
                yield from self.value(key, {inner: value} if inner else value, known[name])
            elif deeper := [path for path in self.paths(under, known) if path.rpartition(".")[2] == name]:
                yield self.say(key, f": no such key; did you mean {deeper[0]}?")
            elif near := _near(name, known):
                yield self.say(key, f": no such key; did you mean {f'{under}.{near}'.lstrip('.')}?")
            else:
                yield self.say(key, f": no such key; there is {_listed(known) or 'none here'}")

    def paths(self, under: str, known: Mapping[str, Any]) -> Iterator[str]:
        """Every key below ``under``, as it is configured by now."""
        for name, kind in known.items():
            key = f"{under}.{name}".lstrip(".")
            yield key
            for one in _members(kind) if key.count(".") < 4 else ():  # a class may take its own kind
                owner = self.classes.get(key, one if _is_group(one) else None)
                yield from self.paths(key, _parameters(owner)[0]) if owner else ()

    def value(self, key: str, value: Any, kind: Any) -> Iterator[str]:
        """Problems of one value, which should be of ``kind``."""
        members = _members(kind)
        groups, classes = [one for one in members if _is_group(one)], [one for one in members if _is_class(one)]
        items = [arg for one in members if typing.get_origin(one) in LISTS for arg in typing.get_args(one)]
        named = [typing.get_args(one)[1] for one in members if typing.get_origin(one) is dict and typing.get_args(one)]
        if isinstance(value, dict) and (groups or classes):
            yield from self.mapping(key, value, groups, classes)
        elif isinstance(value, dict) and named and not _fits(value, kind):
            inner = [one for name, item in value.items() for one in self.value(f"{key}.{name}", item, named[0])]
            inner = inner or [
                one for name, item in value.items() for one in self.lacking(f"{key}.{name}", item, named[0])
            ]
            yield from inner or [self.say(key, _expected(value, kind))]
        elif isinstance(value, dict) and items and not any(typing.get_origin(one) is dict for one in members):
            yield from self.value(key, value, items[0])  # of the last item of the list
        elif isinstance(value, list) and items:
            for item in value:
                yield from self.value(key, item, typing.Union[tuple(items)])  # noqa: UP007
        elif isinstance(value, str) and classes and not {str, bool} & set(members):
            if value not in (choices := _choices(members)):
                yield from self.chosen(key, value, classes, choices)
        elif groups == members or not _fits(value, kind):
            yield self.say(key, _expected(value, kind))

    def mapping(self, key: str, value: dict[str, Any], groups: list[Any], classes: list[Any]) -> Iterator[str]:
        """Problems of what configures a dataclass (``groups``) or a class given by its path (``classes``)."""
        if isinstance(path := value.get("class_path"), str):
            yield from self.chosen(key, path, [*classes, *groups])
        owner = self.classes.get(key) or next(iter(groups), None)
        if owner is None and not all(map(inspect.isabstract, classes)):
            owner = classes[0]
        if owner is None:
            yield self.say(key, f": say which class: class_path is one of {_listed(_subclasses(classes))}")
            return
        known, is_open = _parameters(owner)
        content = {name: item for name, item in value.items() if name not in CLASS_KEYS}
        content |= value["init_args"] if isinstance(value.get("init_args"), dict) else {}
        inside = {name: item for name, item in content.items() if name in known}
        if is_open and classes and not [*self.fields(key, inside, known)]:
            # a class that takes further names hands them on, and only the parser knows which there are
            named = {name: value[name] for name in ("class_path",) if name in value}
            further = {n: one for n, one in content.items() if n not in known}
            inside |= {n: one for n, one in further.items() if not _fits({**named, "init_args": {n: one}}, classes[0])}
        yield from self.fields(key, inside if is_open else content, known)

    def lacking(self, key: str, value: Any, kind: Any) -> Iterator[str]:
        """Problems of keys that a dataclass cannot do without."""
        groups = [one for one in _members(kind) if dataclasses.is_dataclass(one)]
        if not groups or not isinstance(value, dict) or _fits(value, kind):
            return
        for one in dataclasses.fields(groups[0]):
            if one.name not in value and one.default is one.default_factory is dataclasses.MISSING:
                yield self.say(f"{key}.{one.name}", ": not there: give it")

    def chosen(self, key: str, path: str, classes: Sequence[Any], choices: Sequence[str] = ()) -> Iterator[str]:
        """Takes note of a class that is named, or says why it cannot be had; ``choices`` are what else there is."""
        module, _, name = path.rpartition(".")
        known = _subclasses(classes)
        found: Any = known.get(name)
        if module:
            try:
                found = getattr(importlib.import_module(module), name, None)
            except Exception as error:  # whatever a module does while it is imported
                kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
                yield self.say(key, f": cannot import {module} ({kind}{one_line(str(error))})")
                return
        if found is None:
            names = [*([] if module else choices), *known]
            near = _near(name, names)
            where = f"no {name} in {module}" if module else f"no class {name}"
            yield self.say(key, f": {where}; " + (f"did you mean {near}?" if near else f"there is {_listed(names)}"))
        elif isinstance(found, type) and not issubclass(found, tuple(classes)):
            yield self.say(key, f": {name} is not a {classes[0].__name__}; there is {_listed(known)}")
        elif isinstance(found, type):
            self.classes[key] = found


def _near(name: str, known: Iterable[str]) -> str | None:
    by_form = {one.replace("_", "").lower(): one for one in known}
    form = name.replace("_", "").replace("-", "").lower()
    close = difflib.get_close_matches(form, by_form, 1, 0.6)
    close = close or [one for one in by_form if form.startswith(one) or one.startswith(form)]
    return by_form[close[0]] if close else None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MANY]) + (", ..." if len(names) > MANY else "")


def _members(kind: Any) -> list[Any]:
    """The types of a union; what a callable type returns stands for it."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return [member for one in typing.get_args(kind) for member in _members(one)]
    if origin is collections.abc.Callable:
        return _members(typing.get_args(kind)[-1])
    return [kind]


def _is_group(kind: Any) -> bool:
    """A fixed set of keys: a dataclass, or the Trainer."""
    return dataclasses.is_dataclass(kind) or getattr(kind, "__name__", "") == "Trainer"


def _is_class(kind: Any) -> bool:
    """A class whose subclasses are named by class_path."""
    plain = not isinstance(kind, type) or kind.__module__ in ("builtins", "datetime", "pathlib", "enum")
    return not plain and not _is_group(kind) and not typing.get_origin(kind)


def _subclasses(classes: Sequence[Any], given: bool = True) -> dict[str, type]:
    """Bare name -> class, for what can be named where one of ``classes`` is asked for."""
    found: dict[str, type] = {}
    for one in classes:
        # Lightning's own base classes are there to be derived from
        base = inspect.isabstract(one) or (given and one.__module__.startswith("lightning."))
        if not base and not one.__name__.startswith("_"):
            found[one.__name__] = one
        found |= _subclasses(one.__subclasses__(), given=False)
    return dict(sorted(found.items()))


def _parameters(owner: Any) -> tuple[dict[str, Any], bool]:
    """Names and types of what a class takes, and whether it takes further names of which nothing is known."""
    known: dict[str, Any] = {}
    makers = [base for base in inspect.getmro(owner) if "__init__" in vars(base) and base is not object]
    for base in makers:
        try:
            hints = typing.get_type_hints(vars(base)["__init__"])
        except (NameError, TypeError):
            hints = {}
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {one.kind for one in parameters}
        for one in parameters:
            if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                known.setdefault(one.name, hints.get(one.name, Any))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return known, False
    return known, bool(makers)


def _fits(value: Any, kind: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=kind)
    except ValueError:
        return True
    try:
        parser.parse_object({"value": copy.deepcopy(value)})  # which it fills in
    except (ArgumentError, TypeError, ValueError):
        return False
    return True


def _expected(value: Any, kind: Any) -> str:
    if choices := _choices(_members(kind)):
        near = _near(str(value), choices)
        return f": {value} is not one of {', '.join(choices)}" + (f"; did you mean {near}?" if near else "")
    return f": expected {_words(kind)}, got {value!r}"


def _choices(members: Sequence[Any]) -> list[str]:
    return [str(choice) for one in members if typing.get_origin(one) is Literal for choice in typing.get_args(one)]


def _words(kind: Any) -> str:
    """A type in words that stand in YAML's world."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    args = typing.get_args(kind)
    if kind in names:
        return names[kind]
    if len(members := _members(kind)) > 1:
        return " or ".join(dict.fromkeys(map(_words, members)))
    if typing.get_origin(kind) in LISTS:
        return f"a list, each {_words(args[0])}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(args)}: {', '.join(map(_words, args))}"
    if typing.get_origin(kind) is dict or _is_group(kind):
        return "keys and values"
    return "a class_path" if _is_class(kind) else re.sub(r"\b(typing|collections\.abc)\.", "", str(kind))
