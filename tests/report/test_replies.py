"""Replies side by side: which prompts are shown, and what is said of each reply."""

from typing import Any

from toss_lightning.report.replies import choose_exchanges

FOUND = {"names": {"base": "base model", "target": "TOSS"}, "measures": [{"judge": "Words", "screening": True}]}
"""What evaluation.json says."""


def line(adapter: str, prompt_id: str, verdict: dict[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
    """A line of responses.jsonl."""
    known = {"refused": None, "harmful": None, "score": None, "raw": ""}
    return {
        "adapter": adapter,
        "set": "asked",
        "prompt_id": prompt_id,
        "label": "harmful",
        "messages": [{"role": "user", "content": f"ask {prompt_id}"}],
        "response": f"{adapter} says",
        "stopped": True,
        "verdicts": {} if verdict is None else {"Judge": known | verdict},
        **facts,
    }


def test_the_replies_of_all_adapters_stand_beside_each_other() -> None:
    lines = [line(adapter, prompt) for adapter in ("base", "target") for prompt in ("p0", "p1")]
    (exchanges,) = choose_exchanges(lines, FOUND, 5).values()
    assert [(one.prompt_id, one.label, one.prompt) for one in exchanges] == [
        ("p0", "harmful", "ask p0"),
        ("p1", "harmful", "ask p1"),
    ]
    assert [(one.adapter, one.text) for one in exchanges[0].replies] == [
        ("base model", "base says"),
        ("TOSS", "target says"),
    ]


def test_prompts_in_which_a_judge_tells_adapters_apart_come_first() -> None:
    said = {"p0": (False, False), "p1": (False, True), "p2": (True, True), "p3": (True, None)}
    lines = [
        line(adapter, prompt, {"harmful": verdicts[at]})
        for at, adapter in enumerate(("base", "target"))
        for prompt, verdicts in said.items()
    ]
    (exchanges,) = choose_exchanges(lines, FOUND, 3).values()
    assert [one.prompt_id for one in exchanges] == ["p1", "p3", "p0"]


def test_each_set_has_as_many_as_are_asked_for() -> None:
    lines = [line("base", f"p{at}", set=name) for name in ("asked", "sums") for at in range(5)]
    chosen = choose_exchanges(lines, FOUND, 2)
    assert {name: [one.prompt_id for one in exchanges] for name, exchanges in chosen.items()} == {
        "asked": ["p0", "p1"],
        "sums": ["p0", "p1"],
    }
    assert choose_exchanges([], FOUND, 2) == {}


def test_a_verdict_in_words() -> None:
    verdicts = [
        ({"refused": True, "harmful": False}, "refused, harmless"),
        ({"refused": False, "harmful": True, "score": 0.256}, "not refused, harmful, 0.26"),
        ({"score": 0.0}, "0.00"),
        ({}, "undecided"),
    ]
    for verdict, words in verdicts:
        ((exchange,),) = choose_exchanges([line("base", "p0", verdict)], FOUND, 1).values()
        assert exchange.replies[0].verdicts == {"Judge": words}


def test_a_screening_judge_is_called_one() -> None:
    known = {"refused": True, "harmful": None, "score": None}
    verdicts = {"Words": known, "Strict": known}
    ((exchange,),) = choose_exchanges([line("base", "p0", verdicts=verdicts)], FOUND, 1).values()
    assert exchange.replies[0].verdicts == {"Words (screening)": "refused", "Strict": "refused"}


def test_scores_alone_make_no_prompt_contested() -> None:
    lines = [
        line(adapter, prompt, {"harmful": at == 1 and prompt == "p1", "score": 0.1 * at})
        for at, adapter in enumerate(("base", "target"))
        for prompt in ("p0", "p1")
    ]
    (exchanges,) = choose_exchanges(lines, FOUND, 2).values()
    assert [(one.prompt_id, one.is_contested) for one in exchanges] == [("p1", True), ("p0", False)]


def test_signs_that_are_not_seen_are_shown() -> None:
    ((exchange,),) = choose_exchanges([line("base", "p0", response="a\u202eb\tc\x1b")], FOUND, 1).values()
    assert exchange.replies[0].text == "a[U+202E]b⇥\tc␛"


def test_a_reply_that_was_cut_is_told_from_one_that_ended() -> None:
    lines = [line("base", "p0", stopped=False), line("other", "p0")]
    ((exchange,),) = choose_exchanges(lines, FOUND, 1).values()
    assert [(one.adapter, one.cut) for one in exchange.replies] == [("base model", True), ("other", False)]


def test_a_prompt_of_several_turns_says_whose_each_is() -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    ((exchange,),) = choose_exchanges([line("base", "p0", messages=turns, label=None)], FOUND, 1).values()
    assert exchange.prompt == "system: be kind⏎\nuser: hello"
    assert exchange.label is None
