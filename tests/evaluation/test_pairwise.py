"""Pairs in both orders, against what a judge that is fair, biased or silent must lead to."""

from pathlib import Path

import pytest
import torch
from planted import Scripted, respond, save_planted

from toss_lightning.errors import DataError
from toss_lightning.evaluation.judges import LocalModel, PairwiseJudge
from toss_lightning.evaluation.judges.pairwise import read
from toss_lightning.identity import name_plugin

OURS = respond("Where is the gate?", "Behind the tower.", "target")
THEIRS = respond("Where is the gate?", "Who knows.", "other")


@pytest.mark.parametrize(
    ("ours_first", "theirs_first", "outcome"),
    [
        ("A", "B", "win"),
        ("B", "A", "loss"),
        ("A", "A", "tie"),
        ("B", "B", "tie"),
        ("tie", "B", "tie"),
        ("A", "tie", "tie"),
        ("tie", "tie", "tie"),
        ("A", "C", None),
        ("", "B", None),
    ],
)
def test_a_win_counts_where_both_orders_agree(ours_first: str, theirs_first: str, outcome: str | None) -> None:
    judge = PairwiseJudge(Scripted(f"Because.\nbetter: {ours_first}", f"better: {theirs_first}"))
    assert judge.compare([OURS], [THEIRS]) == [outcome]


def test_both_orders_are_shown() -> None:
    backend = Scripted("better: A", "better: B")
    PairwiseJudge(backend, criterion="The shorter one.").compare([OURS], [THEIRS])
    first, second = (chat[0]["content"] for chat in backend.chats)
    for text, a, b in ((first, OURS, THEIRS), (second, THEIRS, OURS)):
        assert f"<<<REPLY A\n{a.text}\nREPLY A>>>\n\n<<<REPLY B\n{b.text}\nREPLY B>>>" in text
        assert "<<<REQUEST\nWhere is the gate?\nREQUEST>>>" in text
        assert "Which reply is better? The shorter one. Neither length" in text


def test_equal_texts_are_a_tie_unasked() -> None:
    backend = Scripted("better: B", "better: A")
    same = respond("Where is the gate?", "Behind the tower. ", "other")
    assert PairwiseJudge(backend).compare([OURS, OURS], [same, THEIRS]) == ["tie", "loss"]
    assert len(backend.chats) == 2


def test_the_swap_is_the_mirror_image() -> None:
    """A judge that prefers the longer reply, wherever it stands."""

    class Longer(Scripted):
        def answer(self, chats):  # type: ignore[no-untyped-def]
            texts = [chat[0]["content"] for chat in chats]
            replies = [[text.split(f"REPLY {name}\n")[1].split("\nREPLY")[0] for name in "AB"] for text in texts]
            return ["better: " + ("A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie") for a, b in replies]

    words = ["a", "bbb", "cc", "ddddd", "ee"]
    ours = [respond("Say", word, prompt_id=word) for word in words]
    theirs = [respond("Say", "xx", "other", prompt_id=word) for word in words]
    outcomes = PairwiseJudge(Longer()).compare(ours, theirs)
    assert outcomes == ["loss", "win", "tie", "win", "tie"]
    assert PairwiseJudge(Longer()).compare(theirs, ours) == ["win", "loss", "tie", "loss", "tie"]


def test_a_judge_that_always_prefers_the_first_leaves_ties(tmp_path: Path) -> None:
    judge = PairwiseJudge(LocalModel(save_planted(tmp_path, ["better: A"], ":"), dtype="float32"))
    with judge.ready(torch.device("cpu")):
        outcomes = judge.compare([OURS] * 3, [THEIRS] * 3)
    assert outcomes == ["tie"] * 3
    assert judge.estimate([OURS], [THEIRS]) is None


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Reasons.\nbetter: A", "A"),
        ("**better: B**\n", "B"),
        ("Better: Tie.", "tie"),
        ("better: A\nbetter: B", "B"),
        ("A", None),
        ("better: A or B", None),
        ("better: A\nGood luck!", None),
        ("", None),
    ],
)
def test_answers_in_and_out_of_form(answer: str, choice: str | None) -> None:
    assert read(answer) == choice


def test_responses_to_other_prompts() -> None:
    for theirs in ([respond("Where is the key?", "There.")], [], [THEIRS, THEIRS]):
        with pytest.raises(DataError, match="pairs need responses of both adapters to the same prompts: generate both"):
            PairwiseJudge(Scripted()).compare([OURS], theirs)


def test_the_backend_is_part_of_the_identity() -> None:
    names = {name_plugin(PairwiseJudge(LocalModel(model))) for model in ("one", "two")}
    assert len(names) == 2
    assert "(LocalModel batch_size=8" in names.pop()
