"""Tasks of lm-evaluation-harness on the model in memory, against plain accuracy by transformers and peft alone."""

import hashlib
import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness_tasks import CHOICES, NEXT, QUESTIONS, WORD, Plain, questions, write_tasks
from made_runs import finish, made, write_comparison
from runs import tiny_fit
from scipy.stats import binomtest
from transformers import AutoTokenizer

from toss_lightning.cli import main
from toss_lightning.compare.measured import read_outcomes
from toss_lightning.compare.numbers import compare_outcomes
from toss_lightning.errors import ConfigError, DataError, StoreError
from toss_lightning.evaluation import Evaluation, LmEval
from toss_lightning.evaluation.harness import Harness
from toss_lightning.evaluation.statistics import paired_difference
from toss_lightning.models import Base

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install --editable ".[lm_eval]"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, questions())
    return folder


@pytest.fixture
def no_public_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if lm_eval brought no tasks: to find all of its own takes seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def settings(folder: Path, cache: Path | None = None, **other: Any) -> Evaluation:
    options = {"tasks": [CHOICES, NEXT, WORD], "include_path": str(folder), **other}
    return Evaluation(lm_eval=LmEval(**options), cache=str(cache) if cache else None)


@pytest.fixture(scope="module")
def unquantised(tiny_model, tiny_sets, folder, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("none")
    plan = ["utility", "degraded", "score", "select", "sft", "target", "test"]
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=plan, loop={"evaluation": settings(folder)})
    return run_dir


@pytest.fixture(scope="module")
def nf4(tiny_model, tiny_sets, folder, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("nf4")
    base = {"base": Base(tiny_model, quantization="nf4")}
    tiny_fit(
        tiny_model, tiny_sets, run_dir, plan=["target", "test"], loop={"evaluation": settings(folder)}, module=base
    )
    return run_dir


def results(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())
    return content


def measures(run_dir: Path) -> dict[str, Any]:
    return {one["name"]: one for one in results(run_dir)["measures"]}


# --- against transformers and peft alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_scores_are_what_transformers_and_peft_give(
    request: pytest.FixtureRequest, tiny_model: str, quantization: str
) -> None:
    run_dir: Path = request.getfixturevalue("unquantised" if quantization == "none" else "nf4")
    found = measures(run_dir)
    for name in results(run_dir)["adapters"]:
        plain = Plain(tiny_model, run_dir / "adapters" / name if name != "base" else None, quantization)
        assert found[f"acc, {CHOICES}"]["values"][name] == plain.right_choices(by_length=False)
        assert found[f"acc_norm, {CHOICES}"]["values"][name] == plain.right_choices(by_length=True)
        assert found[f"exact_match (first), {NEXT}"]["values"][name] == plain.right_words()
        assert found[f"perplexity, {WORD}"]["adapters"][name]["value"] == pytest.approx(plain.perplexity(), rel=1e-4)
    assert 0 < found[f"exact_match (first), {NEXT}"]["adapters"]["base"]["value"] < 1
    perplexities = [one["value"] for one in found[f"perplexity, {WORD}"]["adapters"].values()]
    assert len(set(perplexities)) == len(perplexities) == (3 if quantization == "none" else 2)


# --- intervals and comparisons ----------------------------------------------------------------------------------------


def test_intervals_are_wilsons_for_shares_and_by_the_standard_error_for_the_rest(unquantised: Path) -> None:
    found = measures(unquantised)
    one = found[f"acc, {CHOICES}"]
    interval = one["adapters"]["target"]
    wilson = binomtest(int(sum(one["values"]["target"])), QUESTIONS).proportion_ci(method="wilson")
    assert (interval["low"], interval["high"]) == pytest.approx((wilson.low, wilson.high))
    assert (one["set"], one["better"], one["share"], interval["n"]) == (CHOICES, "higher", True, QUESTIONS)
    other = found[f"perplexity, {WORD}"]
    assert (other["better"], other["share"], other["adapters"]["target"]["n"]) == ("lower", False, QUESTIONS)
    (kept,) = [one for one in stored(unquantised, WORD) if one["scores"][0]["value"] == other["values"]["target"][0]]
    reach = 1.959964 * kept["scores"][0]["stderr"]
    value, low, high = (other["adapters"]["target"][key] for key in ("value", "low", "high"))
    assert (low, high) == pytest.approx((value - reach, value + reach))
    assert reach > 0


def stored(run_dir: Path, task: str) -> list[dict[str, Any]]:
    """What was kept of each adapter."""
    return [json.loads(file.read_text()) for file in (run_dir / "evaluation" / "lm_eval").glob(f"{task}-*.json")]


def test_differences_are_taken_on_the_same_questions(unquantised: Path) -> None:
    one = measures(unquantised)[f"acc, {CHOICES}"]
    (found,) = [of for of in one["differences"] if (of["of"], of["against"]) == ("target", "base")]
    wanted = paired_difference(one["values"]["target"], one["values"]["base"])
    assert (found["n"], found["mean"], found["p"]) == (QUESTIONS, wanted.mean, wanted.p)


def test_toss_compare_pairs_the_questions_of_two_methods(unquantised: Path, tmp_path: Path) -> None:
    _, runs = made(write_comparison(tmp_path, dict.fromkeys(("A", "B")), seeds=[1]))
    own = results(unquantised)["measures"]
    other = [{**one, "values": {**one["values"], "target": one["values"]["sft"]}} for one in own]
    finish(runs["A", 1], own)
    finish(runs["B", 1], other)
    content = compare_outcomes(read_outcomes(list(runs.values())), ["A", "B"], "A")
    found = {one["name"]: one for one in content["measures"]}
    accuracy, perplexity = found[f"acc, {CHOICES}"], found[f"perplexity, {WORD}"]
    (difference,) = [one for one in accuracy["differences"] if (one["of"], one["against"]) == ("B", "A")]
    values = measures(unquantised)[f"acc, {CHOICES}"]["values"]
    wanted = paired_difference(values["sft"], values["target"])
    assert accuracy["is_utility"]
    assert (difference["n"], difference["mean"], difference["p"]) == (QUESTIONS, wanted.mean, wanted.p)
    assert perplexity["models"]["A"]["value"] == measures(unquantised)[f"perplexity, {WORD}"]["values"]["target"][0]
    assert all("p" not in one for one in perplexity["differences"])


def test_the_page_says_what_was_asked(unquantised: Path) -> None:
    page = (unquantised / "evaluation" / "evaluation.md").read_text()
    assert f"| acc, {CHOICES} ↑ |  | {QUESTIONS} | " in page
    assert f"- {CHOICES}, version 2.0: 0-shot, {QUESTIONS} of {QUESTIONS} questions" in page
    assert results(unquantised)["lm_eval"]["tasks"].keys() == {CHOICES, NEXT, WORD}


def test_a_group_is_counted_over_all_its_questions(
    tiny_model, tiny_sets, unquantised: Path, folder: Path, tmp_path: Path, no_public_tasks: None
) -> None:
    shutil.copytree(unquantised / "adapters", tmp_path / "adapters")
    evaluation = settings(folder, tasks=["w_all"], limit=7)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], loop={"evaluation": evaluation})
    (one,) = [one for one in results(tmp_path)["measures"] if one["set"] is not None]
    alone = measures(unquantised)[f"acc, {CHOICES}"]["values"]
    assert one["name"] == "acc, w_all"
    assert one["values"] == {name: of[:7] * 2 for name, of in alone.items()}
    page = (tmp_path / "evaluation" / "evaluation.md").read_text()
    assert f"- w_all, 2 tasks: 0-shot, 14 of {2 * QUESTIONS} questions" in page


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_examples_are_the_same_for_every_adapter_and_a_chat_template_is_that_of_the_model(
    tiny_model, tiny_sets, unquantised: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(unquantised / "adapters", tmp_path / "adapters")
    asked = settings(folder, tasks=[CHOICES], num_fewshot=2, limit=5)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], loop={"evaluation": asked})
    with_examples = stored(tmp_path, CHOICES)
    assert [one["num_fewshot"] for one in with_examples] == [2, 2, 2]
    assert [one["doc_id"] for one in with_examples[0]["samples"]] == list(range(5))
    prompts = {tuple(sample["prompt_hash"] for sample in one["samples"]) for one in with_examples}
    assert len(prompts) == 1

    shutil.rmtree(tmp_path / "evaluation")
    asked = settings(folder, tasks=[CHOICES], limit=2, apply_chat_template=True)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["test"], loop={"evaluation": asked})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chats = [[{"role": "user", "content": one["asked"]}] for one in questions()[:2]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert [one["prompt_hash"] for one in stored(tmp_path, CHOICES)[0]["samples"]] == hashes


def test_nothing_is_asked_twice_and_what_changes_is_asked_anew(
    tiny_model, tiny_sets, unquantised: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    asked: list[str] = []

    def watched(**options: Any) -> Any:
        asked.extend(options["task_dict"]["tasks"])
        return lm_eval.evaluator.evaluate(**options)

    def tested_again(evaluation: Evaluation) -> list[str]:
        asked.clear()
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["test"], loop={"evaluation": evaluation})
        return sorted(asked)

    shutil.copytree(unquantised, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    cache = tmp_path / "run" / "evaluation"
    before = results(unquantised)
    monkeypatch.setattr(lm_eval, "evaluate", watched, raising=False)
    assert tested_again(settings(folder)) == []
    assert results(tmp_path / "run") == before
    killed = next((cache / "lm_eval").glob(f"{NEXT}-*.json"))
    killed.unlink()
    assert tested_again(settings(folder)) == [NEXT]
    assert results(tmp_path / "run") == before
    assert tested_again(settings(folder, tasks=[CHOICES], limit=3)) == [CHOICES] * 3
    asked_of = f"lm_eval: {CHOICES}"
    assert results(tmp_path / "run")["asked"][asked_of] != before["asked"][asked_of]
    changed = tmp_path / "changed"
    changed.mkdir()
    write_tasks(changed, [{**one, "right": 0} for one in questions()])
    assert tested_again(settings(changed, cache, tasks=[CHOICES])) == [CHOICES] * 3


def test_a_task_below_the_home_directory_and_answers_that_cannot_be_kept(
    tiny_model, tiny_sets, folder: Path, tmp_path: Path, no_public_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["target"])
    harness = Harness(LmEval([f"~/{CHOICES}.yaml"], limit=2), trainer.datamodule.chat)
    (tmp_path / "lm_eval").write_text("no directory, so nothing can be written there")
    with pytest.raises(StoreError, match=r"lm_eval/.* free some space or choose another loop\.evaluation\.cache"):
        harness.answers(trainer, "base", "base", tmp_path / "lm_eval")


def test_code_of_a_task_is_known_by_what_it_says_and_not_by_where_it_lies_in_memory(
    tiny_model, tiny_sets, folder: Path, tmp_path: Path, no_public_tasks: None
) -> None:
    tasks, code, cache = tmp_path / "tasks", tmp_path / "tasks" / "helpers.py", tmp_path / "cache"
    shutil.copytree(folder, tasks)
    described = yaml.safe_load((tasks / f"{CHOICES}.yaml").read_text())
    described.update(task="w_python", process_docs="HERE")
    (tasks / "w_python.yaml").write_text(yaml.safe_dump(described).replace("HERE", "!function helpers.shown"))
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["target"])

    def written(text: str) -> int:
        """How many results there are once the task was asked with this code, which lm_eval loads anew."""
        code.write_text(text)
        asked = LmEval(["w_python"], include_path=str(tasks), limit=4)
        Harness(asked, trainer.datamodule.chat).answers(trainer, "base", "base", cache)
        return len([*cache.iterdir()])

    first = "KEPT = 8\n\ndef kept():\n    return range(KEPT)\n\ndef shown(docs):\n    return docs.select(kept())\n"
    assert written(first) == 1
    assert written(first) == 1
    assert written(first.replace("KEPT = 8", "KEPT = 6")) == 2


def test_random_numbers_and_the_model_are_left_as_they_were(
    tiny_model, tiny_sets, unquantised: Path, folder: Path, tmp_path: Path
) -> None:
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target"])
    module, chat = trainer.lightning_module, trainer.datamodule.chat
    module.train()
    generation = module.bank.model.generation_config
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    weights = {name: value.clone() for name, value in module.bank.model.state_dict().items()}
    asked = LmEval([CHOICES, NEXT], include_path=str(folder), limit=4)
    found = Harness(asked, chat).answers(trainer, "slot", "target", tmp_path / "lm_eval")
    assert found[CHOICES].scores[0].n == 4
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == before
    assert module.training
    assert module.bank.active == "slot"
    assert module.bank.model.generation_config is generation
    assert all(value.equal(weights[name]) for name, value in module.bank.model.state_dict().items())
    trained = [name for name, value in module.named_parameters() if value.requires_grad]
    assert trained
    assert all(".slot." in name for name in trained)
    file = next((tmp_path / "lm_eval").glob("*.json"))
    file.write_text("{")
    with pytest.raises(StoreError, match=r"damaged .* delete it and run the test again"):
        Harness(asked, chat).answers(trainer, "slot", "target", tmp_path / "lm_eval")


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, r"loop.evaluation.lm_eval.tasks: no task: name some"),
        ({"limit": 0}, r"loop.evaluation.lm_eval.limit: 0: give 1 or more"),
        ({"batch_size": 0}, r"loop.evaluation.lm_eval.batch_size: 0: give 1 or more"),
        ({"num_fewshot": -1}, r"loop.evaluation.lm_eval.num_fewshot: -1: give 0 or more"),
        ({"include_path": "/nowhere"}, r"loop.evaluation.lm_eval.include_path: /nowhere: no such directory"),
        ({"tasks": ["w_nowhere"]}, r"tasks: w_nowhere: the task or its data cannot be read \(.*nowhere.json"),
        ({"tasks": ["w_code"]}, r"tasks: w_code: the task runs code that the model writes, which is not supported"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(
    tiny_model, tiny_sets, folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        tiny_fit(
            tiny_model, tiny_sets, tmp_path, plan=["target", "test"], loop={"evaluation": settings(folder, **change)}
        )
    assert not (tmp_path / "adapters").exists()


def test_an_unknown_task_is_answered_with_those_near_it(folder: Path, no_public_tasks: None) -> None:
    with pytest.raises(ConfigError, match=r"tasks: w_choice: lm_eval knows no such task: near it are w_choices, "):
        Harness(LmEval(["w_choice"], include_path=str(folder)), None)  # type: ignore[arg-type]


def test_without_lm_eval_it_is_said_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toss_lightning.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        Harness(LmEval([CHOICES], include_path=str(folder)), None)  # type: ignore[arg-type]
    assert str(caught.value) == (
        'loop.evaluation.lm_eval: the package lm_eval is not installed: pip install --editable ".[lm_eval]"'
    )


def test_a_task_that_generates_more_than_the_model_can_read_is_refused_before_anything_is_trained(
    tiny_model, tiny_sets, folder: Path, tmp_path: Path
) -> None:
    evaluation = settings(folder, tasks=["w_long"])
    with pytest.raises(ConfigError, match=r"tasks: w_long: its max_gen_toks is 500, but the model can read 256 tokens"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target", "test"], loop={"evaluation": evaluation})
    assert not (tmp_path / "adapters").exists()


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_toss_test_takes_the_tasks_from_a_file_and_from_the_command_line(
    tiny_model, tiny_sets, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "data": {**tiny_sets, "batch_size": 4, "max_tokens": 40},
        "model": {"base": {"path": tiny_model, "quantization": "none"}, "lora": {"r": 4, "targets": "all-linear"}},
        "loop": {"plan": ["target"], "epochs": 1},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(content))
    asked = {"loop": {"evaluation": {"lm_eval": {"tasks": [CHOICES], "include_path": str(folder)}}}}
    (tmp_path / "asked.yaml").write_text(json.dumps(asked))
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--run_dir", str(run)]) == 0
    command = ["test", "--run_dir", str(run), "--config", str(tmp_path / "asked.yaml")]
    assert main([*command, "--loop.evaluation.lm_eval.limit=6"]) == 0
    assert f"acc, {CHOICES}" in capsys.readouterr().out
    assert measures(run)[f"acc, {CHOICES}"]["adapters"]["target"]["n"] == 6
