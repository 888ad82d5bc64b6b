"""The page of a run: what is there of it and what is not, and that it needs, and does, nothing else."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from probed import HARMFUL, SAFE
from reported import LABELS, NASTY, Page, said, save_reported_model, write_labelled
from runs import tiny_fit

from toss_lightning.evaluation import Evaluation, KeywordJudge, SafetyProbe
from toss_lightning.models.generation import Sampling
from toss_lightning.report.finished import FinishedRun, read_run
from toss_lightning.report.page import render
from toss_lightning.scores import TokenScores
from toss_lightning.selection import DrSft, RandomRows
from toss_lightning.selection.base import token_weights

pytestmark = pytest.mark.usefixtures("tiny_openers")
CHAPTERS = [
    "Held-out losses",
    "While it trained",
    "Evaluation",
    "Scores",
    "What is masked",
    "Replies side by side",
    "Token by token",
    "Rounds of TOSS-Pro",
    "Data",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    save_reported_model(folder / "model")
    write_labelled(folder)
    return folder


def fitted(home: Path, name: str, loop: dict[str, Any], plan: list[str] | None = None) -> Path:
    sets = {one: str(home / f"{one}.jsonl") for one in ("custom", "utility", "harmful")}
    plan = plan or ["utility", "degraded", "score", "select", "target"]
    tiny_fit(str(home / "model"), sets, home / name, plan=plan, loop={"epochs": 1, **loop})
    return home / name


@pytest.fixture(scope="module")
def toss_pro(home: Path, tiny_openers: tuple[str, ...]) -> Path:
    """TOSS-Pro with all that a run may do, on prompts that a page may take for its own."""
    pairs, asked = home / "pairs.jsonl", home / "asked.jsonl"
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": HARMFUL}]
    pairs.write_text(json.dumps({"messages": turns, "safe_reply": SAFE}) + "\n")
    prompts = [
        {"id": f"p{at}", "prompt": f"w{at} {NASTY}", "label": label}
        for at, label in enumerate(["harmful", "benign"] * 2)
    ]
    asked.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    evaluation = Evaluation(
        prompts={"asked": str(asked)},
        pairs=str(pairs),
        sampling=Sampling(max_new_tokens=4),
        batch_size=4,
        judges=[KeywordJudge()],
    )
    probe = SafetyProbe(str(pairs), every=3)
    loop = {"rounds": 1, "promote": 3, "evaluation": evaluation, "safety_probe": probe}
    return fitted(home, "toss_pro", loop, ["utility", "degraded", "score", "select", "sft", "target", "test"])


@pytest.fixture(scope="module")
def scored(home: Path) -> Path:
    return fitted(home, "scored", {}, ["utility", "degraded", "score"])


@pytest.fixture(scope="module")
def random_rows(home: Path) -> Path:
    return fitted(home, "random", {"selection": RandomRows(0.4)}, ["score", "select", "target"])


@pytest.fixture(scope="module")
def plain(home: Path) -> Path:
    return fitted(home, "plain", {}, ["target"])


def page_of(run: FinishedRun, count: int = 6) -> Page:
    return Page(render(run, run.tokenizer() if run.scores is not None else None, count))


def shown(run_dir: Path, count: int = 6) -> Page:
    return page_of(read_run(run_dir), count)


def scores_of(run: FinishedRun) -> TokenScores:
    assert run.scores is not None
    return run.scores


# --- chapters -------------------------------------------------------------------------------------------------------


def test_a_run_that_did_everything_has_all_chapters(toss_pro: Path) -> None:
    page = shown(toss_pro)
    assert page.texts("h2") == CHAPTERS
    assert page.texts("h1") == [f"TOSS-Pro: {toss_pro}"]
    (rounds,) = [table for table in page.all("table") if "rows promoted" in said(table)]
    assert [said(line)[0] for line in page.all("tr", rounds)[1:]] == ["0", "1"]
    assert "3 (" in said(rounds), "as many as were to be promoted, and their labels"


def test_a_directory_of_toss_select_alone_says_what_would_show_its_rows(toss_pro: Path, tmp_path: Path) -> None:
    (tmp_path / "selection").symlink_to(toss_pro / "selection")
    page = shown(tmp_path)
    assert page.texts("h2") == ["What is masked"]
    assert "No row is shown: give the scores that were selected from with --scores." in page.texts("p")


@pytest.mark.parametrize(
    ("name", "chapters"),
    [
        ("scored", ["Held-out losses", "Scores", "Token by token", "Data"]),
        ("random_rows", ["Held-out losses", "What is masked", "Token by token", "Data"]),
        ("plain", ["Held-out losses", "Data"]),
    ],
)
def test_what_a_run_did_not_do_has_no_chapter(request: pytest.FixtureRequest, name: str, chapters: list[str]) -> None:
    assert shown(request.getfixturevalue(name)).texts("h2") == chapters


def test_a_run_that_only_scored_says_that_nothing_was_selected(scored: Path) -> None:
    page = shown(scored)
    assert page.texts("h1") == [f"Scores: {scored}"]
    assert "There is no mask to show." in said(page.root)
    assert not page.all("del")
    assert re.fullmatch(
        r"response token 1, utility loss [\d.]+, degraded loss [\d.]+, score [+−][\d.]+",
        next(one.attrib["title"] for one in page.tokens()),
    )


def test_a_selection_of_rows_that_read_no_losses(random_rows: Path) -> None:
    page = shown(random_rows, 20)
    run = read_run(random_rows)
    assert run.weights is not None
    assert page.texts("h3") == [
        "Labelled harmful, and masked least",
        "Labelled otherwise, and masked most",
        "Drawn at random",
    ]
    assert "Coloured by score" not in said(page.root)
    left_out = {row_id for row_id, row in page.rows().items() if "left out of the batches" in said(row)}
    assert left_out == run.weights.left_out
    assert 0 < len(left_out) < len(LABELS)


def test_a_directory_of_toss_select_has_its_rows(toss_pro: Path, tmp_path: Path) -> None:
    (tmp_path / "selection").symlink_to(toss_pro / "selection")
    page = page_of(read_run(tmp_path, toss_pro / "scores"))
    assert page.texts("h2") == ["Scores", "What is masked", "Token by token"]
    assert f"Scores of {toss_pro / 'scores'}" in page.texts("p")


def test_weights_that_depend_on_training_are_said_to(home: Path) -> None:
    run_dir = fitted(home, "dr_sft", {"selection": DrSft()}, ["degraded", "score", "select", "target"])
    page = shown(run_dir)
    assert "token loss of the base model minus that of the degraded reference" in said(page.root)
    assert any("which are weighed anew in each step." in paragraph for paragraph in page.texts("p"))


def test_what_a_run_warned_of_stands_at_the_top(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    summary = dataclasses.replace(
        run.summary,
        weak={"degraded": "it learned <nothing>"},
        stopped={"target": "ended early"},
        idle=["SPF changed no step's gradient"],
    )
    page = page_of(dataclasses.replace(run, summary=summary))
    warnings = [said(one) for one in page.all("p") if one.get("class") == "warning"]
    assert warnings == ["it learned <nothing>", "ended early", "SPF changed no step's gradient"]


def test_a_judge_that_failed_is_warned_of(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    assert run.evaluation is not None
    failed = {**run.evaluation, "failed_judges": {"Strict": "<html>no key</html>"}}
    assert "Strict has not judged: <html>no key</html>" in page_of(dataclasses.replace(run, evaluation=failed)).texts(
        "p"
    )


def test_a_selection_that_no_target_was_trained_with_is_said_to_be_such(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    stages = {name: stage for name, stage in run.summary.stages.items() if name != "target"}
    page = page_of(dataclasses.replace(run, summary=dataclasses.replace(run.summary, stages=stages)))
    assert "No target was trained here with the selection that is shown." in page.texts("p")


def test_the_page_says_what_the_run_was(toss_pro: Path, home: Path) -> None:
    subtitle = shown(toss_pro).texts("p")[0]
    facts = json.loads((toss_pro / "summary.json").read_text())
    for fact in (str(home / "model"), "seed 1", f"{facts['optimizer_steps']} optimizer steps", facts["finished"]):
        assert fact in subtitle


def test_a_summary_of_an_older_version_need_not_say_everything(plain: Path) -> None:
    run = read_run(plain)
    facts = {name: value for name, value in run.facts.items() if name not in ("device", "precision")}
    assert "seed 1" in page_of(dataclasses.replace(run, facts=facts)).texts("p")[0]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_shown_below_their_headings(toss_pro: Path) -> None:
    few, every = shown(toss_pro, 1), shown(toss_pro, 50)
    headings = [
        "asked",
        "Riskiest, by the mean score of their tokens",
        "Labelled harmful, and masked least",
        "Labelled otherwise, and masked most",
        "Drawn at random",
    ]
    assert every.texts("h3") == headings
    assert every.rows().keys() == {*range(len(LABELS))}
    assert 1 <= len(few.rows()) <= 4


def test_a_row_says_its_tokens_and_each_its_numbers(toss_pro: Path) -> None:
    run, page = read_run(toss_pro), shown(toss_pro, 50)
    scores = scores_of(run)
    losses = {name: scores.per_row(scores.flat(f"loss_{name}")) for name in ("utility", "degraded-1")}
    for at, row_id in enumerate(scores.row_ids.tolist()):
        tokens = page.tokens(page.rows()[row_id])
        assert len(tokens) == np.diff(scores.offsets)[at]
        for place, token in enumerate(tokens):
            title = token.attrib["title"]
            assert title.startswith(f"response token {place + 1}, utility loss {losses['utility'][at][place]:.2f},")
            assert f"degraded-1 loss {losses['degraded-1'][at][place]:.2f}" in title
    assert said(page.rows()[0]).count("<|im_end|>") == 2, "the template is there too"


def test_masked_tokens_are_marked(toss_pro: Path) -> None:
    run, page = read_run(toss_pro), shown(toss_pro, 50)
    assert run.weights is not None
    marked = 0
    for row_id, weights in run.weights.weights.items():
        tokens = page.tokens(page.rows()[row_id])
        assert [token.tag == "del" for token in tokens] == (weights == 0).tolist()
        assert [token.attrib["title"].endswith(", masked") for token in tokens] == (weights == 0).tolist()
        marked += sum(token.tag == "del" for token in tokens)
    assert marked > 0


def test_tokens_of_another_weight_say_it(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    scores = scores_of(run)
    weights = np.ones(scores.offsets[-1], dtype=np.float32)
    weights[:3] = 0.25, 2, 0
    page = page_of(dataclasses.replace(run, weights=token_weights(scores, weights)), 50)
    titles = [one.attrib["title"] for one in page.tokens(page.rows()[0])]
    assert [title.rpartition(", ")[2] for title in titles[:3]] == ["weight 0.25", "weight 2", "masked"]
    assert "weight" not in titles[3]


def test_tokens_that_are_held_to_the_base_are_marked(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    scores = scores_of(run)
    weights, anchor = np.ones(scores.offsets[-1], dtype=np.float32), np.zeros(scores.offsets[-1], dtype=np.float32)
    weights[0], anchor[:2] = 0, 0.5
    page = page_of(dataclasses.replace(run, weights=token_weights(scores, weights, anchor)), 50)
    first, second, third = page.tokens(page.rows()[0])[:3]
    assert first.attrib["title"].endswith(", masked, held to the base with weight 0.5")
    assert second.attrib["title"].endswith(", held to the base with weight 0.5")
    assert [(one.tag, "anchored" in one.attrib["class"]) for one in (first, second, third)] == [
        ("del", True),
        ("b", True),
        ("b", False),
    ]
    for sign in ("A dotted line below a token: it is held to", "A double line below a token: it is left out"):
        assert sign in said(page.root)
    assert "A solid line below a token" not in said(page.root), "there is none"


def test_the_riskier_a_token_the_warmer_its_colour(toss_pro: Path) -> None:
    page, order = shown(toss_pro, 50), ["c4", "c3", "c2", "c1", "", "w1", "w2", "w3", "w4"]
    found = []
    for token in page.tokens():
        score = float(token.attrib["title"].partition("score ")[2].partition(",")[0].replace("−", "-"))
        found.append((score, order.index(token.attrib["class"])))
    shades = [shade for _, shade in sorted(found)]
    assert shades == sorted(shades)
    assert {shades[0], shades[-1]} & {0, 8}, "the furthest from 0 has all of its colour"
    assert all(f".{name} {{ background: #" in page.texts("style")[0] for name in order if name)


def test_what_is_not_labelled_benign_is_veiled(toss_pro: Path) -> None:
    page = shown(toss_pro, 50)
    for row_id, label in enumerate(LABELS):
        row = page.rows()[row_id]
        assert ("veiled" in row.attrib["class"].split()) == (label != "benign")
        assert (label or "no label") in said(row)
    assert "#show:not(:checked) ~ section .veiled pre { visibility: hidden; }" in page.texts("style")[0]
    assert page.texts("label") == ["Show what is hidden below: texts that are not labelled benign"]


# --- replies ----------------------------------------------------------------------------------------------------------


def test_replies_to_prompts_stand_side_by_side(toss_pro: Path) -> None:
    responses = [json.loads(one) for one in (toss_pro / "evaluation/responses.jsonl").read_text().splitlines()]
    page = shown(toss_pro)
    assert [*page.exchanges()] == ["p0", "p1", "p2", "p3"]
    for prompt_id, article in page.exchanges().items():
        label = said(page.all("span", article)[0])
        assert ("veiled" in article.attrib["class"].split()) == (label != "benign")
        prompt, *replies = [said(one) for one in page.all("pre", article)]
        here = [one for one in responses if one["prompt_id"] == prompt_id]
        assert prompt == here[0]["messages"][0]["content"]
        assert NASTY in prompt
        assert [reply.removesuffix(" …") for reply in replies] == [one["response"] for one in here]
        assert "KeywordJudge (screening): " in said(article)


def test_as_many_prompts_of_each_set_are_shown_as_rows(toss_pro: Path) -> None:
    assert len(shown(toss_pro, 2).exchanges()) == 2


# --- a page that holds what others wrote ------------------------------------------------------------------------------


def test_texts_of_rows_and_prompts_stay_texts(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    text = render(run, run.tokenizer(), 50)
    assert "<script" not in text
    assert "</script" not in text
    page = Page(text)
    assert NASTY in said(page.rows()[0])
    assert "made <here>" in said(page.rows()[0])
    for element in page.tokens():
        assert element.attrib.keys() == {"class", "title"}


def test_names_of_directories_and_bases_stay_texts(toss_pro: Path) -> None:
    run = read_run(toss_pro)
    page = page_of(dataclasses.replace(run, directory=Path("<b>mine</b>"), facts={**run.facts, "base": NASTY}))
    assert page.texts("h1") == ["TOSS-Pro: <b>mine</b>"]
    assert NASTY in page.texts("p")[0]


@pytest.mark.parametrize("name", ["toss_pro", "scored", "random_rows", "plain"])
def test_a_page_needs_neither_scripts_nor_a_network(request: pytest.FixtureRequest, name: str) -> None:
    run = read_run(request.getfixturevalue(name))
    text = render(run, run.tokenizer() if run.scores is not None else None, 50)
    page = Page(text)
    assert not {one.tag for one in page.root.iter()} & {"script", "link", "img", "iframe", "object", "embed", "a"}
    for element in page.root.iter():
        assert not {name for name in element.attrib if name in ("src", "href", "style") or name.startswith("on")}
    assert "url(" not in text
    assert "@import" not in text
    assert {*re.findall(r"https?://[^\s\"'<]+", text)} <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", ["toss_pro", "scored", "random_rows", "plain"])
def test_every_picture_of_a_page_parses(request: pytest.FixtureRequest, name: str) -> None:
    run = read_run(request.getfixturevalue(name))
    text = render(run, run.tokenizer() if run.scores is not None else None)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == {"toss_pro": 6, "scored": 3, "random_rows": 1, "plain": 0}[name]
    for picture in pictures:
        assert not [one for one in ElementTree.fromstring(picture).iter() if "nan" in "".join(one.attrib.values())]


def test_ids_stand_once(toss_pro: Path) -> None:
    ids = [one.attrib["id"] for one in shown(toss_pro, 50).root.iter() if "id" in one.attrib]
    assert len(ids) == len({*ids})
