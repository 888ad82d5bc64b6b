"""Runs on one and on two processes whose inside the tests of this folder look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Dense
from tiny import some_pairs, write_rows
from watched import SETUPS, on_two, watched_run

Seen = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def watched(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of ``NAME-RANKS`` of every setup."""
    folder = tmp_path_factory.mktemp("watched")
    sets = {**tiny_sets, "safety": write_rows(folder / "safety.jsonl", some_pairs(7, start=5))}
    runs = [{"model": tiny_model, "sets": sets, "folder": str(folder), "name": name} for name in SETUPS]
    for run in runs:
        watched_run(**run)
    on_two(runs, folder)
    return folder


@pytest.fixture(scope="session")
def seen(watched: Path) -> Seen:
    """What each rank of a run saw: name, number of ranks -> one for each rank."""

    def load(name: str, ranks: int) -> list[dict[str, Any]]:
        return [torch.load(watched / f"{name}-{ranks}" / f"seen-{rank}.pt") for rank in range(ranks)]

    return load


@pytest.fixture(scope="session")
def dense(tiny_model: str) -> Dense:
    """The oracle."""
    return Dense(tiny_model)
