"""The share of the gap to an oracle against naive computations on made runs, and how tables say it."""

import csv
import io
import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from made_runs import finish, made, measure, write_comparison
from rich.console import Console

from toss_lightning.compare.report import report_comparison
from toss_lightning.compare.tables import markdown, show
from toss_lightning.evaluation.ratios import ratio_over_seeds

METHODS = ("plain SFT", "A", "B", "clean rows")
SEEDS = (1, 2, 3)
PROMPTS = 60
SHARES = {"plain SFT": 0.8, "A": 0.4, "B": 0.9, "clean rows": 0.1}
LOSSES = {"plain SFT": 2.4, "A": 2.2, "B": 2.6, "clean rows": 2.0}


@pytest.fixture(scope="module")
def said() -> dict[tuple[str, int], dict[str, list[float | None]]]:
    """What each run is worth: the oracle is far from the baseline in one measure and like it in another."""
    draw = np.random.default_rng(3)
    ease = draw.random(PROMPTS)
    found: dict[tuple[str, int], dict[str, list[float | None]]] = {}
    for name, seed in product(METHODS, SEEDS):
        harmful: list[float | None] = [float(one) for one in ease < SHARES[name] + draw.normal(0, 0.02)]
        overlap: list[float | None] = [float(one) for one in 0.5 + 0.1 * draw.normal(size=PROMPTS)]
        found[name, seed] = {"harmful compliance": harmful, "ROUGE-L, everyday": overlap}
    found["A", 2]["harmful compliance"][4] = None
    return found


def losses(name: str, seed: int) -> float:
    return LOSSES[name] + 0.01 * math.sin(7 * seed + METHODS.index(name))


def report(
    folder: Path,
    said: dict[tuple[str, int], dict[str, list[float | None]]],
    diverged: Mapping[tuple[str, int], float] = MappingProxyType({}),
    **keys: Any,
) -> dict[str, Any]:
    seeds = sorted({seed for _, seed in said})
    folder.mkdir(exist_ok=True)
    path = write_comparison(folder, dict.fromkeys(METHODS), **{"oracle": "clean rows", "seeds": seeds, **keys})
    comparison, runs = made(path)
    for (name, seed), of in said.items():
        measures = [
            measure("harmful compliance", [0.0] * PROMPTS, of["harmful compliance"], judge="J"),
            measure(
                "ROUGE-L, everyday",
                [0.2] * PROMPTS,
                of["ROUGE-L, everyday"],
                "higher",
                share=False,
                set="everyday",
            ),
        ]
        finish(runs[name, seed], measures, task_loss=diverged.get((name, seed), losses(name, seed)))
    report_comparison(comparison, list(runs.values()), [], [])
    content: dict[str, Any] = json.loads((comparison.run_dir / "compare.json").read_text())
    return content


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, said: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made")
    return report(folder, said) | {"folder": folder / "run"}


def only(content: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in content["measures"] if one["name"] == name]
    return found


def test_the_share_is_that_of_means_on_the_same_seeds_and_prompts(content, said):
    gap = only(content, "harmful compliance")["gap_closed"]
    assert (gap["beyond_noise"], gap["oracle_better"]) == (True, True)
    assert list(gap["methods"]) == ["A", "B"]
    for name in ("A", "B"):
        tables = [
            np.array([said[one, seed]["harmful compliance"] for seed in SEEDS], dtype=float)
            for one in (name, "plain SFT", "clean rows")
        ]
        decided = ~np.isnan(sum(tables)).any(0)
        ours, zero, full = (table[:, decided].mean(1) for table in tables)
        naive = ratio_over_seeds(ours - zero, full - zero)
        found = gap["methods"][name]
        assert found["value"] == pytest.approx((ours.mean() - zero.mean()) / (full.mean() - zero.mean()))
        assert [found["low"], found["high"]] == pytest.approx([naive.low, naive.high])
        assert (found["over"], found["seeds"]) == ("seeds", 3)
    assert gap["methods"]["A"]["value"] > 0 > gap["methods"]["B"]["value"]


def test_a_gap_within_noise_has_no_share(content):
    found = only(content, "ROUGE-L, everyday")
    (pair,) = [one for one in found["differences"] if (one["of"], one["against"]) == ("clean rows", "plain SFT")]
    assert not pair["beyond_noise"]
    assert found["gap_closed"] | {"oracle_better": None} == {
        "beyond_noise": False,
        "oracle_better": None,
        "methods": {},
    }
    page = (content["folder"] / "compare.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| A | ") and "no gap" in line]
    assert line.split(" | ")[2] == "no gap"


def test_utility_is_kept_of_a_value_and_of_a_gain_over_the_base(content, said):
    value = only(content, "ROUGE-L, everyday")["utility_kept"]
    assert value["of"] == "value"
    assert list(value["methods"]) == ["plain SFT", "A", "B"]
    ours, full = (
        np.array([said[name, seed]["ROUGE-L, everyday"] for seed in SEEDS]).mean(1) for name in ("A", "clean rows")
    )
    assert value["methods"]["A"]["value"] == pytest.approx(ours.mean() / full.mean())
    assert value["methods"]["A"]["high"] == pytest.approx(ratio_over_seeds(ours, full).high)
    gain = only(content, "held-out task loss")["utility_kept"]
    assert gain["of"] == "gain over the base"
    ours, full = (np.array([losses(name, seed) for seed in SEEDS]) for name in ("B", "clean rows"))
    assert gain["methods"]["B"]["value"] == pytest.approx((3 - ours.mean()) / (3 - full.mean()))
    assert gain["methods"]["B"]["low"] == pytest.approx(ratio_over_seeds(3 - ours, 3 - full).low)
    assert "utility_kept" not in only(content, "harmful compliance")


def test_an_oracle_without_gain_keeps_nothing(tmp_path, said, monkeypatch):
    monkeypatch.setitem(LOSSES, "clean rows", 3.5)
    content = report(tmp_path, said)
    loss = only(content, "held-out task loss")
    assert loss["utility_kept"]["methods"] == {}
    assert loss["gap_closed"]["oracle_better"] is False
    assert loss["gap_closed"]["methods"]["A"]["value"] < 0
    page = markdown(content)
    assert "no gain" in page
    assert "- clean rows is worse than plain SFT in held-out task loss: to close that gap is no gain." in page


def test_one_seed_has_a_share_without_an_interval(tmp_path, said):
    content = report(tmp_path, {key: of for key, of in said.items() if key[1] == 1})
    one = only(content, "harmful compliance")["gap_closed"]["methods"]["A"]
    assert (one["low"], one["high"], one["over"], one["seeds"]) == (None, None, None, 1)
    assert f"| A | {100 * one['value']:.0f}% | " in (tmp_path / "run/compare.md").read_text()
    # of a loss of whole runs nothing is known with one seed
    assert only(content, "held-out task loss")["gap_closed"] == {
        "beyond_noise": None,
        "oracle_better": None,
        "methods": {},
    }


def test_only_the_seeds_of_all_three_count(tmp_path, said):
    left = {key: of for key, of in said.items() if key not in {("A", 1), ("clean rows", 2)}}
    closed = only(report(tmp_path, left), "harmful compliance")["gap_closed"]["methods"]
    assert closed["B"]["seeds"] == 2
    assert (closed["A"]["seeds"], closed["A"]["over"]) == (1, None)


def test_a_run_without_a_number_leaves_no_share(tmp_path, said):
    """Neither of the method nor, where it is the oracle's, of any; whichever seeds the others have."""
    left = {key: of for key, of in said.items() if key != ("plain SFT", 2)}
    ours, oracles = (
        only(report(tmp_path / name[:1], left, {(name, 2): math.nan}), "held-out task loss")
        for name in ("A", "clean rows")
    )
    for shares in (ours["gap_closed"], ours["utility_kept"]):
        assert shares["beyond_noise"]
        assert shares["methods"]["A"]["value"] is None
        assert shares["methods"]["B"]["value"] is not None
    for shares in (oracles["gap_closed"], oracles["utility_kept"]):
        assert (shares["beyond_noise"], shares["methods"]) == (None, {})


def test_an_interval_without_ends_is_called_so(content):
    one = only(content, "harmful compliance")["gap_closed"]["methods"]["A"]
    share = one["value"]
    one |= {"low": None, "high": None}
    assert f"| A | {100 * share:.0f}% [unbounded] | " in markdown(content)


def test_every_form_has_the_tables(content):
    folder = content["folder"]
    closed = "Share of the gap closed, from plain SFT (0 %) to clean rows (100 %)"
    page = (folder / "compare.md").read_text()
    assert f"## {closed}\n\n|  | harmful compliance (J) | ROUGE-L, everyday | held-out task loss |" in page
    assert "|  | ROUGE-L, everyday (value) | held-out task loss (gain over the base) |" in page
    latex = (folder / "compare.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert r"% Share of the gap closed, from plain SFT (0 \%) to clean rows (100 \%)" in latex
    file = io.StringIO()
    show(content, Console(file=file))
    # a title folds at the width of its table
    printed = " ".join(file.getvalue().split())
    assert closed in printed
    assert "Utility kept, relative to clean rows (100 %)" in printed
    rows = list(csv.DictReader(io.StringIO((folder / "compare.csv").read_text())))
    shares = {(row["model"], row["measure"]): row for row in rows}
    row = shares["B", "share of the gap to clean rows closed, harmful compliance"]
    expected = only(content, "harmful compliance")["gap_closed"]["methods"]["B"]
    assert (float(row["value"]), float(row["low"]), row["seeds"]) == (expected["value"], expected["low"], "3")
    assert ("plain SFT", "utility kept relative to clean rows, ROUGE-L, everyday") in shares
    assert ("A", "share of the gap to clean rows closed, ROUGE-L, everyday") not in shares


def test_without_an_oracle_nothing_is_said_of_one(tmp_path, said):
    content = report(tmp_path, said, oracle=None)
    assert content["oracle"] is None
    assert not any("gap_closed" in one or "utility_kept" in one for one in content["measures"])
    assert "Share of the gap" not in (tmp_path / "run/compare.md").read_text()
