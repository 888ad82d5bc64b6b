"""Reads a comparison from its file, and refuses what cannot work; importing this loads no torch."""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from toss_lightning.compare.comparison import Comparison, MethodSpec, WinRate
from toss_lightning.compare.settings import flatten
from toss_lightning.config_files import find_config, read_config
from toss_lightning.errors import ConfigError
from toss_lightning.files import user_path

KEYS = (
    *("run_dir", "configs", "set", "seeds", "jobs", "threads", "gpus"),
    *("evaluation", "methods", "baseline", "oracle", "against", "win_rate", "plot"),
)
NEEDED = ("run_dir", "seeds", "methods", "baseline")
OURS = ("run_dir", "ckpt_path", "seed_everything", "config", "loop.evaluation.adapters", "loop.evaluation.cache")
"""Keys of a run that the comparison sets."""
TAKEN = ("logs", "cache", "earlier")
"""Directories of a comparison that are no method's."""


def load_comparison(path: Path, options: Mapping[str, str] | None = None) -> Comparison:
    """Reads a comparison and checks everything that can be checked before a run.

    Args:
        path: its file.
        options: keys of the file that the command line gives instead, as text.

    Raises:
        ConfigError: the file cannot be read, or a key or a value cannot work.
    """
    content = read_config(path)
    for key in _repeated(yaml.compose(path.read_text(encoding="utf-8"))):
        raise ConfigError(f"{path}: {key}: stands twice, and only the last one would count: rename or remove one")
    return _Reader(str(path), content, options or {}).comparison()


class _Reader:
    """Turns the content of a file into a comparison; every complaint names file and key."""

    def __init__(self, path: str, content: dict[str, Any], options: Mapping[str, str]) -> None:
        self.path, self.options = path, options
        self.content = content | {key: self._option(key, text) for key, text in options.items()}

    def _option(self, key: str, text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: {text} is not a value (is a bracket missing?)") from error

    def wrong(self, key: str, text: str) -> ConfigError:
        """A complaint."""
        if key.partition(".")[0] in self.options:
            return ConfigError(f"--{key}: {text}")
        return ConfigError(f"{self.path}: {key}: {text}")

    def comparison(self) -> Comparison:
        """The whole, checked."""
        self._known("", self.content, KEYS)
        for key in NEEDED:
            if self.content.get(key) in (None, "", [], {}):
                raise self.wrong(key, "nothing there: " + _SAYS[key])
        if not isinstance(self.content["run_dir"], str):
            raise self.wrong("run_dir", f"{self.content['run_dir']!r} is no path: give one, such as runs/compare")
        methods = self._methods()
        seeds, gpus = self._seeds(), self._gpus()
        is_auto = self.content.get("jobs") == "auto"
        # no more than there are runs, for the cores are shared out over them
        most = min(len(gpus) or os.cpu_count() or 1, len(methods) * len(seeds))
        jobs = most if is_auto else self._count("jobs", 1, ", or auto")
        found = Comparison(
            run_dir=user_path(self.content["run_dir"]),
            methods=methods,
            baseline=self._named("baseline", methods),
            seeds=seeds,
            configs=self._configs("configs", self.content.get("configs")),
            evaluation=self._configs("evaluation", self.content.get("evaluation")),
            set=self._set("set", self.content.get("set")),
            jobs=jobs,
            try_one=is_auto,
            threads=self._count("threads", max(1, (os.cpu_count() or 1) // jobs)),
            gpus=gpus,
            oracle=self._oracle(methods),
            against=self._against(methods),
            win_rate=self._win_rate(),
            plot=self._plot(),
        )
        self._evaluated(found)
        return found

    def _known(self, under: str, content: Mapping[Any, Any], known: Sequence[str]) -> None:
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"
                raise self.wrong(f"{under}{key}", f"no such key; {hint}")

    def _methods(self) -> tuple[MethodSpec, ...]:
        content = self.content["methods"]
        if not isinstance(content, dict):
            raise self.wrong("methods", f"expected names, each with its configuration, got {content!r}")
        methods = tuple(self._method(str(name), value) for name, value in content.items())
        slugs: dict[str, str] = {}
        for one in methods:
            key = f"methods.{one.name}"
            if not one.slug or one.slug in TAKEN:
                raise self.wrong(key, "its directory needs another name: use letters and digits, and rename it")
            if one.name.lower() in ("base", "base model"):
                raise self.wrong(key, "that is what the model before training is called: rename it")
            if one.slug in slugs:
                raise self.wrong(key, f"would share the directory {one.slug} with {slugs[one.slug]!r}: rename one")
            slugs[one.slug] = one.name
        return methods

    def _method(self, name: str, value: Any) -> MethodSpec:
        key = f"methods.{name}"
        if not isinstance(value, dict):
            return MethodSpec(name, self._configs(key, value))
        self._known(f"{key}.", value, ("configs", "set"))
        configs = self._configs(f"{key}.configs", value.get("configs"))
        return MethodSpec(name, configs, self._set(f"{key}.set", value.get("set")))

    def _configs(self, key: str, value: Any) -> tuple[Path, ...]:
        names = [] if value is None else value if isinstance(value, list) else [value]
        found = []
        for name in names:
            if not isinstance(name, str):
                raise self.wrong(key, f"expected names of configuration files, got {name!r}")
            try:
                found.append(find_config(name))
                read_config(found[-1])
            except ConfigError as error:
                raise self.wrong(key, str(error).removeprefix("--config ")) from error
        return tuple(found)

    def _set(self, key: str, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, f"expected keys and values, such as {{loop.epochs: 1}}, got {value!r}")
        for name, inner in value.items():
            if isinstance(inner, dict) and "." not in str(name):
                raise self.wrong(
                    f"{key}.{name}", f"write the whole key, such as {name}.{next(iter(inner), 'key')}: ..."
                )
            try:
                json.dumps(inner)
            except TypeError as error:
                what = f"{inner} holds what is no text, number, list or mapping, such as a date: put it in quotes"
                raise self.wrong(f"{key}.{name}", what) from error
            if name in OURS:
                raise self.wrong(f"{key}.{name}", "the comparison sets it for each run: leave it out")
            if name == "loop.plan" and "target" not in _words(inner):
                raise self.wrong(f"{key}.{name}", "a plan without target trains nothing to compare: add it")
        return {str(name): inner for name, inner in value.items()}

    def _seeds(self) -> tuple[int, ...]:
        seeds = self.content["seeds"]
        seeds = seeds if isinstance(seeds, list) else [seeds]
        for seed in seeds:
            if type(seed) is not int or seed < 0:
                raise self.wrong("seeds", f"{seed!r} is no seed: give whole numbers, such as [1, 2, 3]")
            if seeds.count(seed) > 1:
                raise self.wrong("seeds", f"{seed} stands twice: leave one out")
        return tuple(seeds)

    def _count(self, key: str, otherwise: int, or_what: str = "") -> int:
        value = self.content.get(key)
        if value is None:
            return otherwise
        if type(value) is not int or value < 1:
            raise self.wrong(key, f"{value!r}: give a whole number of 1 or more{or_what}")
        return value

    def _gpus(self) -> tuple[str, ...]:
        value = self.content.get("gpus")
        values = [] if value is None else value if isinstance(value, list) else [value]
        for one in values:
            if type(one) not in (int, str):
                raise self.wrong("gpus", f"{one!r} is no GPU: give numbers, such as [0, 1]")
        return tuple(str(one) for one in values)

    def _plot(self) -> dict[str, str]:
        value = self.content.get("plot") or {}
        if not isinstance(value, dict):
            raise self.wrong("plot", f"expected a measure for x and for y, got {value!r}")
        self._known("plot.", value, ("x", "y"))
        return {axis: str(measure) for axis, measure in value.items() if measure is not None}

    def _win_rate(self) -> WinRate | None:
        value = self.content.get("win_rate")
        if value is None:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("judge"), dict):
            example = "{judge: {class_path: PairwiseJudge, init_args: {backend: ...}}}"
            raise self.wrong("win_rate", f"expected who compares the replies, such as {example}, got {value!r}")
        self._known("win_rate.", value, ("judge", "against", "prompts"))
        if (against := value.get("against") or "baseline") not in ("baseline", "base"):
            raise self.wrong("win_rate.against", f"{against!r}: give baseline or base")
        prompts = value.get("prompts") or []
        prompts = prompts if isinstance(prompts, list) else [prompts]
        return WinRate(value["judge"], against, tuple(map(str, prompts)))

    def _named(self, key: str, methods: Sequence[MethodSpec], value: Any = None) -> str:
        names = [one.name for one in methods]
        name = str(self.content[key] if value is None else value)
        if name not in names:
            raise self.wrong(key, f"{name!r} is none of the methods; {_hint(name, names)}")
        return name

    def _oracle(self, methods: Sequence[MethodSpec]) -> str | None:
        if self.content.get("oracle") is None:
            return None
        oracle = self._named("oracle", methods)
        if oracle == str(self.content["baseline"]):
            raise self.wrong(
                "oracle", f"{oracle!r} is the baseline, to which it has no gap: name another, or leave it out"
            )
        return oracle

    def _against(self, methods: Sequence[MethodSpec]) -> tuple[str, ...]:
        value = self.content.get("against")
        values = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(self._named("against", methods, one) for one in values))

    def _evaluated(self, found: Comparison) -> None:
        """Refuses an evaluation of one method's own, and one that asks nothing: every run is asked the same.

        Raises:
            ConfigError: a method has one, nothing is asked, or a win rate has no prompts or unknown ones.
        """
        for one in found.methods:
            places = [(f"methods.{one.name}.set", one.set)]
            places += [(f"methods.{one.name}: {path}", read_config(path)) for path in one.configs]
            for key, content in places:
                if any(name.startswith("loop.evaluation") for name in flatten(content)):
                    raise self.wrong(key, "has loop.evaluation, which all methods must share: put it into evaluation")
        contents = [*(read_config(path) for path in (*found.configs, *found.evaluation)), found.set]
        keys = [list(flatten(content)) for content in contents]
        if not any(key.startswith("loop.evaluation.") for of in keys for key in of):
            raise self.wrong("evaluation", "no prompts: name a file with loop.evaluation, such as evaluation/demo")
        there = "loop.evaluation.prompts."
        named = [[key.removeprefix(there).partition(".")[0] for key in of if key.startswith(there)] for of in keys]
        # those of one file stand in place of those of the files before it
        sets = sorted({*next((of for of in reversed(named[:-1]) if of), []), *named[-1]})
        if found.win_rate and not sets:
            raise self.wrong("win_rate", "the evaluation has no prompts, so there are no replies to compare: name some")
        for name in found.win_rate.prompts if found.win_rate else ():
            if name not in sets:
                raise self.wrong("win_rate.prompts", f"{name!r} is none of its prompt sets; {_hint(name, sets)}")


_SAYS = {
    "run_dir": "give the directory where everything goes, such as runs/compare",
    "seeds": "give at least one, such as [1, 2, 3]",
    "methods": "give names, each with its configuration, such as {plain SFT: methods/sft}",
    "baseline": "name the method that the others are compared with",
}


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"


def _words(plan: Any) -> list[str]:
    return [str(step) for step in plan] if isinstance(plan, list) else []


def _repeated(node: yaml.Node | None, under: str = "") -> Iterator[str]:
    """Keys that stand twice in one mapping, of which YAML would take the last without a word."""
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        for at, (_, value) in enumerate(node.value):
            key = f"{under}.{names[at]}".lstrip(".")
            if names[at] in names[:at]:
                yield key
            yield from _repeated(value, key)
