"""What is read of a run's directory, however far the run went, and what is said where it cannot be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from reported import NASTY, save_reported_model, write_labelled
from runs import tiny_fit
from tiny import WORDS, save_tiny_model

from toss_lightning.errors import ConfigError, ModelError, StoreError
from toss_lightning.report.finished import FinishedRun, read_run
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, TokenWeights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reported_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_labelled(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def whole(model: str, sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of TOSS to its end."""
    run_dir = tmp_path_factory.mktemp("whole")
    tiny_fit(model, sets, run_dir, loop={"epochs": 1})
    return run_dir


@pytest.fixture(scope="module")
def rounds(model: str, sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of TOSS-Pro up to the scores of its second round."""
    run_dir = tmp_path_factory.mktemp("rounds")
    plan = ("utility", "degraded", "score")
    tiny_fit(model, sets, run_dir, plan=plan, loop={"epochs": 1, "rounds": 1, "promote": 2})
    return run_dir


@pytest.fixture(scope="module")
def plain(model: str, sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain fine-tuning, which scores nothing."""
    run_dir = tmp_path_factory.mktemp("plain")
    tiny_fit(model, sets, run_dir, plan=("target",), loop={"epochs": 1})
    return run_dir


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The whole run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoints", "adapters")))


def selected(run_dir: Path, scores: Path, round: int | None = None) -> Path:
    """What toss select leaves behind: a selection, and nothing else."""
    GlobalTopFraction(0.3).select(TokenScores(scores, round)).save(run_dir / "selection")
    return run_dir


def configured(run_dir: Path, **loop: str) -> Path:
    """A run whose configuration says where it takes from what it has not made."""
    run_dir.mkdir(exist_ok=True)
    content = {"loop": {"class_path": "toss_lightning.loops.TossProLoop", "init_args": loop}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))
    return run_dir


def scores_of(run: FinishedRun) -> TokenScores:
    assert run.scores is not None
    return run.scores


def path_of(run: FinishedRun) -> str:
    assert run.base is not None
    return run.base.path


def judged(run_dir: Path, responses: str) -> Path:
    """The run with an evaluation in which nothing was measured, and these responses."""
    (run_dir / "evaluation").mkdir(exist_ok=True)
    lists, tables = ("adapters", "measures", "agreement"), ("names", "divergence", "cut", "failed_judges")
    content = {**{name: [] for name in lists}, **{name: {} for name in tables}}
    (run_dir / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    (run_dir / "evaluation" / "responses.jsonl").write_text(responses, encoding="utf-8")
    return run_dir


def reply(**facts: Any) -> dict[str, Any]:
    """A line of responses.jsonl."""
    asked = {"adapter": "base", "set": "asked", "prompt_id": "1", "label": None, "category": None, "messages": []}
    return {**asked, "response": "So.", "tokens": 3, "stopped": True, "verdicts": {}, **facts}


# --- how far a run went -----------------------------------------------------------------------------------------------


def test_a_whole_run(whole: Path, model: str) -> None:
    run = read_run(whole)
    assert scores_of(run).path == whole / "scores"
    assert run.weights is not None
    assert run.weights.digest() == TokenWeights.load(whole / "selection").digest()
    assert run.method == "TOSS"
    assert path_of(run) == model
    assert run.summary.held_out.keys() == {"base", "utility", "degraded", "target"}
    assert run.facts["seed"] == 1
    assert run.evaluation is None
    assert NASTY in run.tokenizer().get_vocab()


def test_a_run_that_only_scored(rounds: Path, model: str) -> None:
    run = read_run(rounds)
    assert scores_of(run).round == 1
    assert run.weights is None
    assert run.method == "Scores"
    assert (path_of(run), run.summary.held_out.keys()) == (model, {"base", "utility", "degraded", "degraded-1"})


def test_plain_fine_tuning_has_a_summary_and_no_rows(plain: Path, model: str) -> None:
    run = read_run(plain)
    assert (run.scores, run.weights, path_of(run)) == (None, None, model)
    assert run.summary.held_out.keys() == {"base", "target"}
    with pytest.raises(ConfigError, match="no token scores here, and so no rows: name a run of toss fit with the step"):
        run.tokenizer()


def test_a_selection_shows_the_round_that_it_was_made_from(rounds: Path, tmp_path: Path) -> None:
    for round in (0, 1):
        run_dir = tmp_path / str(round)
        run = read_run(selected(run_dir, rounds / "scores", round), rounds / "scores")
        assert scores_of(run).round == round


def test_a_directory_of_toss_select_with_the_scores_that_it_read(whole: Path, model: str, tmp_path: Path) -> None:
    run = read_run(selected(tmp_path / "mine", whole / "scores"), whole / "scores")
    assert scores_of(run).path == whole / "scores"
    assert run.weights is not None
    assert run.weights.report["discard"] == 0.3
    assert run.facts == {}
    assert path_of(run) == model, "the summary beside the scores says so"
    assert run.method == "Selection"
    assert run.tokenizer().get_vocab()


def test_a_selection_without_its_scores_says_what_would_show_its_rows(whole: Path, tmp_path: Path) -> None:
    run = read_run(selected(tmp_path / "mine", whole / "scores"))
    assert (run.scores, run.weights is None) == (None, False)
    assert list(run.warnings) == ["No row is shown: give the scores that were selected from with --scores."]


def test_a_selection_from_references_that_were_then_trained_anew(
    model: str, sets: dict[str, str], whole: Path, copied: Path
) -> None:
    """Its rows are the same, its scores are not."""
    assert list(read_run(whole).warnings) == []
    shutil.rmtree(copied / "scores")
    plan = ("utility", "degraded", "score")
    tiny_fit(model, sets, copied / "anew", plan=plan, loop={"epochs": 2, "reference_epochs": 2}, seed=2)
    (copied / "anew" / "scores").rename(copied / "scores")
    run = read_run(copied)
    (warning,) = run.warnings
    assert "was made from other scores than those in" in warning
    assert "(another degraded, utility)" in warning
    assert run.weights is None
    assert scores_of(run).path == copied / "scores"


def test_scores_of_another_run_that_the_configuration_names(whole: Path, model: str, tmp_path: Path) -> None:
    mine = selected(configured(tmp_path / "mine", scores_from=str(whole / "scores")), whole / "scores")
    run = read_run(mine)
    assert scores_of(run).path == whole / "scores"
    assert run.weights is not None
    assert (run.weights.report["discard"], path_of(run)) == (0.3, model)


def test_a_selection_of_another_run_that_the_configuration_names(whole: Path, tmp_path: Path) -> None:
    run = read_run(configured(tmp_path / "mine", selection_from=str(whole / "selection")))
    assert scores_of(run).path == whole / "scores", "which lie beside it"
    assert run.weights is not None
    assert run.weights.digest() == TokenWeights.load(whole / "selection").digest()


def test_places_below_the_home_directory(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole))
    run = read_run(configured(tmp_path / "mine", selection_from="~/selection", scores_from="~/scores"))
    assert run.weights is not None
    assert scores_of(run).path == whole / "scores"


def test_scores_that_are_named_come_before_those_of_the_run(whole: Path, copied: Path) -> None:
    assert scores_of(read_run(copied, whole / "scores")).path == whole / "scores"


def test_a_summary_of_a_later_version_may_say_more(copied: Path) -> None:
    facts = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(facts | {"weather": "fine"}))
    assert read_run(copied).facts["weather"] == "fine"


def test_replies_may_hold_any_sign(copied: Path) -> None:
    """Line separators of Unicode too, which JSON leaves as they are."""
    lines = [reply(response=text) for text in ("one\u2028two\u0085three", "字")]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    assert list(read_run(judged(copied, content)).responses) == lines


def test_replies_may_have_been_taken_away(copied: Path) -> None:
    """They are what one would not hand on."""
    (judged(copied, "{}") / "evaluation" / "responses.jsonl").unlink()
    run = read_run(copied)
    assert list(run.responses) == []
    assert run.evaluation is not None


def test_the_configuration_says_most_of_a_base(copied: Path, model: str) -> None:
    given = {"path": model, "revision": "mine", "quantization": "none", "of_a_later_version": 1}
    (copied / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"base": given}}}))
    run = read_run(copied)
    assert run.base is not None
    assert (run.base.path, run.base.revision) == (model, "mine")


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a comparison, whose report is compare\.md: name one of its runs"):
        read_run(tmp_path)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: nothing to show: it is not the directory of a run"):
        read_run(tmp_path)


def test_scores_that_were_only_begun(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    with pytest.raises(StoreError, match="no token scores here"):
        read_run(tmp_path)
    with pytest.raises(StoreError, match="nowhere: no token scores here"):
        read_run(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["scores", "selection"])
def test_a_configuration_that_names_what_is_gone(tmp_path: Path, kind: str) -> None:
    run_dir = configured(tmp_path / "mine", **{f"{kind}_from": "elsewhere/run"})
    with pytest.raises(ConfigError, match=f"nothing to show: loop.{kind}_from: elsewhere/run is not there"):
        read_run(run_dir)


@pytest.mark.parametrize("kind", ["scores", "selection"])
def test_a_page_of_what_is_left_where_something_is_gone(whole: Path, tmp_path: Path, kind: str) -> None:
    run_dir = configured(tmp_path / "mine", **{f"{kind}_from": "elsewhere/run"})
    shutil.copy(whole / "summary.json", run_dir)
    run = read_run(run_dir)
    assert list(run.warnings) == [
        f"loop.{kind}_from: elsewhere/run is not there, seen from this folder, and is left out here."
    ]
    assert (run.scores, run.weights) == (None, None)


def test_a_run_that_was_killed(copied: Path) -> None:
    (copied / "summary.json").unlink()
    (copied / "checkpoints").mkdir(exist_ok=True)
    assert list(read_run(copied).warnings) == ["This run has not come to its end."]


@pytest.mark.parametrize("content", ['{"base": "x"', "[1, 2]", '"text"', "\udcff"])
@pytest.mark.parametrize("file", ["summary.json", "evaluation/evaluation.json"])
def test_a_damaged_file(copied: Path, file: str, content: str) -> None:
    (copied / file).parent.mkdir(exist_ok=True)
    (copied / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=rf"{file}: (damaged|not what a run writes).*run the step that wrote it again"):
        read_run(copied)


def test_replies_that_are_damaged(copied: Path) -> None:
    with pytest.raises(StoreError, match=r"responses\.jsonl: damaged .*: run toss test again"):
        read_run(judged(copied, "{broken\n"))
    with pytest.raises(StoreError, match=r"responses\.jsonl: not of this version: run toss test again"):
        read_run(judged(copied, "3\n"))


@pytest.mark.parametrize(
    "damage",
    [
        {"set": 3},
        {"label": 3},
        {"messages": 3},
        {"messages": [3]},
        {"messages": [{"role": "user", "content": None}]},
        {"verdicts": [1]},
        {"verdicts": {"Judge": None}},
        {"verdicts": {"Judge": {"refused": "yes"}}},
        {"verdicts": {"Judge": {"score": "high"}}},
    ],
    ids=str,
)
def test_replies_that_hold_something_else(copied: Path, damage: dict[str, Any]) -> None:
    lines = "".join(json.dumps(one) + "\n" for one in (reply(), reply(**damage)))
    with pytest.raises(StoreError, match=r"responses\.jsonl:2: not of this version: run toss test again$"):
        read_run(judged(copied, lines))


@pytest.mark.parametrize(
    "damage",
    [
        {"base": 3},
        {"method": None},
        {"data": 3},
        {"data": [{"set": "custom", "rows": "many"}]},
        {"data": [3]},
        {"stages": 3},
        {"held_out": [1]},
        {"held_out": {"base": 3}},
        {"held_out": {"base": {"task_loss": "low"}}},
        {"selection": [1]},
        {"selection": {"tokens": 10, "masked": "some"}},
        {"selection": {"masked_share_per_label": {"harmful": 3}}},
        {"correction": [1]},
        {"idle": 3},
        {"weak": ["degraded"]},
        {"stopped": {"target": 3}},
        {"rounds": [1, 2]},
        {"rounds": [{"round": 0}, {"round": 1, "jaccard": "high"}]},
        {"rounds": {"0": {}}},
        {"safety_probe": {"base": 3}},
        {"safety_probe": {"stages": {"target": [3]}}},
    ],
    ids=str,
)
def test_a_summary_that_holds_something_else(copied: Path, damage: dict[str, Any]) -> None:
    facts = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(facts | damage))
    (key,) = damage
    with pytest.raises(StoreError, match=rf"summary\.json: {key}: not what a run writes: run the step that wrote it"):
        read_run(copied)


MEASURE = {
    "name": "harmful compliance",
    "judge": "Judge",
    "screening": False,
    "better": "lower",
    "share": True,
    "adapters": {"base": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2}},
    "differences": [],
}


@pytest.mark.parametrize(
    "damage",
    [
        {"adapters": 3},
        {"adapters": [3]},
        {"measures": 3},
        {"measures": [1]},
        {"measures": [{}]},
        {"measures": [{**MEASURE, "adapters": ["base"]}]},
        {"measures": [{**MEASURE, "adapters": {"base": {"value": "half", "low": None, "high": None, "n": 2}}}]},
        {"measures": [{**MEASURE, "differences": [1]}]},
        {"measures": [{**MEASURE, "differences": [{"of": "target", "against": "base", "n": 2, "mean": "much"}]}]},
        {"names": [1]},
        {"names": {"base": 3}},
        {"divergence": {"task replies": [1]}},
        {"divergence": {"task replies": {"target": ["far"]}}},
        {"agreement": [1]},
        {"agreement": [{"judges": "Judge"}]},
        {"cut": ["base"]},
        {"failed_judges": ["Judge"]},
    ],
    ids=str,
)
def test_an_evaluation_that_holds_something_else(copied: Path, damage: dict[str, Any]) -> None:
    file = judged(copied, "") / "evaluation" / "evaluation.json"
    whole = json.loads(file.read_text()) | {"adapters": ["base"], "measures": [MEASURE]}
    file.write_text(json.dumps(whole))
    assert read_run(copied).evaluation == whole
    file.write_text(json.dumps(whole | damage))
    (key,) = damage
    with pytest.raises(StoreError, match=rf"evaluation\.json: {key}: not what a run writes: run the step that wrote"):
        read_run(copied)


@pytest.mark.parametrize("damage", [{"masked": "some"}, {"masked_share_per_source": [1]}, {"round": "first"}], ids=str)
def test_the_report_of_a_selection_that_holds_something_else(copied: Path, damage: dict[str, Any]) -> None:
    file = copied / "selection" / "selection.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    (key,) = damage
    with pytest.raises(StoreError, match=rf"selection\.json: {key}: not what a run writes: run the step that wrote it"):
        read_run(copied)


def test_an_evaluation_of_another_version(copied: Path) -> None:
    (judged(copied, "") / "evaluation" / "evaluation.json").write_text('{"names": {}}')
    run = read_run(copied)
    assert run.evaluation is None
    assert list(run.warnings) == ["The evaluation here is not of this version, and is left out: run toss test again."]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("scores/scores.json", r"{run}/scores/scores.json: damaged \(.*\): delete {run}/scores and score again"),
        ("selection/selection.json", r"{run}/selection: no selection to be had \(selection.json: .*\): run the select"),
        ("selection/weights.arrow", r"{run}/selection: no selection to be had \(weights.arrow: .*\): run the select"),
    ],
)
def test_scores_and_selections_that_are_damaged(copied: Path, file: str, message: str) -> None:
    (copied / file).write_text("{")
    with pytest.raises(StoreError, match=f"^{message.format(run=copied)}"):
        read_run(copied)


def test_a_selection_of_other_rows(whole: Path, copied: Path) -> None:
    weights = TokenWeights.load(whole / "selection")
    weights.hashes[3] = "of another row"
    weights.save(copied / "selection")
    with pytest.raises(StoreError, match=r"selection: row 3 has other tokens than the row that was selected from"):
        read_run(copied)


def test_scores_of_other_rows_that_were_named(whole: Path, copied: Path) -> None:
    weights = TokenWeights.load(whole / "selection")
    weights.hashes[3] = "of another row"
    weights.save(copied / "selection")
    with pytest.raises(ConfigError, match=rf"--scores {whole / 'scores'}: not what .*selection was selected from"):
        read_run(copied, whole / "scores")


def test_a_selection_of_fewer_tokens(whole: Path, copied: Path) -> None:
    weights = TokenWeights.load(whole / "selection")
    weights.weights[2] = np.ones(1, dtype=np.float32)
    weights.save(copied / "selection")
    with pytest.raises(StoreError, match=r"selection: row 2: 1 values of weight for \d+ response tokens"):
        read_run(copied)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_another_one_would_show_other_texts(whole: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", WORDS[::-1])
    with pytest.raises(ConfigError, match=f"--tokenizer: that of {other} is another one than the rows of {whole}"):
        read_run(whole).tokenizer(other)


def test_nothing_says_which_tokenizer_it_was(copied: Path, model: str) -> None:
    (copied / "summary.json").unlink()
    run = read_run(copied)
    with pytest.raises(ConfigError, match=r"nothing here says which base .*: name it with --tokenizer"):
        run.tokenizer()
    assert run.tokenizer(model).get_vocab()


def test_a_base_that_is_gone(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--tokenizer: .*gone/model: no such directory"):
        read_run(copied).tokenizer(str(tmp_path / "gone/model"))
    facts = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(facts | {"base": str(tmp_path / "gone/model")}))
    with pytest.raises(ModelError, match=r"^model\.base\.path: .*gone/model: no such directory"):
        read_run(copied).tokenizer()
