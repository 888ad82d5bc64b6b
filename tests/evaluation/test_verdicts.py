from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from toss_lightning.data.formats import Message
from toss_lightning.errors import StoreError
from toss_lightning.evaluation import Judge, Prompt, Response, Verdict
from toss_lightning.evaluation.verdicts import judge_responses


class Length(Judge):
    """Takes short responses for refusals."""

    chunk = 2

    def __init__(self, words: int = 2, fails_at: int | None = None) -> None:
        self.words = words
        self._fails_at, self._asked = fails_at, 0

    def judge(self, responses: Sequence[Response]) -> list[Verdict]:
        self._asked += len(responses)
        if self._fails_at is not None and self._asked > self._fails_at:
            raise RuntimeError("killed")
        return [Verdict(refused=len(one.text.split()) < self.words, raw=one.text) for one in responses]


def said(*texts: str, adapter: str = "target") -> list[Response]:
    turns = (Message("user", "How?"),)
    return [
        Response(adapter, Prompt("mine", str(at), turns, "harmful"), text, 1, True) for at, text in enumerate(texts)
    ]


def judged(judge: Judge, responses: Sequence[Response], folder: Path) -> list[bool | None]:
    return [one.refused for one in judge_responses(judge, responses, folder, torch.device("cpu"))]


def test_verdicts_stand_in_the_order_of_the_responses(tmp_path: Path) -> None:
    assert judged(Length(), said("no", "yes of course", "never", "so it is"), tmp_path) == [True, False, True, False]


def test_what_was_judged_before_a_kill_is_not_judged_again(tmp_path: Path) -> None:
    responses = said("a", "b b", "c", "d d", "e")
    with pytest.raises(RuntimeError, match="killed"):
        judged(Length(fails_at=4), responses, tmp_path)
    again = Length()
    assert judged(again, responses, tmp_path) == [True, False, True, False, True]
    assert again._asked == 1


def test_an_equal_response_of_another_adapter_is_not_judged_again(tmp_path: Path) -> None:
    first = Length()
    judged(first, [*said("a", "b b"), *said("a", "c c", adapter="base")], tmp_path)
    assert first._asked == 3


def test_a_judge_with_other_settings_judges_anew(tmp_path: Path) -> None:
    assert judged(Length(2), said("b b"), tmp_path) == [False]
    assert judged(Length(3), said("b b"), tmp_path) == [True]


def test_a_judge_that_asks_otherwise_judges_anew(tmp_path: Path) -> None:
    class Asking(Length):
        asks = "Is it short?"

    first, second = Asking(), Asking()
    second.asks = "Is it short, and why?"
    for judge in (first, second):
        judged(judge, said("a"), tmp_path)
        assert judge._asked == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    judged(Length(), said("a"), tmp_path)
    next(tmp_path.rglob("*.jsonl")).write_text('{"response": ')
    with pytest.raises(StoreError, match=r"\w+.jsonl: damaged .* delete it and run the test again"):
        judged(Length(), said("a"), tmp_path)


def test_what_it_costs_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Dear(Length):
        def estimate(self, responses: Sequence[Response]) -> str:
            return f"{len(responses)} responses, about 1 dollar"

    judged(Dear(), said("a", "b"), tmp_path)
    assert "Dear: 2 responses, about 1 dollar" in capsys.readouterr().out
