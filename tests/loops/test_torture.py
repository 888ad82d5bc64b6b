"""A run that is killed at any moment and resumed leaves the same bytes as one that was left alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import programs
import pytest
from torture import KINDS

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Kills of a tiny TOSS-Pro run, in a process of its own, since it forks."""
    work = tmp_path_factory.mktemp("kills") / "work"
    done = programs.run([str(TESTS / "torture.py"), str(work), "--each", "2"], timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_in_any_kind_of_work_ends_in_the_same_bytes(outcomes: list[dict[str, Any]], kind: str) -> None:
    hit = [outcome for outcome in outcomes if kind in outcome["killed in"]]
    assert len(hit) >= 2
    for outcome in hit:
        assert outcome["differences"] == []


def test_a_dozen_kills_and_no_difference(outcomes: list[dict[str, Any]]) -> None:
    assert Counter(kind for outcome in outcomes for kind in outcome["killed in"]).total() >= 12
    assert not any(outcome["differences"] for outcome in outcomes)
