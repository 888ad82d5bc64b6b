"""Fixtures that all tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model, write_sets

# One thread per test process is fastest for tiny models, and makes sums come out the same on every machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the run directory or the seed of another."""
    for name in ("TOSS_RUN_DIR", "PL_GLOBAL_SEED", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``mine`` as a user would write one; what is in it stands in ``MINE`` of the test file."""
    (tmp_path / "mine.py").write_text(request.module.MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random tiny chat model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_openers() -> Iterator[tuple[str, ...]]:
    """Beginnings of refusals in words that the tiny model knows; of the real ones it knows none."""
    openers = ("w9 w8", "w9", "w7 w1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toss_lightning.evaluation.likelihood.OPENERS", openers)
        yield openers


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of small custom, utility and harmful sets."""
    return write_sets(tmp_path_factory.mktemp("sets"))
