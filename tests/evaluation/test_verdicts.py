import importlib.util
import linecache
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from toss_lightning.data.formats import Message
from toss_lightning.errors import ModelError, StoreError
from toss_lightning.evaluation import Judge, Prompt, Response, Verdict
from toss_lightning.evaluation.verdicts import judge_responses, remember_code


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


class Listed(Judge):
    """Takes for refusals what stands in a file."""

    def __init__(self, phrases: str) -> None:
        self.phrases = phrases

    def judge(self, responses: Sequence[Response]) -> list[Verdict]:
        known = Path(self.phrases).read_text(encoding="utf-8").split()
        return [Verdict(refused=one.text in known) for one in responses]


def test_a_file_that_a_setting_names_is_part_of_the_judge(tmp_path: Path) -> None:
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("no never", encoding="utf-8")
    assert judged(Listed(str(phrases)), said("no", "never"), tmp_path / "kept") == [True, True]
    phrases.write_text("no", encoding="utf-8")
    assert judged(Listed(str(phrases)), said("no", "never"), tmp_path / "kept") == [True, False]


def test_an_equal_response_of_another_adapter_is_not_judged_again(tmp_path: Path) -> None:
    first = Length()
    judged(first, [*said("a", "b b"), *said("a", "c c", adapter="base")], tmp_path)
    assert first._asked == 3


def test_a_judge_with_other_settings_judges_anew(tmp_path: Path) -> None:
    assert judged(Length(2), said("b b"), tmp_path) == [False]
    assert judged(Length(3), said("b b"), tmp_path) == [True]


def test_settings_of_any_type_tell_judges_apart(tmp_path: Path) -> None:
    class Phrases(Length):
        def __init__(self, phrases: set[str]) -> None:
            super().__init__()
            self.phrases = phrases

        def judge(self, responses: Sequence[Response]) -> list[Verdict]:
            return [Verdict(refused=one.text in self.phrases) for one in responses]

    assert judged(Phrases({"no", "never"}), said("no"), tmp_path) == [True]
    assert judged(Phrases({"never"}), said("no"), tmp_path) == [False]


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


OWN = """
from toss_lightning.evaluation import Judge, Verdict
WORDS = {words}
class Short(Judge):
    def judge(self, responses):
        return [Verdict(refused=len(one.text.split()) < WORDS) for one in responses]
"""


def own_judge(folder: Path, name: str, words: int) -> Judge:
    """A judge of a user's own file."""
    (folder / f"{name}.py").write_text(OWN.format(words=words))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    linecache.clearcache()
    spec.loader.exec_module(module)
    judge: Judge = module.Short()
    return judge


def test_a_judge_of_ones_own_judges_anew_when_its_code_changes(tmp_path: Path) -> None:
    responses = said("one two three")
    assert judged(own_judge(tmp_path, "mine", 2), responses, tmp_path / "kept") == [False]
    assert judged(own_judge(tmp_path, "mine", 5), responses, tmp_path / "kept") == [True]
    assert judged(own_judge(tmp_path, "mine", 2), responses, tmp_path / "kept") == [False]
    assert judged(own_judge(tmp_path, "theirs", 2), responses, tmp_path / "kept") == [False]
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_a_judge_whose_file_is_edited_later_judges_as_the_code_that_runs(tmp_path: Path) -> None:
    responses = said("one two three")
    judge = own_judge(tmp_path, "mine", 2)
    remember_code(judge)
    (tmp_path / "mine.py").write_text(OWN.format(words=5))
    assert judged(judge, responses, tmp_path / "kept") == [False]
    assert judged(own_judge(tmp_path, "mine", 5), responses, tmp_path / "kept") == [True]


def test_a_model_that_is_trained_further_in_its_directory_judges_anew(tmp_path: Path) -> None:
    class Local(Length):
        def __init__(self, model: str) -> None:
            super().__init__()
            self.model = model

    weights = tmp_path / "guard" / "model.safetensors"
    weights.parent.mkdir()
    for content in ("1", "22"):
        weights.write_text(content)
        judge = Local(str(weights.parent))
        judged(judge, said("a"), tmp_path / "kept")
        assert judge._asked == 1


def test_what_a_judge_knows_of_the_prompt_tells_responses_apart(tmp_path: Path) -> None:
    class Labelled(Length):
        def judge(self, responses: Sequence[Response]) -> list[Verdict]:
            return [Verdict(refused=one.prompt.label == "harmful") for one in responses]

    (harmful,) = said("a")
    benign = replace(harmful, prompt=replace(harmful.prompt, label="benign"))
    assert judged(Labelled(), [harmful, benign], tmp_path) == [True, False]


def test_whatever_else_a_judge_sees_tells_responses_apart_too() -> None:
    (one,) = said("a")
    others = [replace(one, tokens=one.tokens + 1), replace(one, stopped=not one.stopped)]
    others += [replace(one, prompt=replace(one.prompt, **{name: "other"})) for name in ("set", "prompt_id", "context")]
    assert len({of.digest for of in (one, replace(one, adapter="other"), *others)}) == 1 + len(others)


def test_a_judge_may_say_no_as_numpy_does_but_must_say_it_of_each(tmp_path: Path) -> None:
    class Counting(Length):
        def judge(self, responses: Sequence[Response]) -> list[Verdict]:
            some = responses[:1] if self.words == 0 else responses
            return [Verdict(refused=np.bool_(False), score=np.float32(0.5)) for _ in some]  # type: ignore[arg-type]

    assert judged(Counting(), said("a", "b"), tmp_path) == [False, False]
    with pytest.raises(ModelError, match="Counting: its method judge gave 1 values for 2 responses: return a list"):
        judged(Counting(0), said("a", "b"), tmp_path)
