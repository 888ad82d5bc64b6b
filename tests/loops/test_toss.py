"""What toss test calls the adapters of a run that has not come to its end."""

import json
import shutil
from pathlib import Path

import pytest
from runs import tiny_fit

from toss_lightning.errors import StoreError
from toss_lightning.evaluation import Evaluation, KeywordJudge
from toss_lightning.models.generation import Sampling


@pytest.fixture(scope="module")
def killed(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of TOSS that was killed behind its target, before it wrote summary.json."""
    run_dir = tmp_path_factory.mktemp("killed")
    tiny_fit(tiny_model, tiny_sets, run_dir, loop={"epochs": 1})
    (run_dir / "summary.json").unlink()
    return run_dir


def asked(folder: Path) -> Evaluation:
    """One prompt, and a judge that needs no model."""
    (folder / "asked.jsonl").write_text(json.dumps({"prompt": "w1 w2", "label": "harmful"}) + "\n")
    sampling = Sampling(max_new_tokens=2)
    return Evaluation(prompts={"asked": str(folder / "asked.jsonl")}, judges=[KeywordJudge()], sampling=sampling)


def names(run_dir: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())["names"]
    return found


def test_a_killed_run_is_called_by_its_selection(
    tiny_model: str, tiny_sets: dict[str, str], killed: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(killed, tmp_path / "run"))
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["test"], loop={"evaluation": asked(tmp_path)})
    assert names(run_dir)["target"] == "TOSS"


def test_a_killed_run_is_called_by_the_selection_that_it_took_over(
    tiny_model: str, tiny_sets: dict[str, str], killed: Path, tmp_path: Path
) -> None:
    run_dir, given = tmp_path / "run", {"selection_from": str(killed / "selection")}
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["target"], loop={"epochs": 1, **given})
    (run_dir / "summary.json").unlink()
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["test"], loop={"evaluation": asked(tmp_path), **given})
    assert names(run_dir)["target"] == "TOSS"


def test_a_damaged_summary_is_said_before_anything_is_generated(
    tiny_model: str, tiny_sets: dict[str, str], killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = Path(shutil.copytree(killed, tmp_path / "run"))
    (run_dir / "summary.json").write_text('{"method": "TOSS"')
    monkeypatch.setattr("toss_lightning.evaluation.replies.generate", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(StoreError, match=r"run/summary\.json: damaged .*: run the step that wrote it again"):
        tiny_fit(tiny_model, tiny_sets, run_dir, plan=["test"], loop={"evaluation": asked(tmp_path)})
