"""A comparison: methods x seeds, and how they are run; importing this loads no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MethodSpec:
    """A method, and what is laid over the common settings for it."""

    name: str
    """What people call it."""
    configs: tuple[Path, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Its name as that of a directory."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class WinRate:
    """Whose replies are compared with the methods', and by whom."""

    judge: Mapping[str, Any]
    """The class of the judge and what it is made with, as a configuration names plug-ins."""
    against: str = "baseline"
    """``baseline`` or ``base``."""
    prompts: tuple[str, ...] = ()
    """Prompt sets; all of them where it is empty."""


@dataclass(frozen=True)
class Comparison:
    """Methods x seeds, and how they are run."""

    run_dir: Path
    """Where everything goes."""
    methods: tuple[MethodSpec, ...]
    baseline: str
    """The method that every other one is compared with, beside the base."""
    seeds: tuple[int, ...]
    configs: tuple[Path, ...] = ()
    """Laid under every method."""
    evaluation: tuple[Path, ...] = ()
    """Laid over every method; they name the prompts and the judges."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Keys of every run, over all files."""
    jobs: int = 1
    """Runs at once, as far as memory allows."""
    try_one: bool = False
    """The first run goes alone, for its peak tells how many fit at once."""
    threads: int = 1
    """Threads of each run."""
    gpus: tuple[str, ...] = ()
    """What each of the runs at once sees of the machine's GPUs; all of them where it is empty."""
    oracle: str | None = None
    """The method that stands for the best there could be; the others' shares of the way to it are told."""
    against: tuple[str, ...] = ()
    """Methods that the others are compared with beside the baseline and the base."""
    win_rate: WinRate | None = None
    """Pairs of replies are shown to a judge where this is there."""
    plot: Mapping[str, str] = field(default_factory=dict)
    """Axis -> measure."""
