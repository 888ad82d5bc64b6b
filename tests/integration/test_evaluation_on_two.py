"""Two processes give the replies and the numbers that one does."""

import json
from pathlib import Path
from typing import Any

import pytest
from two_processes import evaluate_by_one_and_by_two


@pytest.fixture(scope="module")
def runs(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, tested by one process in ``one`` and by two in ``two``."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"id": f"p{at}", "prompt": f"w{at} w{at + 1}", "label": ("harmful", "benign")[at % 2]} for at in range(11)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [_chat(f"w{at}", "w5 w6 w7", "w8 " * (1 + at % 3)) for at in range(7)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = {
        "data": {**tiny_sets, "batch_size": 4, "max_tokens": 40},
        "model": {"base": {"path": tiny_model, "quantization": "none"}, "lora": {"r": 4, "targets": "all-linear"}},
        "loop": {
            "plan": ["target"],
            "epochs": 1,
            "evaluation": {
                "prompts": {"asked": str(folder / "asked.jsonl")},
                "pairs": str(folder / "pairs.jsonl"),
                "sampling": {"max_new_tokens": 4, "temperature": 2.0},
                "batch_size": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    evaluate_by_one_and_by_two(config, folder)
    return folder


def _chat(prompt: str, harmful: str, safe: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": harmful}]
    return {"messages": turns, "safe_reply": safe.strip()}


def test_two_processes_find_the_same_numbers(runs: Path) -> None:
    one, two = (
        json.loads((runs / name / "evaluation" / "evaluation.json").read_text())["measures"] for name in ("one", "two")
    )
    assert [measure["name"] for measure in one] == [measure["name"] for measure in two]
    assert "margin of the safe reply, nats per token" in [measure["name"] for measure in one]
    for ours, theirs in zip(one, two, strict=True):
        for adapter, values in ours["values"].items():
            # rows share batches with other rows, and so differ by rounding
            others = theirs["values"][adapter]
            assert [value is None for value in values] == [value is None for value in others]
            known = [value for value in values if value is not None]
            assert known == pytest.approx([value for value in others if value is not None], rel=1e-5)


def test_two_processes_draw_the_same_replies(runs: Path) -> None:
    one, two = ((runs / name / "evaluation" / "responses.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 22


def test_and_share_the_work_in_the_same_files(runs: Path) -> None:
    files = [
        {str(file.relative_to(runs / name)): file.read_bytes() for file in (runs / name).glob("evaluation/replies/*/*")}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * 6
