"""What a reply to a task is worth: whether it is right, or how near it comes to the row's own reply."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric
from torchmetrics.text import BLEUScore, CHRFScore, ROUGEScore, SacreBLEUScore, WordInfoPreserved

from toss_lightning.errors import ConfigError, first_line
from toss_lightning.evaluation.answers import is_right
from toss_lightning.evaluation.records import Prompt, Response
from toss_lightning.evaluation.text import rouge_l

Kind = Literal["answer", "rouge_l"]
NULL = "leave the key out, or with a run's own configuration beneath, set it to null"
"""What to do about a key that says nothing here."""
MakeMetric = Callable[[], Metric]
"""A metric of torchmetrics that is yet to be made, for that may take a model."""
TRIAL = "a text of more words than any metric of this kind reads at once, so that it finds them all again"
OTHER = "nothing"
"""Not the same; a metric has to tell them apart before anything is trained."""
SILENCE = "-"
"""Stands for an empty reply, which some metrics take for a perfect one, and some for none."""
BOUNDED = (BLEUScore, CHRFScore, ROUGEScore, SacreBLEUScore, WordInfoPreserved)
"""Metrics from 0 to 1; the limits that others are drawn between are not theirs."""


@dataclass(frozen=True)
class Utility:
    """How replies to a prompt set are compared with what its rows hold."""

    title: str
    """What tables call it."""
    column: Literal["answer", "reference"]
    """The field of a prompt that replies are compared with."""
    compare: Callable[[str, str], float | None]
    """Of a reply and what is wanted, what it is worth; None where that is no number."""
    better: Literal["higher", "lower"] = "higher"
    share: bool = False
    """Worths are 0 and 1."""
    bounded: bool = True
    """Worths lie between 0 and 1, but need be neither."""

    def wanted(self, prompt: Prompt) -> str:
        """What replies to this prompt are compared with."""
        return str(getattr(prompt, self.column))

    def worth(self, response: Response) -> float | None:
        """What a response is worth; None where that cannot be told."""
        return self.compare(response.text, self.wanted(response.prompt))


RIGHT = Utility("right answers", "answer", lambda reply, answer: float(is_right(reply, answer)), share=True)
ROUGE_L = Utility("ROUGE-L", "reference", rouge_l)


def utility_of(kind: Kind | MakeMetric, part: str | None, key: str) -> Utility:
    """Looks up a way to compare, or makes one of a metric.

    Args:
        kind: what is asked for.
        part: which one of a metric's values counts, where it gives several.
        key: the prompt set, as the configuration names it.

    Raises:
        ConfigError: the metric cannot be made, does not compare texts, or says nothing that can be compared.
    """
    if isinstance(kind, str):
        if part is not None:
            raise ConfigError(f"{key}.utility_value: {part}: {kind} gives one value: {NULL}")
        return RIGHT if kind == "answer" else ROUGE_L
    try:
        metric = kind()
    except Exception as error:  # a constructor may raise anything, and a model not be there
        raise ConfigError(f"{key}.utility: {first_line(error)}") from error
    metric.dist_sync_on_step = False  # replies are compared on the first process alone
    compare, is_likeness = _comparison(metric, part, key)
    return Utility(
        type(metric).__name__ if part is None else f"{type(metric).__name__} {part}",
        "reference",
        compare,
        better="higher" if is_likeness else "lower",
        bounded=isinstance(metric, BOUNDED),
    )


def _comparison(metric: Metric, part: str | None, key: str) -> tuple[Callable[[str, str], float | None], bool]:
    """A metric as a function of two texts, and whether more of it is better, which some metrics tell wrongly.

    Raises:
        ConfigError: see :func:`utility_of`.
    """
    name, problems = type(metric).__name__, []
    for in_list in (False, True):  # some take several texts to compare a reply with, and misread a single one
        compare = _Comparison(metric, part, key, in_list)
        try:
            same, other, silent = (compare.of(reply, TRIAL) for reply in (TRIAL, OTHER, ""))
        except ConfigError as error:
            problems.append(error)
            continue
        if same is None or other is None or silent is None or same in (other, silent):
            told = f"{name} gives {same} for a text and itself, {other} for another, {silent} for none"
            problems.append(ConfigError(f"{key}.utility: {told}"))
        else:
            return compare, same > other
    raise problems[0]


class _Comparison:
    """A metric over one reply at a time, so that replies of two models to one prompt make a pair."""

    def __init__(self, metric: Metric, part: str | None, key: str, in_list: bool) -> None:
        self._metric, self._part, self._key, self._in_list = metric, part, key, in_list
        self._known: dict[tuple[str, str], float | None] = {}

    def __call__(self, reply: str, wanted: str) -> float | None:
        """What a reply is worth; None, with a warning, where the metric fails on it: that costs no other number."""
        if (reply, wanted) not in self._known:
            try:
                self._known[reply, wanted] = self.of(reply, wanted)
            except ConfigError as error:
                self._known[reply, wanted] = None
                rank_zero_warn(f"{error}; it is left undecided")
        return self._known[reply, wanted]

    def of(self, reply: str, wanted: str) -> float | None:
        """The value for a reply, None where it is no number.

        Raises:
            ConfigError: the metric fails, or gives something else.
        """
        name = type(self._metric).__name__
        try:
            found = self._metric([reply if reply.strip() else SILENCE], [[wanted] if self._in_list else wanted])
        except Exception as error:  # a metric that is no metric of texts may raise anything over them
            said = f"{name} cannot compare the reply {reply[:40]!r} with a text: {first_line(error)}"
            raise ConfigError(f"{self._key}.utility: {said}") from error
        finally:
            self._metric.reset()
        value = self._one_of(found, name)
        if not math.isfinite(value):
            return None
        return min(1.0, max(0.0, value)) if isinstance(self._metric, BOUNDED) else value  # but for rounding

    def _one_of(self, found: Any, name: str) -> float:
        if isinstance(found, Mapping):
            if self._part not in found:
                raise ConfigError(f"{self._key}.utility_value: say which of {name}'s values counts: {', '.join(found)}")
            found = found[self._part]
        elif self._part is not None:
            raise ConfigError(f"{self._key}.utility_value: {self._part}: {name} gives one value: {NULL}")
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{self._key}.utility: {name} gives no single number: {found!r}") from error
