import json
from pathlib import Path
from typing import Any

import pytest

from toss_lightning.data.formats import Message, to_conversation
from toss_lightning.data.sources import Source
from toss_lightning.errors import ConfigError, DataError
from toss_lightning.evaluation.prompts import PromptSet, load_pairs, load_prompts


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("How?")},
        {"messages": turns("How?", "So.")},
        {"conversations": [{"from": "human", "value": "How?"}]},
        *({name: "How?"} for name in ("prompt", "question", "instruction", "goal", "behavior", "query")),
    ],
)
def test_a_prompt_is_read_from_what_sets_call_it(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "p.jsonl", {**row, "label": "harmful", "id": "a-1", "category": "odd"})
    (prompt,) = load_prompts("mine", PromptSet(path))
    assert (prompt.set, prompt.prompt_id, prompt.text, prompt.label) == ("mine", "a-1", "How?", "harmful")
    assert prompt.messages == (Message("user", "How?"),)
    assert prompt.category == "odd"


def test_what_a_prompt_is_about_stands_before_it(tmp_path: Path) -> None:
    rows = {"behavior": "Add to this list", "context": "1. Beans"}, {"behavior": "How?", "context": None}
    path = write(tmp_path / "p.jsonl", *rows)
    found = load_prompts("mine", PromptSet(path, label="harmful"))
    assert [one.text for one in found] == ["1. Beans\n\n---\n\nAdd to this list", "How?"]


@pytest.mark.parametrize("utility", ["answer", "rouge_l", None])
def test_what_a_table_holds_nothing_in_is_not_there(tmp_path: Path, utility: Any) -> None:
    """Pandas writes NaN there, and Python's json reads it."""
    whole = {"instruction": "Sum up", "target": "7", "output": "It is 7.", "label": "benign"}
    nothing = ("input", "answer", "system", "messages", "chosen", "prompt", "response", "category", "id", "context")
    path = write(tmp_path / "p.jsonl", {**dict.fromkeys(nothing, float("nan")), **whole})
    assert "NaN" in Path(path).read_text()
    assert load_prompts("mine", PromptSet(path, utility=utility)) == load_prompts(
        "mine", PromptSet(write(tmp_path / "q.jsonl", whole), utility=utility)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"utility": "answer"}, "utility answer compares with a column answer, and the row has none"),
        ({}, "label None does not say"),
    ],
)
def test_what_is_wanted_of_a_reply_is_missed_where_a_table_holds_nothing(
    tmp_path: Path, options: Any, message: str
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1 + 1?", "answer": float("nan"), "label": float("nan")})
    with pytest.raises(DataError, match=f"p.jsonl:1: {message}"):
        load_prompts("mine", PromptSet(path, **options))


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "messages": turns("How?", "So.")},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
        {"system_prompt": "Be brief.", "question": "How?", "response": "So."},
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, *turns("How?", "So.")]},
        {"system": "Be brief.", "instruction": "How?", "input": "With beans", "output": "So."},
        {"instruction": "How?", "output": "So.", "context": "1. Beans"},
        {"question": "How?", "context": "1. Beans", "answer": "So."},
        *({"question": "How?", "context": nothing, "answer": "So."} for nothing in ("", [], {}, float("nan"), None)),
    ],
)
def test_a_row_is_asked_as_it_is_trained_on(tmp_path: Path, row: dict[str, Any]) -> None:
    trained = to_conversation(row, "auto", "row").messages
    path = write(tmp_path / "p.jsonl", row)
    (prompt,) = load_prompts("mine", PromptSet(path, utility="rouge_l"))
    assert (*prompt.messages, Message("assistant", str(prompt.reference))) == trained


def test_turns_before_the_last_question_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"messages": turns("Who?", "Me.", "How?", "So.")})
    (prompt,) = load_prompts("mine", PromptSet(path, label="benign"))
    assert [turn.content for turn in prompt.messages] == ["Who?", "Me.", "How?"]
    assert prompt.reference == "So."


def test_a_transcript_in_one_text_is_cut_into_its_turns(tmp_path: Path) -> None:
    text = "\n\nHuman: Who?\n\nIn two\n\nparts.\n\nAssistant: Me.\n\nHuman: How?\n\nAssistant: So."
    path = write(tmp_path / "p.jsonl", {"chosen": text, "rejected": text})
    (prompt,) = load_prompts("hh", PromptSet(path, label="harmful"))
    assert [turn.content for turn in prompt.messages] == ["Who?\n\nIn two\n\nparts.", "Me.", "How?"]
    assert prompt.reference == "So."


def test_what_one_speaker_says_twice_in_a_transcript_is_one_turn(tmp_path: Path) -> None:
    """As in HH-RLHF, where a turn is empty, or a reply begins anew."""
    text = "\n\nHuman: Who?\n\nAssistant: Me.\n\nHuman: \n\nAssistant: Me again.\n\nHuman: How?\n\nAssistant: "
    path = write(
        tmp_path / "p.jsonl", {"chosen": text}, {"chosen": "\n\nHuman: Who?\n\nAssistant: I\n\nAssistant: Me."}
    )
    first, second = load_prompts("hh", PromptSet(path, label="harmful"))
    assert first.messages == (
        Message("user", "Who?"),
        Message("assistant", "Me.\n\nMe again."),
        Message("user", "How?"),
    )
    assert (first.reference, second.text, second.reference) == (None, "Who?", "I\n\nMe.")


def test_a_chosen_reply_that_is_no_transcript_does_not_hide_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "How?", "chosen": "So."})
    assert load_prompts("mine", PromptSet(path, label="benign"))[0].text == "How?"


@pytest.mark.parametrize(("said", "label"), [("unsafe", "harmful"), ("Safe", "benign"), ("benign", "benign")])
def test_sets_name_their_labels_differently(tmp_path: Path, said: str, label: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "How?", "label": said})
    assert load_prompts("mine", PromptSet(path))[0].label == label


def test_the_label_of_a_set_wins_over_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "How?", "label": "refusal"}, {"prompt": "Why?", "label": "benign"})
    assert [one.label for one in load_prompts("mine", PromptSet(path, label="harmful"))] == ["harmful"] * 2


def test_a_task_is_judged_by_its_answers_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "1 + 1?", "answer": 2, "label": "benign"})
    (prompt,) = load_prompts("sums", PromptSet(path, utility="answer"))
    assert (prompt.answer, prompt.label) == ("2", None)


def test_some_rows_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{at}?", "label": "benign"} for at in range(5)))
    found = load_prompts("mine", PromptSet(path, skip=1, rows=2))
    assert [one.text for one in found] == ["1?", "2?"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "How?"}], {}, "p.jsonl:1: label None does not say whether the prompt is harmful or benign"),
        ([{"prompt": "How?", "label": "odd"}], {}, "label 'odd' does not say"),
        ([{"text": "How?"}], {"label": "benign"}, "p.jsonl:1: no prompt: expected messages, conversations, or a text"),
        ([{"prompt": " "}], {"label": "benign"}, "no prompt"),
        ([{"prompt": turns("How?")}], {"label": "benign"}, "prompt holds a list instead of text: name the column"),
        ([{"chosen": "So."}], {"label": "benign"}, "no prompt: expected messages"),
        ([{"prompt": "1 + 1?"}], {"utility": "answer"}, "utility answer compares with a column answer"),
        ([{"prompt": "How?"}], {"utility": "rouge_l"}, "utility rouge_l compares with the row's reply"),
        (
            [{"prompt": "1?", "answer": "???"}],
            {"utility": "answer"},
            "p.jsonl:1: answer '???' has neither a number nor",
        ),
        ([{"messages": turns("How?", "So.", "Oh?")[1:2]}], {"label": "benign"}, "the last turn before the reply"),
        ([{"messages": [{"role": "user"}]}], {"label": "benign"}, "no text in 'content'"),
        ([{"messages": []}], {"label": "benign"}, "a list of at least one turn"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], {"label": "benign"}, "1 ids stand there more than once"),
    ],
)
def test_rows_that_are_no_prompts_are_named(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as refusal:
        load_prompts("mine", PromptSet(write(tmp_path / "p.jsonl", *rows), **options))
    assert message in str(refusal.value)


def test_an_option_without_such_a_value(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "How?"})
    with pytest.raises(ConfigError, match=r"loop.evaluation.prompts.mine.utility: 'bleu' is none of its values"):
        load_prompts("mine", PromptSet(path, utility="bleu"))  # type: ignore[arg-type]


def test_a_value_of_no_utility_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "How?", "label": "benign"})
    with pytest.raises(ConfigError, match=r"mine.utility_value: rouge2_recall: there is no utility that it is of"):
        load_prompts("mine", PromptSet(path, utility_value="rouge2_recall"))


def test_broken_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "How?", "label": "benign"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"p.jsonl:2: broken JSON"):
        load_prompts("mine", PromptSet(str(path)))


def test_an_answer_that_nothing_is_compared_with_may_have_any_form(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "How?", "answer": ["a", "b"]})
    assert load_prompts("mine", PromptSet(path, label="benign"))[0].answer is None


@pytest.mark.parametrize(("option", "advice"), [({"share": 0.5}, "say rows instead"), ({"format": "alpaca"}, "leave")])
def test_options_of_training_sets_that_would_not_be_heeded_are_refused(
    tmp_path: Path, option: dict[str, Any], advice: str
) -> None:
    path, (name,) = write(tmp_path / "p.jsonl", {"prompt": "How?"}), option
    with pytest.raises(ConfigError, match=rf"prompts\.mine\.{name}: .*{advice}"):
        load_prompts("mine", PromptSet(path, label="benign", **option))
    with pytest.raises(ConfigError, match=rf"loop\.safety_probe\.pairs\.{name}: .*{advice}"):
        load_pairs(Source(path, **option), "loop.safety_probe.pairs")


def test_a_request_is_known_apart_from_its_context(tmp_path: Path) -> None:
    row = {"behavior": "Sum it up.", "context": "The gate is blue."}
    (prompt,) = load_prompts("mine", PromptSet(write(tmp_path / "p.jsonl", row), label="harmful"))
    assert prompt.text == "The gate is blue.\n\n---\n\nSum it up."
    assert (prompt.context, prompt.request) == ("The gate is blue.", "Sum it up.")
    for other in ("The gate is blue.", ["The gate", "is blue."]):
        row = {"messages": turns("Sum it up."), "context": other}
        (prompt,) = load_prompts("mine", PromptSet(write(tmp_path / "p.jsonl", row), label="harmful"))
        assert (prompt.context, prompt.request, prompt.text) == (None, "Sum it up.", "Sum it up.")


def test_pairs_share_their_request(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "x", "messages": turns("How?", "So."), "safe_reply": "No."})
    (pair,) = load_pairs(Source(path), "loop.evaluation.pairs")
    assert pair.pair_id == "x"
    assert [turn.content for turn in pair.harmful.messages] == ["How?", "So."]
    assert [turn.content for turn in pair.safe.messages] == ["How?", "No."]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("How?", "So.")},
        {"prompt": "How?", "safe_reply": "No."},
        {"messages": turns("How?", " "), "safe_reply": "No."},
    ],
)
def test_a_pair_lacks_a_reply(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"p.jsonl:1: pairs need messages that end in a harmful reply, and a text in"):
        load_pairs(Source(write(tmp_path / "p.jsonl", row)), "loop.evaluation.pairs")


@pytest.mark.parametrize("name", ["harmful_val", "over_refusal", "utility_val"])
def test_the_samples_are_prompts(name: str) -> None:
    label = "harmful" if name == "harmful_val" else None
    assert len(load_prompts(name, PromptSet(f"sample:{name}", label=label))) >= 12
