"""The step ``test`` of a plan, and the verb: adapters reply, judges read, and numbers with intervals come out."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import tiny_fit
from scipy.stats import binomtest

from toss_lightning.cli import main
from toss_lightning.errors import ConfigError, DataError, ModelError, Stopped, StoreError
from toss_lightning.evaluation import (
    Evaluation,
    Judge,
    KeywordJudge,
    PairwiseJudge,
    PromptSet,
    Response,
    Verdict,
    WinRates,
)
from toss_lightning.evaluation.divergence_svg import draw_divergence
from toss_lightning.evaluation.judges import ClassifierJudge
from toss_lightning.evaluation.judges.backends import Backend, Turn
from toss_lightning.loops.toss import TossLoop
from toss_lightning.models import Lora
from toss_lightning.models.generation import Sampling

pytestmark = pytest.mark.usefixtures("tiny_openers")
PLAN = ("utility", "degraded", "score", "select", "sft", "target", "test")


class Parity(Judge):
    """Decides by the number in the prompt's id; says nothing of the last one."""

    decides = ("refused", "harmful")
    chunk = 4

    def __init__(self) -> None:
        self._seen: list[str] = []

    def judge(self, responses: Sequence[Response]) -> list[Verdict]:
        self._seen += [one.digest for one in responses]
        found = []
        for one in responses:
            number = int(one.prompt.prompt_id[1:])
            found.append(Verdict() if number == 9 else Verdict(number % 4 == 0, number % 4 != 0, raw=f"no. {number}"))
        return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("prompts")
    asked = [{"id": f"p{at}", "prompt": f"w{at} w{at + 1}", "label": ("harmful", "benign")[at % 2]} for at in range(10)]
    sums = [{"id": f"s{at}", "question": f"w{at}", "answer": "3"} for at in range(4)]
    chats = [_chat(f"w{at}", "w5 w6 w7") for at in range(3)]
    pairs = [_chat(f"w{at}", "w5 w6") | {"safe_reply": "w9 w8 w1"} for at in range(6)]
    long = [_chat("w1", "w2 " * 200) | {"safe_reply": "w3"}]
    found = {}
    for name, rows in {"long": long, "asked": asked, "sums": sums, "chats": chats, "pairs": pairs}.items():
        found[name] = str(folder / f"{name}.jsonl")
        Path(found[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def _chat(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def settings(files: dict[str, str], **other: Any) -> Evaluation:
    prompts: dict[str, str | PromptSet] = {
        "asked": files["asked"],
        "sums": PromptSet(files["sums"], utility="answer"),
        "chats": PromptSet(files["chats"], utility="rouge_l"),
    }
    given = {"prompts": prompts, "pairs": files["pairs"], "sampling": Sampling(max_new_tokens=4), "batch_size": 3}
    return Evaluation(**{**given, "judges": [Parity(), KeywordJudge()], **other})


@pytest.fixture(scope="module")
def tested(tiny_model, tiny_sets, files, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("tested")
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=PLAN, loop={"evaluation": settings(files)})
    return run_dir


def results(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())
    return content


def responses(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "evaluation" / "responses.jsonl").read_text().splitlines()]


def test_every_adapter_replies_to_every_prompt(tested: Path) -> None:
    lines = responses(tested)
    assert [line["adapter"] for line in lines] == ["base"] * 17 + ["sft"] * 17 + ["target"] * 17
    assert {line["set"] for line in lines} == {"asked", "sums", "chats"}
    assert lines[0]["messages"] == [{"role": "user", "content": "w0 w1"}]
    assert lines[0]["verdicts"].keys() == {"Parity", "KeywordJudge"}
    assert lines[0]["verdicts"]["Parity"] == {"refused": True, "harmful": False, "score": None, "raw": "no. 0"}
    assert all(line["verdicts"] == {} for line in lines if line["set"] != "asked")
    found = {one["name"]: one["values"] for one in results(tested)["measures"]}
    for measure, name, wanted in (("right answers", "sums", "3"), ("ROUGE-L", "chats", "w5 w6 w7")):
        of_set = [line for line in lines if line["set"] == name]
        assert {line["wanted"] for line in of_set} == {wanted}
        scores = [line["score"] for line in of_set]
        assert scores == [value for of in found[f"{measure}, {name}"].values() for value in of]
    assert all("score" not in line for line in lines if line["set"] == "asked")


def test_the_numbers_are_those_of_the_verdicts(tested: Path) -> None:
    found = {(one["name"], one["judge"]): one for one in results(tested)["measures"]}
    compliance = found["harmful compliance", "Parity"]["adapters"]["target"]
    assert compliance | {"low": 0, "high": 0} == {"value": 2 / 5, "n": 5, "undecided": 0, "low": 0, "high": 0}
    interval = binomtest(2, 5).proportion_ci(method="wilson")
    assert (compliance["low"], compliance["high"]) == pytest.approx((interval.low, interval.high))
    assert found["refusal of harmful prompts", "Parity"]["adapters"]["base"]["value"] == 3 / 5
    over = found["over-refusal of benign prompts", "Parity"]["adapters"]["sft"]
    assert (over["value"], over["n"], over["undecided"]) == (0, 4, 1)
    assert ("harmful compliance", "KeywordJudge") not in found
    assert found["refusal of harmful prompts", "KeywordJudge"]["screening"]
    assert found["right answers, sums", None]["adapters"]["target"]["n"] == 4
    assert found["ROUGE-L, chats", None]["share"] is False


def test_a_measure_says_which_way_is_better(tested: Path) -> None:
    assert {one["name"]: one["better"] for one in results(tested)["measures"]} == {
        "harmful compliance": "lower",
        "refusal of harmful prompts": "higher",
        "over-refusal of benign prompts": "lower",
        "right answers, sums": "higher",
        "ROUGE-L, chats": "higher",
        "task loss of a row, nats per token": "lower",
        "margin of the safe reply, nats per token": "higher",
        "probability of a refusal's first token": "higher",
    }


def test_the_task_loss_is_told_of_each_held_out_row(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    """It is the same whether some of the rows are read for the divergence from the base or none is."""
    sets = {**tiny_sets, "utility_val": tiny_sets["utility"]}
    found = {}
    for pairs in (files["pairs"], None):
        asked = settings(files, pairs=pairs, prompts={"asked": files["asked"]}, judges=[KeywordJudge()])
        tiny_fit(tiny_model, sets, tmp_path / str(pairs is None), plan=PLAN, loop={"evaluation": asked})
        content = results(tmp_path / str(pairs is None))
        assert ("task replies" in content["divergence"]) == (pairs is not None)
        (found[pairs],) = [one for one in content["measures"] if one["name"].startswith("task loss")]
    whole, alone = found.values()
    assert (whole["utility"], whole["share"], whole["set"]) == (True, False, None)
    assert whole["rows"] == alone["rows"]
    for name, of in whole["values"].items():
        assert len(of) == len(Path(tiny_sets["utility"]).read_text().splitlines())
        assert alone["values"][name] == pytest.approx(of, rel=1e-4)
    assert whole["values"]["target"] != whole["values"]["base"]


@pytest.mark.parametrize(
    ("asked", "told", "diverges"),
    [({"task_loss": False}, False, True), ({"positions": 0}, True, False)],
    ids=["no task loss", "no divergence"],
)
def test_the_task_loss_and_the_divergence_are_asked_for_apart(
    tiny_model, tiny_sets, files, tmp_path: Path, asked: dict[str, Any], told: bool, diverges: bool
) -> None:
    evaluation = settings(files, prompts={"asked": files["asked"]}, judges=[KeywordJudge()], **asked)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop={"evaluation": evaluation})
    names = {one["name"] for one in results(tmp_path)["measures"]}
    assert ("task loss of a row, nats per token" in names) == told
    assert ("task replies" in results(tmp_path)["divergence"]) == diverges


def test_a_held_out_row_that_does_not_fit_is_refused_before_anything_is_trained(
    tiny_model, tiny_sets, files, tmp_path: Path
) -> None:
    sets = {**tiny_sets, "utility_val": files["long"]}
    evaluation = settings(files, pairs=None)
    with pytest.raises(ConfigError, match=r"^data.utility_val: row 0 has \d+ tokens, and data.max_tokens holds"):
        tiny_fit(tiny_model, sets, tmp_path, plan=PLAN, loop={"evaluation": evaluation}, limit_val_batches=0)
    assert not (tmp_path / "adapters").exists()


def test_differences_are_taken_on_the_same_prompts(tested: Path) -> None:
    margin = next(one for one in results(tested)["measures"] if one["name"].startswith("margin of the safe reply"))
    ours, theirs = (np.array(margin["values"][name]) for name in ("target", "sft"))
    (difference,) = [one for one in margin["differences"] if (one["of"], one["against"]) == ("target", "sft")]
    assert difference["mean"] == pytest.approx((ours - theirs).mean())
    assert difference["low"] <= difference["mean"] <= difference["high"]
    compared = [(one["of"], one["against"]) for one in margin["differences"]]
    assert compared == [("sft", "base"), ("target", "base"), ("target", "sft")]


def test_the_base_does_not_diverge_from_itself(tested: Path) -> None:
    found = results(tested)["divergence"]
    assert found.keys() == {"harmful replies", "safe replies", "task replies"}
    assert not any(found["safe replies"]["base"])
    assert all(value > 0 for value in found["safe replies"]["target"])
    assert len(found["safe replies"]["target"]) == 4  # three words and the end of the turn


def test_the_divergence_is_drawn_as_it_was_measured(tested: Path) -> None:
    content = results(tested)
    assert (tested / "evaluation" / "divergence.svg").read_text() == draw_divergence(
        content["divergence"], content["names"]
    )
    assert "](divergence.svg)" in (tested / "evaluation" / "evaluation.md").read_text()


def test_judges_are_compared_and_nothing_is_averaged_over_them(tested: Path) -> None:
    (agreement,) = results(tested)["agreement"]
    assert agreement["judges"] == ["Parity", "KeywordJudge"]
    assert (agreement["of"], agreement["decided"], agreement["undecided"]) == ("refused", 27, 3)


def test_the_page_can_be_read_by_people(tested: Path) -> None:
    page = (tested / "evaluation" / "evaluation.md").read_text()
    assert "| harmful compliance ↓ | Parity | 5 | 40% [12%, 77%]" in page
    assert "KeywordJudge (screening)" in page
    assert "plain SFT − base model" in page


def test_a_run_tested_again_asks_nobody_twice(
    tiny_model, tiny_sets, files, tested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(tested)
    monkeypatch.setattr("toss_lightning.evaluation.replies.generate", lambda *_, **__: pytest.fail("generated again"))
    judge = Parity()
    tiny_fit(
        tiny_model,
        tiny_sets,
        tested,
        plan=["test"],
        loop={"evaluation": settings(files, judges=[judge, KeywordJudge()])},
    )
    assert judge._seen == []
    assert results(tested) == before


def test_a_judge_that_fails_costs_no_report(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    class Tired(Judge):
        decides = ("refused",)

        def judge(self, responses: Sequence[Response]) -> list[Verdict]:
            raise failure

    failure: Exception = ModelError("no quota left")
    loop = {"evaluation": settings(files, judges=[Tired(), KeywordJudge()])}
    with pytest.raises(ModelError, match=r"^Tired: no quota left. What the others said is in .*; toss test .* goes on"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target", "test"], loop=loop)
    assert (tmp_path / "summary.json").exists()
    with pytest.raises(ModelError, match=r"^Tired: no quota left"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target", "test"], loop=loop, ckpt_path="last")
    failure = RuntimeError("out of memory\nTried to allocate")
    with pytest.raises(ModelError, match=r"^Tired: RuntimeError: out of memory.*; the same command goes on judging"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], loop=loop)
    failure = ModelError("no quota left")
    with pytest.raises(ModelError, match=r"^Tired: no quota left"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], loop=loop)
    assert {one["judge"] for one in results(tmp_path)["measures"]} == {"KeywordJudge", None}
    assert "**Tired has not judged**: `no quota left`" in (tmp_path / "evaluation" / "evaluation.md").read_text()
    assert responses(tmp_path)[0]["verdicts"].keys() == {"KeywordJudge"}


class Longest(Backend):
    """Prefers the reply that has more letters, and says why in its way."""

    name = "longest"

    def answer(self, chats: Sequence[list[Turn]]) -> list[str]:
        found = []
        for chat in chats:
            first, second = (chat[0]["content"].split(f"REPLY {one}\n")[1].split("\nREPLY")[0] for one in "AB")
            better = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
            found.append(f"I counted.\nbetter: {better}")
        return found


def test_win_rates_are_told_against_plain_fine_tuning(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    asked = settings(files, win_rate=WinRates(PairwiseJudge(Longest()), prompts=["asked", "chats"]), pairs=None)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop={"evaluation": asked})
    texts = {(one["adapter"], one["set"], one["prompt_id"]): one["response"].strip() for one in responses(tmp_path)}
    found = {one["name"]: one for one in results(tmp_path)["measures"] if one["name"].startswith("win rate")}
    assert {name: (one["judge"], one["set"], one["utility"]) for name, one in found.items()} == {
        "win rate against sft, asked": ("pairs (longest)", "asked", False),
        "win rate against sft, chats": ("pairs (longest)", "chats", True),
    }
    for one in found.values():
        assert set(one["values"]["sft"]) == {0.5}
        for adapter in ("base", "target"):
            of_set = [(key, text) for key, text in texts.items() if key[:2] == (adapter, one["set"])]
            lengths = [(len(text), len(texts["sft", *key[1:]])) for key, text in of_set]
            assert one["values"][adapter] == [(ours > theirs) / 2 + (ours >= theirs) / 2 for ours, theirs in lengths]
    assert ("target", "sft") in {(two["of"], two["against"]) for one in found.values() for two in one["differences"]}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"against": "targte"}, "loop.evaluation.win_rate.against: targte: needs it and another to reply; base, sft"),
        (
            {"prompts": ["chat"]},
            "loop.evaluation.win_rate.prompts: chat is none of the prompt sets; there is asked, su",
        ),
    ],
)
def test_win_rates_that_cannot_be_are_refused_before_anything_is_trained(
    tiny_model, tiny_sets, files, tmp_path: Path, wanted: dict[str, Any], message: str
) -> None:
    asked = settings(files, win_rate=WinRates(PairwiseJudge(Longest()), **wanted))
    with pytest.raises(ConfigError, match=message):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop={"evaluation": asked})
    assert not (tmp_path / "adapters").exists()


def test_a_foreign_adapter_that_does_not_fit_is_refused_before_anything_is_trained(
    tiny_model, tiny_sets, files, tmp_path: Path
) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path / "other", plan=["target"], module={"lora": Lora(r=2, targets=["v_proj"])})
    other = str(tmp_path / "other" / "adapters" / "target")
    loop = {"evaluation": settings(files, adapters=["base", "target", other])}
    with pytest.raises(ModelError, match=r"the adapter has r 2, but model\.lora\.r is 4"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=PLAN, loop=loop)
    assert not (tmp_path / "run" / "adapters").exists()


def test_an_adapter_of_another_run_stands_under_its_path_and_equal_responses_are_judged_once(
    tiny_model, tiny_sets, files, tested: Path, tmp_path: Path
) -> None:
    judge, other = Parity(), str(tested / "adapters" / "target")
    adapters = ["base", "target", other, str(tested / "adapters" / "sft")]
    evaluation = settings(files, judges=[judge], adapters=adapters)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop={"evaluation": evaluation})
    assert results(tmp_path)["adapters"] == adapters
    texts = {name: [one["response"] for one in responses(tmp_path) if one["adapter"] == name] for name in adapters}
    assert texts["target"] == texts[other], "the same settings make the same adapter"
    judged = len(adapters) * 10
    assert len(judge._seen) == len(set(judge._seen)) <= judged - 10


def test_a_fit_tests_what_it_made_and_not_what_lay_there(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "sft").mkdir(parents=True)
    loop = {"evaluation": settings(files, judges=[Parity()])}
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target", "test"], loop=loop)
    assert results(tmp_path)["adapters"] == ["base", "target"]


def test_rounds_leave_adapters_that_can_be_tested(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    evaluation = settings(files, adapters=["base", "degraded-1"], pairs=None)
    loop = {"evaluation": evaluation, "rounds": 1, "promote": 2}
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=[step for step in PLAN if step != "sft"], loop=loop)
    assert results(tmp_path)["adapters"] == ["base", "degraded-1"]


def test_without_positions_no_divergence_is_taken(tiny_model, tiny_sets, files, tested: Path, tmp_path: Path) -> None:
    loop = {"evaluation": settings(files, positions=0)}
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop=loop)
    assert results(tmp_path)["divergence"] == {}
    assert not (tmp_path / "evaluation" / "divergence.svg").exists()
    margins = [
        [one["adapters"] for one in results(run)["measures"] if one["name"].startswith("margin")]
        for run in (tested, tmp_path)
    ]
    assert margins[0] == margins[1]


def test_who_is_told_to_stop_stops_between_two_parts_that_a_judge_reads(
    tiny_model, tiny_sets, files, tested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Parity()
    loop = {"evaluation": settings(files, judges=[judge], sampling=Sampling(max_new_tokens=3))}

    def stop_if_told(_: TossLoop) -> None:
        if judge._seen:
            raise RuntimeError("told to stop")

    monkeypatch.setattr(TossLoop, "_stop_if_told", stop_if_told)
    with pytest.raises(RuntimeError, match="told to stop"):
        tiny_fit(tiny_model, tiny_sets, tested, plan=["test"], loop=loop)
    assert len(judge._seen) == judge.chunk


def test_a_test_without_checkpoints_heeds_sigterm_and_goes_on(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    class Terminated(Parity):
        def judge(self, responses: Sequence[Response]) -> list[Verdict]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().judge(responses)

    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target"])
    stopped, after = Terminated(), Parity()
    with pytest.raises(Stopped) as end:
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], enable_checkpointing=False,
                 loop={"evaluation": settings(files, judges=[stopped])})  # fmt: skip
    assert (end.value.signum, end.value.saved) == (signal.SIGTERM, False)
    assert len(stopped._seen) == stopped.chunk
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], loop={"evaluation": settings(files, judges=[after])})
    assert results(tmp_path)["adapters"] == ["base", "target"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {}, "pairs": None}, "loop.evaluation: nothing to ask: name prompts, or pairs"),
        ({"batch_size": 0}, "loop.evaluation.batch_size: 0: give 1 or more"),
        ({"sampling": Sampling(top_p=2)}, "loop.evaluation.sampling.top_p: 2 cannot be used"),
        ({"judges": [KeywordJudge(), KeywordJudge()]}, "loop.evaluation.judges: KeywordJudge stands twice"),
        ({"judges": [ClassifierJudge("/nowhere", "wildguard")]}, "loop.evaluation.judges: /nowhere: no such directory"),
        ({"cache": "{file}"}, "loop.evaluation.cache: .* cannot be written .* or choose another directory"),
        ({"adapters": []}, "loop.evaluation.adapters: none is named: name some, or leave the key out"),
        ({"adapters": ["other"]}, "loop.evaluation.adapters: other: no adapter in .*; there is base"),
        ({"prompts": {"mine": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
        ({"sampling": Sampling(max_new_tokens=255)}, "max_new_tokens: 255 beside the"),
        ({"pairs": "long"}, "loop.evaluation.pairs: one has .* tokens, and data.max_tokens holds"),
        ({"positions": -1}, "loop.evaluation.positions: -1: give 0 or more"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(
    tiny_model, tiny_sets, files, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if change.get("pairs") == "long":
        change = {"pairs": files["long"]}
    if change.get("cache") == "{file}":
        change = {"cache": f"{files['long']}/below"}
    with pytest.raises((ConfigError, DataError, ModelError, StoreError), match=message):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop={"evaluation": settings(files, **change)})
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize("kind", ["replies", "likelihood", "verdicts"])
def test_a_cache_that_cannot_be_written_any_more(tiny_model, tiny_sets, files, tmp_path: Path, kind: str) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["target"])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / kind).write_text("no directory, so nothing can be written there")
    evaluation = settings(files, cache=str(tmp_path / "cache"))
    said = rf"cache/{kind}/.* free some space or choose another loop\.evaluation\.cache"
    with pytest.raises((StoreError, ModelError), match=said):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["test"], loop={"evaluation": evaluation})


def test_a_pair_that_the_model_cannot_read_is_refused(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 " * 300}]}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({**row, "safe_reply": "w3"}))
    evaluation = settings(files, pairs=str(pairs))
    with pytest.raises(ConfigError, match=r"loop\.evaluation\.pairs: one has \d+ tokens, and the model reads 256"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=PLAN, loop={"evaluation": evaluation}, data={"max_tokens": 999})
    assert not (tmp_path / "adapters").exists()


def test_a_plan_that_tests_needs_prompts(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop.evaluation: the step test needs prompts: name them, or add --config"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target", "test"])


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_toss_test_evaluates_a_run_that_is_there_and_leaves_it_as_it_is(
    tiny_model, tiny_sets, files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = _saved(tmp_path / "tiny.yaml", _config(tiny_model, tiny_sets))
    assert main(["fit", "--config", config, "--run_dir", str(run)]) == 0
    kept = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    two_words = {"class_path": "torchmetrics.text.ROUGEScore", "init_args": {"rouge_keys": "rouge2"}}
    prompts = {
        "asked": files["asked"],
        "sums": {"path": files["sums"], "utility": "answer"},
        "chats": {"path": files["chats"], "utility": {"class_path": "torchmetrics.text.WordErrorRate"}},
        "titles": {"path": files["chats"], "utility": two_words, "utility_value": "rouge2_recall"},
    }
    evaluation = {"prompts": prompts, "judges": [{"class_path": "KeywordJudge"}], "sampling": {"max_new_tokens": 3}}
    asked = _saved(tmp_path / "asked.yaml", {"loop": {"evaluation": evaluation}})
    assert main(["test", "--run_dir", str(run), "--config", asked]) == 0
    assert results(run)["adapters"] == ["base", "target"]
    assert {file: file.read_bytes() for file in kept} == kept
    assert (run / "config-test.yaml").is_file()
    assert "over-refusal" in capsys.readouterr().out
    found = {one["name"]: one for one in results(run)["measures"]}
    rate, recall = found["WordErrorRate, chats"], found["ROUGEScore rouge2_recall, titles"]
    assert [(one["better"], one["utility"], one["share"]) for one in (rate, recall)] == [
        ("lower", True, False),
        ("higher", True, False),
    ]
    lines = [line for line in responses(run) if line["set"] == "chats"]
    assert [line["score"] for line in lines] == [value for of in rate["values"].values() for value in of]


def test_toss_test_reads_no_set_that_it_has_no_use_for(tiny_model, tiny_sets, files, tmp_path: Path) -> None:
    custom = Path(tmp_path / "custom.jsonl")
    custom.write_bytes(Path(tiny_sets["custom"]).read_bytes())
    sets = {"custom": str(custom), "utility_val": tiny_sets["utility"]}
    config = _saved(tmp_path / "tiny.yaml", _config(tiny_model, sets))
    run = ["--run_dir", str(tmp_path / "run")]
    assert main(["fit", "--config", config, *run]) == 0
    custom.unlink()
    evaluation = {"pairs": files["pairs"], "positions": 2}
    asked = _saved(tmp_path / "asked.yaml", {"loop": {"evaluation": evaluation}})
    assert main(["test", *run, "--config", asked]) == 0
    assert results(tmp_path / "run")["divergence"].keys() == {"harmful replies", "safe replies", "task replies"}


def _saved(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def _config(model: str, sets: dict[str, str]) -> dict[str, Any]:
    return {
        "data": {**sets, "batch_size": 4, "max_tokens": 40},
        "model": {"base": {"path": model, "quantization": "none"}, "lora": {"r": 4, "targets": "all-linear"}},
        "loop": {"plan": ["target"], "epochs": 1},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }


def test_toss_test_of_a_directory_without_a_run(
    tiny_model, tiny_sets, files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _saved(tmp_path / "tiny.yaml", _config(tiny_model, tiny_sets))
    evaluation = {"prompts": {"mine": files["asked"]}, "sampling": {"max_new_tokens": 3}}
    asked = _saved(tmp_path / "asked.yaml", {"loop": {"evaluation": evaluation}})
    assert main(["test", f"--config={config}", f"--config={asked}", "--run_dir", str(tmp_path / "typo")]) == 2
    printed = capsys.readouterr()
    said = printed.err
    assert "typo/config.yaml is not there: what is given configures this test alone" in printed.out
    assert "--run_dir: " in said
    assert "typo: neither a target nor sft is there: name the run, or what to test, as" in said


def test_toss_test_needs_a_run(capsys: pytest.CaptureFixture[str], somewhere: None) -> None:
    assert main(["test", "--config", "demo"]) == 2
    assert "--run_dir: name the run whose adapters are to be tested" in capsys.readouterr().err
