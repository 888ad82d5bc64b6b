"""From results of lm-evaluation-harness to measures of utility."""

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

from toss_lightning.evaluation.benchmarks import Benchmarks, Group, Score, TaskResult
from toss_lightning.evaluation.results import Measure

Z = NormalDist().inv_cdf(0.975)


def benchmark_measures(found: Benchmarks) -> list[Measure]:
    """A measure for each metric of each task, and of each group over all its questions."""
    measures = []
    for task in found.tasks:
        by_adapter = {adapter: of[task].scores for adapter, of in found.results.items()}
        for scores in zip(*by_adapter.values(), strict=True):
            measures.append(_measure(task, dict(zip(by_adapter, scores, strict=True))))
    for name, group in found.groups.items():
        pooled = {adapter: list(_pooled(group, of)) for adapter, of in found.results.items()}
        for scores in zip(*pooled.values(), strict=True):
            measures.append(_measure(name, dict(zip(pooled, scores, strict=True))))
    return measures


def benchmark_facts(found: Benchmarks) -> dict[str, Any]:
    """What was asked, as plain values, for ``evaluation.json``."""
    results = next(iter(found.results.values()))
    tasks = {
        name: {
            "version": one.version,
            "num_fewshot": one.num_fewshot,
            "asked": max(score.n for score in one.scores),
            "questions": one.questions,
        }
        for name, one in results.items()
    }
    groups = {name: list(group.tasks) for name, group in found.groups.items()}
    return {"version": found.version, "tasks": tasks, "groups": groups}


def digest_questions(found: Benchmarks) -> dict[str, str]:
    """Identifies the questions of each task, beside :func:`toss_lightning.evaluation.prompts.digest_asked`."""
    # a prompt set may be called as a task is
    return {f"lm_eval: {name}": one.digest for name, one in next(iter(found.results.values())).items()}


def _pooled(group: Group, results: Mapping[str, TaskResult]) -> Iterator[Score]:
    """The scores of a group: each over the questions of all tasks that have it."""
    scores = [score for task in group.tasks for score in results[task].scores]
    for metric, filters in group.metrics:
        for kind in filters or dict.fromkeys(score.filter for score in scores if score.metric == metric):
            parts = [score for score in scores if (score.metric, score.filter) == (metric, kind)]
            values = [value for score in parts if score.values is not None for value in score.values]
            known = [value for value in values if value is not None]
            if known:
                yield Score(metric, kind, parts[0].better, values, sum(known) / len(known), None, len(known))


def _measure(name: str, scores: Mapping[str, Score]) -> Measure:
    first = next(iter(scores.values()))
    title = f"{first.title}, {name}"
    values = {adapter: one.values for adapter, one in scores.items() if one.values is not None}
    if values:
        share = all(value in (0, 1, None) for of in values.values() for value in of)
        return Measure(title, first.better, values, share, set=name, utility=True)
    alone: dict[str, list[float | None]] = {adapter: [_finite(one.value)] for adapter, one in scores.items()}
    intervals = {adapter: _interval(one) for adapter, one in scores.items()}
    return Measure(title, first.better, alone, False, set=name, utility=True, intervals=intervals)


def _interval(score: Score) -> dict[str, Any]:
    """By the standard error that lm_eval drew."""
    value = _finite(score.value)
    if value is None or score.stderr is None or not math.isfinite(score.stderr):
        return {"value": value, "low": None, "high": None, "n": score.n, "undecided": int(value is None)}
    reach = Z * score.stderr
    return {"value": value, "low": value - reach, "high": value + reach, "n": score.n, "undecided": 0}


def _finite(value: float) -> float | None:
    """A score that is no number, as half precision may give, is undecided."""
    return value if math.isfinite(value) else None
