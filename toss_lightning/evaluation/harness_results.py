"""What lm_eval found of a task, as the file that keeps it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toss_lightning.errors import StoreError
from toss_lightning.evaluation.benchmarks import Score, TaskResult
from toss_lightning.files import digest_of


def result_text(task: Any, name: str, found: Mapping[str, Any]) -> str:
    """The content of a task's file.

    Args:
        task: the task, as lm_eval has it.
        name: what it is called.
        found: what ``lm_eval.evaluate`` returned.
    """
    samples = sorted(found["samples"][name], key=lambda one: (one["doc_id"], one["filter"]))
    metrics = {(metric, one["filter"]): None for one in samples for metric in one["metrics"]}
    kept = ("doc_id", "filter", "prompt_hash", "target", "filtered_resps")
    content = {
        "task": name,
        "version": str(found["versions"][name]),
        "num_fewshot": found["n-shot"][name],
        "questions": found["n-samples"][name]["original"],
        "scores": [_score(task, found["results"][name], samples, *one) for one in metrics],
        "samples": [{key: one[key] for key in kept} for one in samples],
    }
    return json.dumps(content, default=str, ensure_ascii=False) + "\n"


def read_result(file: Path) -> TaskResult:
    """Reads what :func:`result_text` says.

    Raises:
        StoreError: the file is not there, or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        facts = {key: content[key] for key in ("task", "version", "num_fewshot", "questions")}
        asked = [[one["doc_id"], one["prompt_hash"], one["target"]] for one in content["samples"]]
        facts["digest"] = digest_of(json.dumps(asked))
        return TaskResult(**facts, scores=tuple(Score(**one) for one in content["scores"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file}: damaged ({error}): delete it and run the test again") from error


def _score(
    task: Any, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], metric: str, kind: str
) -> dict[str, Any]:
    from lm_eval.api.metrics import mean

    of_question = {one["doc_id"]: one.get(metric) for one in samples if one["filter"] == kind}
    is_mean = task.aggregation().get(metric, mean) is mean
    stderr = results[f"{metric}_stderr,{kind}"]
    return {
        "metric": metric,
        "filter": kind,
        "better": "lower" if task.higher_is_better().get(metric) is False else "higher",
        "values": [_number(value) for value in of_question.values()] if is_mean else None,
        "value": float(results[f"{metric},{kind}"]),
        "stderr": None if isinstance(stderr, str) else float(stderr),
        "n": sum(value is not None for value in of_question.values()),
    }


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
