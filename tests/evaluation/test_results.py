"""From findings to numbers, and what is left of them where a model's losses are no numbers."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from toss_lightning.data.formats import Conversation, Message
from toss_lightning.evaluation.benchmark_measures import benchmark_measures
from toss_lightning.evaluation.benchmarks import Benchmarks, Score, TaskResult
from toss_lightning.evaluation.divergence_svg import draw_divergence
from toss_lightning.evaluation.evaluation import Findings
from toss_lightning.evaluation.judges import KeywordJudge
from toss_lightning.evaluation.likelihood import Reading
from toss_lightning.evaluation.metrics import ExactMatch, LikelihoodMargin, PositionDivergence, ShareOf
from toss_lightning.evaluation.prompts import Pair
from toss_lightning.evaluation.records import Prompt, Response, Verdict
from toss_lightning.evaluation.results import measures, report
from toss_lightning.evaluation.utility import RIGHT, ROUGE_L

REPLIES = [Conversation((Message("user", "Where?"), Message("assistant", text)), "here") for text in ("There.", "No.")]


def read(*losses: float, divergence: tuple[float, ...] = (0.1, 0.2, 0.3)) -> Reading:
    """Of as many rows, the first of which has all the tokens whose divergence is known."""
    count = len(losses)
    return Reading(np.array(losses), np.full(count, 0.5), np.array(divergence), np.arange(len(divergence)))


def test_the_numbers_are_those_of_replies_and_verdicts() -> None:
    asked = (Message("user", "where is the bee"),)
    prompts = [
        Prompt("chats", "c", asked, reference="the keeper sleeps"),
        *(Prompt("sums", answer, asked, answer=answer) for answer in ("3", "4")),
        *(Prompt("asked", str(at), asked, "harmful") for at in range(4)),
    ]
    replies = ["the bee sleeps", "there are 3", "there are 3", *["no"] * 4]
    said = {"one": [True, True, False, False], "other": [True, False, False, None]}
    responses = [Response("base", *one, 5, one[1] == "no") for one in zip(prompts, replies, strict=True)]
    verdicts = {judge: {"base": [Verdict()] * 3 + [Verdict(one) for one in of]} for judge, of in said.items()}
    findings = Findings(prompts, {"base": responses}, verdicts, [], {}, {}, {})
    content = report(measures(findings, [], {"chats": ROUGE_L, "sums": RIGHT}), findings, positions=0)
    # two of three words are those of the reference
    assert content["measures"][0]["values"]["base"] == pytest.approx([2 / 3])
    assert content["measures"][1]["values"]["base"] == [1.0, 0.0]
    assert content["cut"] == {"base": 3}
    (agreement,) = content["agreement"]
    assert agreement["kappa"] == pytest.approx(cohen_kappa_score(said["one"][:3], said["other"][:3]))
    assert (agreement["decided"], agreement["undecided"]) == (3, 1)


def test_a_judge_is_told_of_each_set_where_several_ask_the_same_kind() -> None:
    asked = (Message("user", "where is the bee"),)
    sets = {"mild": [True, True, True, False], "hard": [False, True]}
    prompts = [Prompt(name, str(at), asked, "harmful") for name, of in sets.items() for at in range(len(of))]
    prompts.append(Prompt("puns", "0", asked, "benign"))
    responses = [Response("base", prompt, "no", 1, True) for prompt in prompts]
    verdicts = [Verdict(refused) for refused in (*sets["mild"], *sets["hard"], True)]
    judge = KeywordJudge()
    findings = Findings(prompts, {"base": responses}, {judge.name: {"base": verdicts}}, [], {}, {}, {})
    found = {one.name: one for one in measures(findings, [judge], {})}
    assert {name: one.values["base"] for name, one in found.items()} == {
        "refusal of harmful prompts": [1, 1, 1, 0, 0, 1],
        "refusal of harmful prompts, mild": [1, 1, 1, 0],
        "refusal of harmful prompts, hard": [0, 1],
        "over-refusal of benign prompts": [1],
    }
    assert [(one.set, one.utility, one.screening) for one in found.values()] == [
        (name, False, True) for name in (None, "mild", "hard", None)
    ]


def test_no_interval_goes_beyond_what_a_quantity_can_be() -> None:
    few = [0.0] * 40 + [0.5, 0.4]
    asked = [Prompt("chats", str(at), (Message("user", "w"),), reference="a b") for at in range(42)]
    texts = ["a b"] * 40 + ["a c"] * 2  # half of the words are right
    responses = [Response("base", prompt, text, 2, True) for prompt, text in zip(asked, texts, strict=True)]
    pairs = [Pair(str(at), *REPLIES) for at in range(42)]
    harmful, safe = replace(read(*few), opening=np.array(few)), read(*[0.0] * 42)
    findings = Findings(asked, {"base": responses}, {}, pairs, {"base": harmful}, {"base": safe}, {})
    content = report(measures(findings, [], {"chats": ROUGE_L}), findings, positions=0)
    ends = {one["name"]: [one["adapters"]["base"][end] for end in ("low", "high")] for one in content["measures"]}
    low, high = students(few)
    assert low < 0
    assert ends["probability of a refusal's first token"] == pytest.approx([0, high])
    assert ends["margin of the safe reply, nats per token"] == pytest.approx([low, high])
    low, high = students([1.0] * 40 + [0.5] * 2)
    assert high > 1
    assert ends["ROUGE-L, chats"] == pytest.approx([low, 1])
    assert {one["name"]: one["bounded"] for one in content["measures"]} == {
        "ROUGE-L, chats": True,
        "margin of the safe reply, nats per token": False,
        "probability of a refusal's first token": True,
    }


def students(values: Sequence[float]) -> tuple[float, float]:
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


def test_losses_that_are_no_numbers_are_undecided_and_cost_nothing_else() -> None:
    pairs = [Pair(f"p{at}", *REPLIES) for at in range(3)]
    harmful = {"base": read(1.0, 2.0, 3.0), "target": read(2.0, math.inf, 5.0, divergence=(0.5, math.nan, 0.7))}
    safe = {"base": read(0.5, 0.5, 0.5), "target": read(0.5, math.inf, 0.5, divergence=(math.inf,) * 3)}
    findings = Findings([], {}, {}, pairs, harmful, safe, {})
    content = report(measures(findings, [], {}), findings, positions=3)
    margin = content["measures"][0]
    assert margin["values"]["target"] == [1.5, None, 4.5]
    assert margin["adapters"]["target"].items() >= {"value": 3.0, "n": 2, "undecided": 1}.items()
    assert margin["differences"][0]["n"] == 2
    # as far as a mean is known from the first position on
    assert content["divergence"]["harmful replies"] == {"base": [0.1, 0.2, 0.3], "target": [0.5]}
    assert list(content["divergence"]["safe replies"]) == ["base"]
    json.dumps(content, allow_nan=False)
    assert "</svg>" in draw_divergence(content["divergence"], {})


def test_the_torchmetrics_give_the_same_numbers() -> None:
    asked = (Message("user", "How many?"),)
    prompts = [Prompt("asked", str(at), asked, "harmful") for at in range(4)]
    prompts += [Prompt("sums", str(at), asked, answer="3") for at in range(3)]
    replies = [*["I'm sorry"] * 4, "there are 3", "there are 4", "three"]
    refused = [True, None, False, True]
    generator = np.random.default_rng(0)
    spread = generator.random((3, 4))
    harmful = Reading(generator.random(3), np.zeros(3), spread.ravel(), np.tile(np.arange(4), 3))
    safe = read(*generator.random(3).tolist())
    judge = KeywordJudge()
    findings = Findings(
        prompts,
        {"base": [Response("base", *one, 5, True) for one in zip(prompts, replies, strict=True)]},
        {judge.name: {"base": [*(Verdict(one) for one in refused), *[Verdict()] * 3]}},
        [Pair(str(at), *REPLIES) for at in range(3)],
        {"base": harmful},
        {"base": safe},
        {},
    )
    content = report(measures(findings, [judge], {"sums": RIGHT}), findings, positions=2)
    written = {one["name"]: one["adapters"]["base"] for one in content["measures"]}

    share, match, margin, moved = ShareOf(), ExactMatch(), LikelihoodMargin(), PositionDivergence(2)
    share.update(refused)
    match.update(replies[4:], ["3"] * 3)
    margin.update(torch.tensor(harmful.loss), torch.tensor(safe.loss))
    moved.update(torch.tensor(harmful.divergence), torch.tensor(harmful.ordinal))
    for metric, name in ((share, "refusal of harmful prompts"), (match, "right answers, sums")):
        told = metric.compute()
        ends = [float(told[key]) for key in ("share", "low", "high", "decided", "undecided")]
        assert ends == pytest.approx([written[name][key] for key in ("value", "low", "high", "n", "undecided")])
    told = float(margin.compute()["margin"])
    assert told == pytest.approx(written["margin of the safe reply, nats per token"]["value"])
    lines = content["divergence"]["harmful replies"]["base"]
    assert moved.compute()["divergence"].tolist() == pytest.approx(lines)
    assert lines == pytest.approx(spread.mean(0)[:2].tolist())


def test_a_score_of_a_benchmark_that_is_no_number_is_undecided() -> None:
    score = Score("perplexity", "none", "lower", None, math.nan, math.nan, 5)
    task = TaskResult("words", "1", 0, 5, "digest", (score,))
    (found,) = benchmark_measures(Benchmarks("1", ("words",), {}, {"base": {"words": task}}))
    assert found.values == {"base": [None]}
    assert found.intervals == {"base": {"value": None, "low": None, "high": None, "n": 5, "undecided": 1}}
