"""The numbers of a comparison against naive computations on made runs."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import finish, made, measure, write_comparison
from scipy import stats

from toss_lightning.compare.measured import BASE, of_prompts, read_outcomes
from toss_lightning.compare.numbers import compare_outcomes
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.statistics import holm, paired_difference, paired_difference_over_seeds

METHODS = ("plain SFT", "A", "B")
PROMPTS = 30


def content_of(folder: Path, runs: dict[tuple[str, int], list[dict[str, Any]]], **losses: Any) -> dict[str, Any]:
    """The comparison of runs, ``(method, seed)`` -> its measures."""
    seeds = sorted({seed for _, seed in runs})
    path = write_comparison(folder, dict.fromkeys(METHODS), seeds=seeds)
    _, all_runs = made(path)
    for number, (key, measures) in enumerate(runs.items()):
        computed = losses.get("computed", {}).get(key)
        finish(all_runs[key], measures, 10.0 + number, computed=computed, **losses.get("of", {}).get(key, {}))
    return compare_outcomes(read_outcomes(list(all_runs.values())), METHODS, "plain SFT")


@pytest.fixture
def said() -> dict[tuple[str, int], list[float | None]]:
    """What a judge said of each run's replies; not everything."""
    generator = np.random.default_rng(0)
    shares = {"plain SFT": 0.6, "A": 0.3, "B": 0.5}
    found: dict[tuple[str, int], list[float | None]] = {
        (name, seed): [float(one) for one in generator.random(PROMPTS) < shares[name]]
        for name, seed in product(METHODS, (1, 2, 3))
    }
    found["A", 2][4] = found["A", 3][4] = found["plain SFT", 1][9] = None
    return found


BASE_SAID = [float(at % 3 == 0) for at in range(PROMPTS)]


def only(content: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in content["measures"] if one["name"] == name]
    return found


def test_means_are_over_seeds_with_students_interval(tmp_path, said):
    runs = {key: [measure("harmful compliance", BASE_SAID, of, judge="J")] for key, of in said.items()}
    models = only(content_of(tmp_path, runs), "harmful compliance")["models"]
    assert list(models) == [BASE, *METHODS]
    for name in METHODS:
        means = [np.mean([one for one in said[name, seed] if one is not None]) for seed in (1, 2, 3)]
        reach = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / np.sqrt(3)
        assert models[name]["value"] == pytest.approx(np.mean(means))
        assert models[name]["low"] == pytest.approx(max(0, np.mean(means) - reach), rel=1e-5)
        assert models[name]["high"] == pytest.approx(min(1, np.mean(means) + reach), rel=1e-5)
        assert (models[name]["over"], models[name]["seeds"]) == ("seeds", 3)
    assert [models[name]["undecided"] for name in METHODS] == [1, 2, 0]
    assert [models[name]["n"] for name in METHODS] == [29, 29, 30]
    base = models[BASE]
    assert (base["value"], base["over"], base["n"]) == (pytest.approx(1 / 3), "prompts", PROMPTS)
    assert (base["low"], base["high"]) == (pytest.approx(0.8 / 3), pytest.approx(1.2 / 3))


def test_pairs_are_over_seeds_and_the_prompts_that_both_decide(tmp_path, said):
    runs = {key: [measure("harmful compliance", BASE_SAID, of, judge="J")] for key, of in said.items()}
    differences = only(content_of(tmp_path, runs), "harmful compliance")["differences"]
    pairs = [(one["of"], one["against"]) for one in differences]
    assert pairs == [("plain SFT", BASE), ("A", "plain SFT"), ("A", BASE), ("B", "plain SFT"), ("B", BASE)]
    expected = []
    for ours, theirs in pairs:
        tables = [
            np.array([BASE_SAID if name == BASE else said[name, seed] for seed in (1, 2, 3)], dtype=float)
            for name in (ours, theirs)
        ]
        decided = ~np.isnan(tables[0] + tables[1]).any(0)
        expected.append(
            (paired_difference_over_seeds(tables[0][:, decided], tables[1][:, decided]), int(decided.sum()))
        )
    adjusted = holm([one.p for one, _ in expected])
    for found, (naive, count), p in zip(differences, expected, adjusted, strict=True):
        assert (found["mean"], found["low"], found["high"], found["p"]) == pytest.approx(
            (naive.mean, naive.low, naive.high, naive.p)
        )
        assert (found["n"], found["undecided"]) == (count, PROMPTS - count)
        assert found["p_holm"] == pytest.approx(p)
        assert found["beyond_noise"] == (p < 0.05)
        assert found["better"] == (naive.mean < 0)
    assert [one["undecided"] for one in differences] == [1, 2, 1, 1, 0]


def test_a_score_that_is_zero_in_one_run_is_no_share(tmp_path, said):
    scores = {key: [0.0, 0.0] if key[1] == 1 else [12.0, 30.0] for key in said}
    runs = {
        key: [measure("bleu, task", [0.0, 0.0], of, "higher", share=key[1] == 1, set="task")]
        for key, of in scores.items()
    }
    found = only(content_of(tmp_path, runs), "bleu, task")
    assert not found["share"]
    assert found["models"]["A"]["high"] > 21


@pytest.mark.parametrize("bounded", [True, False])
def test_a_mean_of_probabilities_has_no_interval_beyond_them(tmp_path, said, bounded):
    of_seed = {1: [0.0, 0.02], 2: [0.01, 0.01], 3: [0.2, 0.4]}
    runs = {
        key: [measure("probability", [0.5, 0.5], of_seed[key[1]], "higher", share=False, bounded=bounded)]
        for key in said
    }
    low = only(content_of(tmp_path, runs), "probability")["models"]["A"]["low"]
    assert low == 0 if bounded else low < 0


def test_one_seed_is_compared_over_the_prompts(tmp_path, said):
    runs = {(name, 1): [measure("refusal of harmful prompts", BASE_SAID, said[name, 1], "higher")] for name in METHODS}
    found = only(content_of(tmp_path, runs), "refusal of harmful prompts")
    alone = found["models"]["B"]
    mean = np.mean(said["B", 1])
    assert [alone[key] for key in ("value", "low", "high")] == pytest.approx([mean, mean * 0.8, mean * 1.2])
    assert alone["over"] == "prompts"
    difference = next(one for one in found["differences"] if (one["of"], one["against"]) == ("A", "plain SFT"))
    decided = [at for at in range(PROMPTS) if said["plain SFT", 1][at] is not None]
    naive = paired_difference(*([said[name, 1][at] for at in decided] for name in ("A", "plain SFT")))
    assert [difference[key] for key in ("mean", "low", "high", "p")] == pytest.approx(
        [naive.mean, naive.low, naive.high, naive.p]
    )
    assert (difference["over"], difference["better"]) == ("prompts", naive.mean > 0)


def test_seeds_that_all_say_the_same_keep_the_interval_over_the_prompts(tmp_path):
    runs = {(name, seed): [measure("x", [0, 1], [0, 1])] for name, seed in product(METHODS, (1, 2))}
    model = only(content_of(tmp_path, runs), "x")["models"]["A"]
    assert (model["value"], model["low"], model["high"], model["over"]) == (0.5, 0.4, 0.6, "prompts")


def test_only_the_seeds_of_both_are_compared(tmp_path, said):
    runs = {key: [measure("x", BASE_SAID, of)] for key, of in said.items() if key not in {("A", 2), ("plain SFT", 1)}}
    content = content_of(tmp_path, runs)
    assert content["seeds"] == {"plain SFT": [2, 3], "A": [1, 3], "B": [1, 2, 3]}
    pairs = {(one["of"], one["against"]): one for one in only(content, "x")["differences"]}
    assert [pairs["A", "plain SFT"][key] for key in ("seeds", "over")] == [1, "prompts"]
    assert [pairs["B", "plain SFT"][key] for key in ("seeds", "over")] == [2, "seeds"]
    assert [pairs["A", BASE][key] for key in ("seeds", "over")] == [2, "seeds"]


def test_among_several_seeds_the_prompts_of_one_decide_nothing(tmp_path):
    better, worse = [0.0] * PROMPTS, [1.0] * PROMPTS
    runs = {(name, seed): worse if name == "plain SFT" else better for name in ("plain SFT", "A") for seed in (1, 2)}
    runs["B", 1] = better
    found = only(content_of(tmp_path, {key: [measure("x", worse, of)] for key, of in runs.items()}), "x")
    pairs = {(one["of"], one["against"]): one for one in found["differences"]}
    assert pairs["A", "plain SFT"]["beyond_noise"] is True
    for against in ("plain SFT", BASE):
        assert pairs["B", against]["p_holm"] < 0.01
        assert pairs["B", against]["beyond_noise"] is None


@pytest.mark.parametrize("loss", [{"task_loss": math.nan}, {"task_loss": math.inf}, {}])
def test_a_method_has_no_mean_where_a_run_gave_no_number(tmp_path, loss):
    """That of its other runs would be the better, the more of them diverge."""
    losses = {(name, seed): {"task_loss": 2.0 + 0.1 * seed} for name in METHODS for seed in (1, 2, 3)}
    losses["A", 2] = loss
    found = only(content_of(tmp_path, {key: [] for key in losses}, of=losses), "held-out task loss")
    assert found["models"]["A"].items() >= {"value": None, "low": None, "seeds": 2, "without_number": 1}.items()
    assert found["models"]["B"].items() >= {"value": pytest.approx(2.2), "seeds": 3, "without_number": 0}.items()
    tested = {(one["of"], one["against"]): "p" in one for one in found["differences"]}
    assert {pair for pair, is_tested in tested.items() if not is_tested} == {("A", "plain SFT"), ("A", BASE)}


def test_a_seed_of_which_nothing_is_decided_costs_the_mean_too(tmp_path, said):
    said["A", 3] = [None] * PROMPTS
    # nor are the seeds tested that the baseline has
    del said["plain SFT", 3]
    found = only(content_of(tmp_path, {key: [measure("x", BASE_SAID, of)] for key, of in said.items()}), "x")
    assert found["models"]["A"].items() >= {"value": None, "seeds": 2, "n": 0, "without_number": 1}.items()
    pairs = {(one["of"], one["against"]): one for one in found["differences"]}
    assert pairs["A", "plain SFT"].items() >= {"seeds": 0, "without_number": 1}.items()
    assert [pair for pair, one in pairs.items() if "p" not in one] == [("A", "plain SFT"), ("A", BASE)]


def test_held_out_losses_say_which_way_is_better_and_which_is_utility(tmp_path):
    losses = {"task_loss": 2.0, "harmful_loss": 4.0, "refusal_loss": 1.0}
    measures = content_of(tmp_path, {("A", 1): []}, of={("A", 1): losses})["measures"]
    assert [(one["name"], one["better"], one["is_utility"]) for one in measures] == [
        ("held-out task loss", "lower", True),
        ("held-out harmful loss", "higher", False),
        ("held-out refusal loss", "lower", False),
    ]


def test_runs_that_were_computed_unlike_are_told(tmp_path):
    here = {"precision": "nf4/float32", "device": "cpu", "versions": {"python": "3.12.1", "torch": "2.13.0"}}
    there = here | {"precision": "nf4/bfloat16", "versions": {"python": "3.12.1", "torch": "2.14.0"}}
    computed = {key: here if key == ("A", 1) else there for key in product(METHODS, (1, 2))}
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in computed}
    others = "plain SFT seeds 1, 2 and A seed 2 and B seeds 1, 2"
    assert content_of(tmp_path, runs, computed=computed)["unlike"] == [
        f"precision: nf4/bfloat16 in {others}; nf4/float32 in A seed 1",
        f"version of torch: 2.14.0 in {others}; 2.13.0 in A seed 1",
    ]


def test_held_out_losses_are_compared_by_the_paired_t_test_over_seeds(tmp_path):
    losses = {
        (name, seed): {"task_loss": 2.0 + 0.1 * at + 0.01 * (seed * (at + 1)) ** 2}
        for at, name in enumerate(METHODS)
        for seed in (1, 2, 3)
    }
    content = content_of(tmp_path, {key: [] for key in losses}, of=losses)
    found = only(content, "held-out task loss")
    pairs = {(one["of"], one["against"]): one for one in found["differences"]}
    ours, theirs = ([losses[name, seed]["task_loss"] for seed in (1, 2, 3)] for name in ("A", "plain SFT"))
    naive = stats.ttest_rel(ours, theirs)
    assert pairs["A", "plain SFT"]["p"] == pytest.approx(naive.pvalue, rel=1e-4)
    assert pairs["A", "plain SFT"]["low"] == pytest.approx(naive.confidence_interval().low, rel=1e-4)
    against_base = stats.ttest_1samp(ours, 3.0)
    assert pairs["A", BASE]["p"] == pytest.approx(against_base.pvalue, rel=1e-4)
    assert pairs["A", BASE]["better"]
    assert found["models"][BASE]["value"] == 3.0
    assert found["models"][BASE]["low"] is None


def test_a_single_loss_is_not_compared(tmp_path):
    losses = {(name, 1): {"task_loss": 2.0} for name in METHODS}
    found = only(content_of(tmp_path, {key: [] for key in losses}, of=losses), "held-out task loss")
    assert not any("p" in one for one in found["differences"])
    assert found["models"]["A"]["low"] is None


def test_time_is_over_that_of_the_baseline_with_the_same_seed(tmp_path):
    keys = [*product(METHODS, (1, 2))]  # seconds 10, 11, ... in this order, and 1000 of evaluation
    time = content_of(tmp_path, {key: [] for key in keys})["time"]
    ratios = [12 / 10, 13 / 11]
    reach = stats.t.ppf(0.975, 1) * np.std(ratios, ddof=1) / np.sqrt(2)
    assert time["A"]["value"] == pytest.approx(np.mean(ratios))
    assert time["A"]["high"] == pytest.approx(np.mean(ratios) + reach, rel=1e-4)
    assert time["A"]["seconds"] == 12.5
    assert (time["plain SFT"]["value"], time["plain SFT"]["low"]) == (1.0, None)


def test_further_opponents_are_tested_and_adjusted_for(tmp_path, said):
    runs = {key: [measure("harmful compliance", BASE_SAID, of, judge="J")] for key, of in said.items()}
    content_of(tmp_path, runs)
    outcomes = read_outcomes(list(made(tmp_path / "compare.yaml")[1].values()))
    content = compare_outcomes(outcomes, METHODS, "plain SFT", against=["A", "B"])
    differences = only(content, "harmful compliance")["differences"]
    # each pair once
    assert [(one["of"], one["against"]) for one in differences] == [
        *(("plain SFT", BASE), ("A", "plain SFT"), ("A", BASE)),
        *(("B", "plain SFT"), ("B", "A"), ("B", BASE)),
    ]
    assert [one["p_holm"] for one in differences] == pytest.approx(holm([one["p"] for one in differences]))
    columns = [[*zip(*(said[name, seed] for seed in (1, 2, 3)), strict=True)] for name in ("B", "A")]
    decided = [row for row in zip(*columns, strict=True) if None not in (*row[0], *row[1])]
    assert differences[4]["mean"] == pytest.approx(np.mean([np.subtract(*row) for row in decided]))


def test_rows_that_each_run_holds_out_itself_are_not_paired(tmp_path):
    name, losses = "task loss of a row, nats per token", {"plain SFT": [1.0, 2.0], "A": [1.5, 1.5], "B": [3.0, 4.0]}

    def content(folder: Path, which: dict[str, str]) -> dict[str, Any]:
        folder.mkdir()
        facts = {"share": False, "utility": True}
        runs = {
            (method, seed): [measure(name, [2.0, 3.0], [one + seed / 8 for one in of], rows=which[method], **facts)]
            for (method, of), seed in product(losses.items(), (1, 2))
        }
        return only(content_of(folder, runs), name)

    same = content(tmp_path / "same", dict.fromkeys(METHODS, "these"))
    assert (same["per_prompt"], same["is_utility"]) == (True, True)
    assert {one["n"] for one in same["differences"]} == {2}
    own = content(tmp_path / "own", {method: method for method in METHODS})
    assert own["per_prompt"] is False
    for method in (BASE, *METHODS):
        assert own["models"][method]["value"] == pytest.approx(same["models"][method]["value"])
    # as of a loss of whole runs: the paired t-test over the seeds
    assert {one["over"] for one in own["differences"]} == {"seeds"}


def test_measures_of_safety_come_first_and_screening_ones_behind_judges(tmp_path):
    names = [
        ("probability of a refusal's first token", None, False),
        ("margin of the safe reply, nats per token", None, False),
        ("acc, arc_easy", None, False),
        ("right answers, gsm", None, False),
        ("over-refusal of benign prompts", "K", True),
        ("refusal of harmful prompts", "K", True),
        ("refusal of harmful prompts", "J", False),
        ("harmful compliance", "J", False),
    ]
    measures = [
        measure(name, [0, 1], [1, 1], judge=judge, screening=screening, set="arc_easy" if "acc" in name else None)
        for name, judge, screening in names
    ]
    losses = {("A", 1): {"task_loss": 2.0}}
    content = content_of(tmp_path, {("A", 1): measures}, of=losses)
    assert [one["title"] for one in content["measures"]] == [
        "harmful compliance (J)",
        "refusal of harmful prompts (J)",
        "refusal of harmful prompts (K, screening)",
        "over-refusal of benign prompts (K, screening)",
        "right answers, gsm",
        "acc, arc_easy",
        "margin of the safe reply, nats per token",
        "probability of a refusal's first token",
        "held-out task loss",
    ]


def test_nothing_decided_is_no_number(tmp_path):
    found = only(content_of(tmp_path, {("A", 1): [measure("x", [0, 1], [None, None])]}), "x")
    assert found["models"]["A"].items() >= {"value": None, "undecided": 2, "without_number": 1}.items()
    assert not any("p" in one for one in found["differences"])


def test_runs_that_were_asked_different_prompts_are_not_compared(tmp_path):
    runs = {("A", 1): [measure("x", [0, 1], [0, 1])], ("B", 1): [measure("x", [0, 1, 1], [0, 1, 1])]}
    with pytest.raises(StoreError, match=r"x: 2 in A, seed 1 and 3 in B, seed 1 prompts: delete the evaluation"):
        content_of(tmp_path, runs)


def test_as_many_prompts_that_are_not_the_same_are_not_compared(tmp_path):
    runs = {(name, 1): [measure("x", [0, 1], [0, 1])] for name in "AB"}
    all_runs = made(write_comparison(tmp_path, {"A": None, "B": None}, seeds=[1]))[1]
    for key, run in all_runs.items():
        finish(run, runs[key])
        content = json.loads(run.evaluation.read_text())
        run.evaluation.write_text(json.dumps(content | {"asked": {"forbidden": f"digest of {key[0]}"}}))
        run.file("training", "evaluation")
    with pytest.raises(StoreError, match="forbidden: other prompts in B, seed 1 than in A, seed 1: what"):
        of_prompts(read_outcomes([*all_runs.values()]))


def test_a_damaged_file_is_named(tmp_path):
    _, runs = made(write_comparison(tmp_path, dict.fromkeys(METHODS)))
    finish(runs["A", 1], [])
    runs["A", 1].evaluation.write_text("{")
    runs["A", 1].file("training", "evaluation")
    with pytest.raises(StoreError, match=r"evaluation.json: damaged .* delete it, and the same command makes it again"):
        read_outcomes(list(runs.values()))


def test_scores_of_whole_runs_are_tested_over_the_seeds_where_all_have_one(tmp_path):
    def score(value: float | None) -> dict[str, Any]:
        of = measure("perplexity, words", [9.0], [value], share=False, set="words")
        of["adapters"] = {name: {**facts, "n": 50} for name, facts in of["adapters"].items()}
        return of

    values = {"plain SFT": (7.0, 7.4, 7.1), "A": (5.0, 5.1, 5.3), "B": (6.0, 6.1, None)}
    runs = {(name, seed): [score(of[seed - 1])] for name, of in values.items() for seed in (1, 2, 3)}
    found = only(content_of(tmp_path, runs), "perplexity, words")
    assert not found["per_prompt"]
    pairs = {(one["of"], one["against"]): one for one in found["differences"]}
    expected = stats.ttest_rel(values["A"], values["plain SFT"])
    assert pairs["A", "plain SFT"]["p"] == pytest.approx(expected.pvalue)
    assert pairs["A", "plain SFT"]["seeds"] == 3
    assert found["models"]["B"]["value"] is None
    assert "p" not in pairs["B", "plain SFT"]
