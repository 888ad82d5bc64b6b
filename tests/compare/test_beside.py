"""Agreement of judges and divergence from the base over all runs, against naive computations on made runs."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import finish, made, measure, write_comparison
from sklearn.metrics import cohen_kappa_score

from toss_lightning.compare.beside import agreement, divergence, divergence_cells
from toss_lightning.compare.measured import of_prompts, read_outcomes
from toss_lightning.compare.report import report_comparison

METHODS = ("plain SFT", "TOSS")
KINDS = {"refusal of harmful prompts": 12, "over-refusal of benign prompts": 5}
LINES = {("plain SFT", 1): [0.5, 0.25], ("plain SFT", 2): [0.7, 0.35, 0.1], ("TOSS", 1): [0.2, 0.1], ("TOSS", 2): [0.0]}


@pytest.fixture
def verdicts() -> dict[tuple[str, str, Any], list[float | None]]:
    """Judge, measure and run -> what it said; the base's is the same in every run."""
    generator = np.random.default_rng(0)
    runs = [None, *product(METHODS, (1, 2))]
    found = {
        (judge, name, run): [float(one) for one in generator.random(count) < 0.5]
        for judge in ("J", "K")
        for (name, count), run in product(KINDS.items(), runs)
    }
    found["J", "refusal of harmful prompts", ("TOSS", 1)][3] = None
    return found


@pytest.fixture
def folder(tmp_path: Path, verdicts) -> Path:
    path = write_comparison(tmp_path, dict.fromkeys(METHODS))
    for key, run in made(path)[1].items():
        of = [(judge, name) for judge, name in product(("J", "K"), KINDS)]
        finish(
            run,
            [measure(name, verdicts[judge, name, None], verdicts[judge, name, key], judge=judge) for judge, name in of],
        )
        content = json.loads(run.evaluation.read_text())
        content["divergence"] = {"safe replies": {"base": [0.0], "target": LINES[key]}}
        run.evaluation.write_text(json.dumps(content))
        run.file("training", "evaluation")
    return path


def test_kappa_is_over_the_replies_of_all_runs_and_of_the_base_once(folder, verdicts) -> None:
    (found,) = agreement(of_prompts(read_outcomes(list(made(folder)[1].values()))))
    said = [
        (verdicts["J", name, run][at], verdicts["K", name, run][at])
        for (name, count), run in product(KINDS.items(), [None, *product(METHODS, (1, 2))])
        for at in range(count)
    ]
    decided = [pair for pair in said if None not in pair]
    assert (found["judges"], found["of"]) == (["J", "K"], "refused")
    assert (found["decided"], found["undecided"]) == (len(decided), 1) == (5 * 17 - 1, 1)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*zip(*decided, strict=True)))
    assert found["low"] < found["kappa"] < found["high"]


def test_one_judge_agrees_with_nobody(tmp_path) -> None:
    path = write_comparison(tmp_path, dict.fromkeys(METHODS), seeds=[1])
    for run in made(path)[1].values():
        finish(run, [measure("harmful compliance", [0, 1], [1, 1], judge="J")])
    assert agreement(of_prompts(read_outcomes(list(made(path)[1].values())))) == []


def test_divergence_is_the_mean_over_seeds_as_far_as_all_know_it(folder) -> None:
    outcomes = read_outcomes(list(made(folder)[1].values()))
    found = divergence(outcomes, METHODS)
    assert found.keys() == {"safe replies"}
    assert found["safe replies"]["plain SFT"] == pytest.approx([0.6, 0.3])
    assert found["safe replies"]["TOSS"] == pytest.approx([0.1])
    header, *lines = divergence_cells({"divergence": found, "methods": [*METHODS]})
    assert header == ["", "safe replies, first token", "safe replies, all positions"]
    assert lines == [["plain SFT", "0.600", "0.450"], ["TOSS", "0.100", "0.100"]]


def test_the_page_has_both(folder, tmp_path) -> None:
    comparison, runs = made(folder)
    report_comparison(comparison, list(runs.values()), [], [])
    page = (tmp_path / "run" / "compare.md").read_text()
    assert "| J / K | refused |" in page
    assert "](divergence.svg)" in page
    assert "| plain SFT | 0.600 | 0.450 |" in page
    picture = (tmp_path / "run" / "divergence.svg").read_text()
    assert all(f">{name}</text>" in picture for name in METHODS)


def test_without_divergences_there_is_no_picture(tmp_path) -> None:
    path = write_comparison(tmp_path, dict.fromkeys(METHODS), seeds=[1])
    comparison, runs = made(path)
    for run in runs.values():
        finish(run, [measure("harmful compliance", [0, 1], [1, 1], judge="J")])
    report_comparison(comparison, list(runs.values()), [], [])
    assert not (tmp_path / "run" / "divergence.svg").exists()
    assert "How far from the base" not in (tmp_path / "run" / "compare.md").read_text()
