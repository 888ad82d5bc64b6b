"""Which tasks of lm-evaluation-harness are run, and what comes out of them."""

from dataclasses import dataclass, field
from typing import Literal

from toss_lightning.errors import ConfigError
from toss_lightning.files import user_path


@dataclass(frozen=True)
class LmEval:
    """Tasks of lm-evaluation-harness, which comes with ``pip install --editable ".[lm_eval]"``."""

    tasks: list[str]
    """Names of tasks, groups or tags as lm_eval has them, or YAML files of tasks."""
    num_fewshot: int | None = None
    """Examples before each question; as the task says by default, and always where it says 0."""
    limit: int | None = None
    """Only so many questions of each task, the first ones."""
    include_path: str | None = None
    """Directory with YAML files of own tasks."""
    apply_chat_template: bool = False
    """Ask as a turn of the user, and show examples as turns; published results are mostly without."""
    batch_size: int = 8
    """Requests that a device takes at once; a batch of long ones holds the logits of all their tokens."""

    def check(self, key: str) -> None:
        """Refuses settings that cannot work.

        Args:
            key: what a message names as the place of these settings.

        Raises:
            ConfigError: no task is named, a number is too low, or a directory is not there.
        """
        if not self.tasks:
            raise ConfigError(f"{key}.tasks: no task: name some, as lm_eval ls tasks lists them")
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{key}.{name}: {value}: give {least} or more")
        if self.include_path is not None and not user_path(self.include_path).is_dir():
            raise ConfigError(f"{key}.include_path: {self.include_path}: no such directory")


@dataclass(frozen=True)
class Score:
    """What one metric says of an adapter on one task."""

    metric: str
    filter: str
    """How answers were read from replies; ``none`` for as they are."""
    better: Literal["higher", "lower"]
    values: list[float | None] | None
    """A value for each question, None where the metric has none; None alone where the score is no mean of such."""
    value: float
    stderr: float | None
    """None where lm_eval knows none."""
    n: int
    """Questions with a value."""

    @property
    def title(self) -> str:
        """Metric and filter."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


@dataclass(frozen=True)
class TaskResult:
    """What all metrics say of an adapter on one task."""

    task: str
    version: str
    """Of the task's description."""
    num_fewshot: int
    questions: int
    """Of the whole task, whatever the limit."""
    digest: str
    """Identifies the questions that were asked, as they were put, and their order."""
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Group:
    """Tasks whose questions lm_eval counts together."""

    tasks: tuple[str, ...]
    metrics: tuple[tuple[str, tuple[str, ...] | None], ...]
    """Metrics that are counted so, with their filters; None for all filters."""


@dataclass(frozen=True)
class Benchmarks:
    """What all adapters answered."""

    version: str
    """Of lm_eval."""
    tasks: tuple[str, ...]
    """Those that are told one by one."""
    groups: dict[str, Group]
    results: dict[str, dict[str, TaskResult]] = field(default_factory=dict)
    """Adapter -> task -> result."""
