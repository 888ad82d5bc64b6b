"""What a reply to a task is worth: whether it is right, or how near it comes to the row's own reply."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchmetrics import Metric

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.answers import is_right
from toss_lightning.evaluation.records import Prompt, Response
from toss_lightning.evaluation.text import rouge_l

Kind = Literal["answer", "rouge_l"]
MakeMetric = Callable[[], Metric]
"""A metric of torchmetrics that is yet to be made, for that may take a model."""
TRIAL, OTHER = "a reply of some more words than four", "nothing"
"""Texts that a metric has to tell apart before anything is trained."""


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
        """What a response is worth.

        Raises:
            ConfigError: a metric cannot compare it.
        """
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
            raise ConfigError(f"{key}.utility_value: {part}: {kind} gives one value: leave the key out")
        return RIGHT if kind == "answer" else ROUGE_L
    try:
        metric = kind()
    except Exception as error:  # a constructor may raise anything, and a model not be there
        raise ConfigError(f"{key}.utility: {_said(error)}") from error
    compare, is_likeness = _comparison(metric, part, key)
    return Utility(
        type(metric).__name__ if part is None else f"{type(metric).__name__} {part}",
        "reference",
        compare,
        better="higher" if is_likeness else "lower",
        # an error rate that is drawn up to 1 may lie above
        bounded=is_likeness and (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0),
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'it does not say why').splitlines()[0]}"


def _comparison(metric: Metric, part: str | None, key: str) -> tuple[Callable[[str, str], float | None], bool]:
    """A metric as a function of two texts, and whether more of it is better, which some metrics tell wrongly.

    Raises:
        ConfigError: see :func:`utility_of`.
    """
    for in_list in (False, True):  # some take several texts to compare a reply with, and misread a single one
        compare = _Comparison(metric, part, key, in_list)
        same, other = compare(TRIAL, TRIAL), compare(OTHER, TRIAL)
        compare("", TRIAL)  # a model may say nothing
        if same is not None and other is not None and same != other:
            return compare, same > other
    raise ConfigError(f"{key}.utility: {type(metric).__name__} gives {same} for a text and itself, and for another too")


class _Comparison:
    """A metric over one reply at a time, so that replies of two models to one prompt make a pair."""

    def __init__(self, metric: Metric, part: str | None, key: str, in_list: bool) -> None:
        self._metric, self._part, self._key, self._in_list = metric, part, key, in_list
        self._known: dict[tuple[str, str], float | None] = {}

    def __call__(self, reply: str, wanted: str) -> float | None:
        if (reply, wanted) not in self._known:
            self._known[reply, wanted] = self._compare(reply, wanted)
        return self._known[reply, wanted]

    def _compare(self, reply: str, wanted: str) -> float | None:
        name = type(self._metric).__name__
        try:
            # forward, which sums nothing up over processes: replies are compared on the first one alone
            found = self._metric([reply], [[wanted] if self._in_list else wanted])
            self._metric.reset()
        except Exception as error:  # a metric that is no metric of texts may raise anything over them
            said = f"{name} cannot compare the reply {reply[:40]!r} with a text: {_said(error)}"
            raise ConfigError(f"{self._key}.utility: {said}") from error
        value = self._one_of(found, name)
        return value if math.isfinite(value) else None

    def _one_of(self, found: Any, name: str) -> float:
        if isinstance(found, Mapping):
            if self._part not in found:
                raise ConfigError(f"{self._key}.utility_value: say which of {name}'s values counts: {', '.join(found)}")
            found = found[self._part]
        elif self._part is not None:
            raise ConfigError(f"{self._key}.utility_value: {self._part}: {name} gives one value: leave the key out")
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{self._key}.utility: {name} gives no single number: {found!r}") from error
