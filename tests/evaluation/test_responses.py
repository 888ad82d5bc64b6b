"""responses.jsonl, read back as it was written."""

import json
from pathlib import Path
from typing import Any

import pytest

from toss_lightning.data.formats import Message
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.responses import read_lines, read_responses


def line(**facts: Any) -> dict[str, Any]:
    """A line as it is written."""
    asked = {"set": "asked", "prompt_id": "1", "label": "harmful", "category": None, "context": None}
    said = {"response": "So.\u2028", "tokens": 3, "stopped": True, "verdicts": {"Judge": {"refused": False}}}
    return {"adapter": "base", **asked, "messages": [{"role": "user", "content": "How?"}], **said, **facts}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines), encoding="utf-8")
    return path


def test_lines_with_their_verdicts_and_responses_by_adapter(tmp_path: Path) -> None:
    written = [line(), line(adapter="target", response="No.")]
    path = write(tmp_path / "responses.jsonl", *written)
    assert read_lines(path) == written
    found = read_responses(path)
    assert {name: [one.text for one in of] for name, of in found.items()} == {"base": ["So.\u2028"], "target": ["No."]}
    assert found["base"][0].prompt.messages == (Message("user", "How?"),)
    assert found["base"][0].prompt.label == "harmful"


@pytest.mark.parametrize("damage", [3, [], {"adapter": "base"}])
def test_lines_that_are_none(tmp_path: Path, damage: Any) -> None:
    path = write(tmp_path / "responses.jsonl", line(), damage)
    for read in (read_lines, read_responses):
        with pytest.raises(StoreError, match=r"responses\.jsonl: not of this version: run toss test again"):
            read(path)


@pytest.mark.parametrize(
    "damage", [{"messages": 3}, {"messages": [3]}, {"messages": [{"role": "user"}]}, {"adapter": []}], ids=str
)
def test_lines_that_hold_something_else(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = write(tmp_path / "responses.jsonl", line(**damage))
    with pytest.raises(StoreError, match=r"responses\.jsonl: damaged \(.*\): run toss test again"):
        read_responses(path)


def test_a_file_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with pytest.raises(StoreError, match=r"responses\.jsonl: damaged \(.*No such file.*\): run toss test again"):
        read_lines(path)
    path.write_text("{")
    with pytest.raises(StoreError, match=r"responses\.jsonl: damaged \(.*\): run toss test again"):
        read_lines(path)
