"""What docs/adding_a_method.md shows is run as it stands there, and does what the page says."""

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from runs import artifacts
from tiny import some_pairs, write_rows

from toss_lightning.cli import main
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

PAGE = Path(__file__).parent.parent / "docs" / "adding_a_method.md"
BLOCKS = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
"""Name of a file -> what the page puts into it."""


@pytest.fixture
def written(somewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the page in the working directory, where Python looks for modules."""
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def fit(written: None, tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> list[str]:
    """The command of the page with the tiny model and its sets, up to the page's configuration."""
    safety = write_rows(tmp_path / "safety.jsonl", some_pairs(6, start=3))
    return [
        "fit",
        "--config=demo",
        *("--model.base.path", tiny_model, "--model.base.quantization=none", "--run_dir=run"),
        *(f"--data.{name}={path}" for name, path in {**tiny_sets, "safety": safety}.items()),
        *(f"--data.{name}=null" for name in ("utility_val", "harmful_val", "refusal_val")),
        *("--model.optim.lr=0.01", "--loop.epochs=1", "--trainer.enable_progress_bar=false", "--trainer.logger=false"),
    ]


def test_the_example_is_short_and_complete():
    assert set(BLOCKS) == {
        *("my_methods.py", "my_method.yaml", "my_corrections.py", "my_correction.yaml", "test_my_methods.py")
    }
    assert len((BLOCKS["my_methods.py"] + BLOCKS["my_method.yaml"]).splitlines()) <= 60


def test_the_selection_masks_what_the_degraded_reference_finds_likely(fit):
    assert main([*fit, "--config=my_method.yaml", "--loop.selection.probability=0.01"]) == 0
    scores, weights = TokenScores(Path("run/scores")), TokenWeights.load(Path("run/selection"))
    assert not Path("run/scores/loss_utility").exists()
    end = scores.flat("end_of_turn")
    likely = [math.exp(-loss) > 0.01 for loss in scores.flat("loss_degraded").tolist()]
    assert weights.flat().tolist() == [float(stays or not one) for one, stays in zip(likely, end, strict=True)]
    assert 0 < weights.report["masked"] < weights.report["kept"]
    assert weights.report["probability"] == 0.01
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["plain"], summary["method"]) == (False, "LikelyHarm")


def test_another_probability_needs_no_model(fit, tmp_path):
    assert main([*fit, "--config=my_method.yaml"]) == 0
    options = ["--config=demo", "--config=my_method.yaml", "--loop.scores_from=run/scores", "--model.base.path=nowhere"]
    assert main(["select", "--run_dir=other", *options, "--loop.selection.probability=0.01"]) == 0
    masked = [json.loads(Path(f"{run}/selection/selection.json").read_text())["masked"] for run in ("run", "other")]
    assert masked[0] < masked[1]


def test_a_probability_out_of_range_is_one_line(fit, capsys):
    assert main([*fit, "--config=my_method.yaml", "--loop.selection.probability=1.5"]) == 2
    assert capsys.readouterr().err == "error: loop.selection.probability: 1.5: give a number between 0 and 1\n"


def test_the_test_on_the_page_passes_and_can_fail(written, tmp_path):
    page_test = importlib.import_module("test_my_methods").test_what_is_likelier_than_the_probability_goes
    page_test(tmp_path)
    mine = importlib.import_module("my_methods")
    mine.LikelyHarm.select = lambda self, scores: mine.mask_weights(scores, scores.flat("end_of_turn"))
    with pytest.raises(AssertionError):
        page_test(tmp_path / "again")


def test_the_correction_drops_what_safe_replies_do_not_agree_with(written):
    class Safe:
        size = 2

        def gradient(self, rows):
            assert list(rows) == [0, 1]
            return 0.5, {"a": torch.tensor([1.0, 1.0, -2.0, 0.0])}

    correction = importlib.import_module("my_corrections").SameSign()
    gradients = {"a": torch.tensor([3.0, -3.0, 4.0, 5.0])}
    correction.correct(gradients, Safe())
    assert gradients["a"].tolist() == [3.0, 0.0, 0.0, 5.0]
    assert correction.report()["corrected"] == 1


def test_the_correction_changes_the_target_with_and_without_the_selection(fit):
    def target(name: str) -> bytes:
        return artifacts(Path(name))["adapters/target/adapter_model.safetensors"]

    corrected = ["--config=my_correction.yaml", "--run_dir=corrected"]
    assert main([*fit, *corrected]) == 0
    assert main([*fit, "--config=methods/sft", "--run_dir=plain"]) == 0
    plan = "--loop.plan=[degraded, score, select, target]"
    both = ["--config=my_method.yaml", "--config=my_correction.yaml", plan, "--run_dir=both"]
    assert main([*fit, *both, "--loop.selection.probability=0.01"]) == 0
    assert len({target("corrected"), target("plain"), target("both")}) == 3
    for name, method in (("corrected", "SameSign"), ("both", "LikelyHarm + SameSign")):
        summary = json.loads(Path(name, "summary.json").read_text())
        assert summary["method"] == method
        assert summary["correction"]["corrected"] == summary["correction"]["steps"] > 0
