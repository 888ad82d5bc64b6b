"""Two processes share out the tasks of lm-evaluation-harness, and find the numbers that one does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import WORDS
from two_processes import evaluate_by_one_and_by_two

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install --editable ".[lm_eval]"')

TASKS = ["w_first", "w_second", "w_third"]


@pytest.fixture(scope="module")
def runs(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, tested by one process in ``one`` and by two in ``two``."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"asked": WORDS[at], "choices": [WORDS[at + 1], WORDS[at + 2]], "right": at % 2} for at in range(21)]
    (folder / "questions.json").write_text(json.dumps(rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks").mkdir()
    for name in TASKS:
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "description": name, **task}))
    config = {
        "data": {**tiny_sets, "batch_size": 4, "max_tokens": 40},
        "model": {"base": {"path": tiny_model, "quantization": "none"}, "lora": {"r": 4, "targets": "all-linear"}},
        "loop": {
            "plan": ["target"],
            "epochs": 1,
            "evaluation": {"lm_eval": {"tasks": TASKS, "include_path": str(folder / "tasks")}},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    evaluate_by_one_and_by_two(config, folder)
    return folder


def test_two_processes_answer_as_one(runs: Path) -> None:
    found: list[dict[str, Any]] = [
        json.loads((runs / name / "evaluation" / "evaluation.json").read_text()) for name in ("one", "two")
    ]
    assert found[0] == found[1]
    names = [one["name"] for one in found[0]["measures"] if one["set"] is not None]
    assert names == [f"acc, {task}" for task in TASKS]
    files = [
        {file.name: file.read_bytes() for file in (runs / name / "evaluation" / "lm_eval").iterdir()}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * len(TASKS)
