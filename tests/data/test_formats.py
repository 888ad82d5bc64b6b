"""Each format becomes the same turns; whatever does not is refused in one line that says where."""

import pytest

from toss_lightning.data.formats import Conversation, to_conversation
from toss_lightning.errors import DataError

WHERE = "rows.jsonl:3"


def turns(row: dict, format: str = "auto") -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in to_conversation(row, format, WHERE).messages]


def refusal(row: dict, format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        to_conversation(row, format, WHERE)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{WHERE}: ")
    return message.removeprefix(f"{WHERE}: ")


CHAT = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you.")]
SAME_CHAT = {
    "messages": {"messages": [{"role": role, "content": text} for role, text in CHAT]},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in CHAT
        ]
    },
    "prompt_completion": {
        "prompt": [{"role": role, "content": text} for role, text in CHAT[:-1]],
        "completion": [{"role": "assistant", "content": CHAT[-1][1]}],
    },
}


@pytest.mark.parametrize("format", SAME_CHAT)
def test_every_chat_format_gives_the_same_turns_named_or_recognised(format):
    assert turns(SAME_CHAT[format], format) == turns(SAME_CHAT[format]) == CHAT


def test_label_source_and_place_stand_beside_the_turns():
    row = {"prompt": "p", "completion": "c", "label": 1, "source": "web"}
    conversation = to_conversation(row, "auto", WHERE, source="file")
    assert (conversation.label, conversation.source, conversation.where) == ("1", "web", WHERE)


def test_the_name_of_the_file_is_the_source_where_the_row_names_none():
    assert to_conversation({"prompt": "p", "completion": "c"}, "auto", WHERE, source="file") == Conversation(
        to_conversation({"prompt": "p", "completion": "c", "source": None}, "auto", WHERE).messages, WHERE, None, "file"
    )


# --- alpaca -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(nothing):
    row = {"instruction": "Name a colour.", "output": "Red.", **nothing}
    assert turns(row) == turns(row, "alpaca") == [("user", "Name a colour."), ("assistant", "Red.")]


def test_alpaca_with_input_puts_it_below_the_instruction():
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert turns(row) == [("user", "Translate.\n\nHaus"), ("assistant", "house")]


@pytest.mark.parametrize(
    ("row", "rest"),
    [
        ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        (
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
            [("user", "h"), ("assistant", "g")],
        ),
        (
            {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]},
            [("user", "h"), ("assistant", "g")],
        ),
    ],
)
def test_a_system_column_becomes_the_first_turn_unless_it_is_empty(row, rest):
    assert turns({**row, "system": "Be brief."}) == [("system", "Be brief."), *rest]
    assert turns({**row, "system_prompt": "Be brief."}) == [("system", "Be brief."), *rest]
    assert turns({**row, "system": ""}) == turns({**row, "system": None}) == rest


def test_a_system_turn_stands_before_a_system_column():
    said = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert turns({"messages": said, "system": "Be brief."})[0] == ("system", "system")
    assert turns({"messages": said, "system": "Be brief."})[1][0] == "user"


# --- sharegpt and messages ----------------------------------------------------------------------------------------


def test_known_names_of_the_roles():
    said = [("system", "s"), ("human", "h"), ("gpt", "g"), ("user", "u"), ("model", "m"), ("assistant", "a")]
    assert [role for role, _ in turns({"conversations": [{"from": role, "value": text} for role, text in said]})] == [
        "system", "user", "assistant", "user", "assistant", "assistant",
    ]  # fmt: skip


def test_replies_are_kept_to_the_letter():
    reply = "  \n indented\r\n\ttext 🙂 <|im_end|> \n"
    assert turns({"prompt": "p", "completion": reply})[-1] == ("assistant", reply)


# --- prompt and completion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["prompt", "question"])
@pytest.mark.parametrize("completion", ["completion", "response", "answer"])
def test_prompt_and_completion_by_their_usual_names(prompt, completion):
    assert turns({prompt: "2 + 2?", completion: "4"}) == [("user", "2 + 2?"), ("assistant", "4")]


def test_a_prompt_of_turns_with_a_completion_of_text():
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert turns({"prompt": prompt, "completion": "c"}) == [("system", "s"), ("user", "u"), ("assistant", "c")]


def test_other_columns_and_null_columns_do_not_disturb():
    row = {"messages": None, "instruction": None, "prompt": "p", "answer": "a", "id": 7}
    assert turns(row) == [("user", "p"), ("assistant", "a")]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_unknown_columns_are_listed_with_what_would_fit():
    message = refusal({"text": "a", "foo": "b"})
    assert message.startswith("columns ['foo', 'text'] fit no known format; expected messages, conversations, ")
    assert "columns: {prompt: my_input, completion: my_output}" in message


def test_unknown_role():
    message = refusal({"messages": [{"role": "user", "content": "u"}, {"role": "robot", "content": "r"}]})
    assert message == "unknown role 'robot' in turn 2; known: system, user, human, assistant, gpt, model"


@pytest.mark.parametrize("role", [None, ["assistant"], {"is": "assistant"}, 3])
def test_a_role_that_is_no_string_is_unknown(role):
    assert refusal({"messages": [{"role": role, "content": "u"}]}).startswith(f"unknown role {role!r} in turn 1; known")


@pytest.mark.parametrize("reply", ["", "  \n\t"])
@pytest.mark.parametrize(
    "row",
    [
        lambda reply: {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": reply}]},
        lambda reply: {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": reply}]},
        lambda reply: {"instruction": "i", "output": reply},
        lambda reply: {"prompt": "p", "completion": reply},
    ],
    ids=["messages", "sharegpt", "alpaca", "prompt_completion"],
)
def test_empty_reply(row, reply):
    assert refusal(row(reply)) == "empty reply: fill it in, remove the row, or set data.bad_rows: drop"


def test_an_empty_reply_in_an_early_turn():
    row = {"messages": [{"role": role, "content": text} for role, text in [("user", "u"), ("assistant", ""), *CHAT]]}
    assert refusal(row).startswith("empty reply")


@pytest.mark.parametrize(("reply", "kind"), [(4, "int"), (0.5, "float"), (True, "bool"), ({"text": "a"}, "dict")])
@pytest.mark.parametrize(("prompt", "completion"), [("instruction", "output"), ("prompt", "completion")])
def test_a_reply_that_is_no_string(prompt, completion, reply, kind):
    message = refusal({prompt: "p", completion: reply})
    assert message == f"the reply must be a string, not {kind}: quote it or convert the column"


@pytest.mark.parametrize(("key", "kind"), [({"content": 4}, "int"), ({"content": None}, "null"), ({}, "null")])
def test_a_turn_without_text(key, kind):
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", **key}]}
    assert refusal(row) == f"the reply must be a string, not {kind}: quote it or convert the column"


def test_a_prompt_that_is_no_string():
    assert refusal({"prompt": 4, "completion": "c"}).startswith("the prompt must be a string, not int")


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": None}, {"prompt": "p", "answer": None}])
def test_a_null_reply_is_called_missing_and_not_an_unknown_format(row):
    assert refusal(row) == "column 'completion' or 'response' or 'answer' is missing or null"


def test_a_column_that_a_named_format_needs():
    assert refusal({"prompt": "p", "completion": "c"}, "messages") == "column 'messages' is missing or null"
    assert refusal({"instruction": "i", "output": None}, "alpaca") == "column 'output' is missing or null"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"conversations": [{"from": "human", "value": "u"}]},
        {"messages": []},
        {"prompt": "p", "completion": [{"role": "user", "content": "u"}]},
    ],
)
def test_no_assistant_turn(row):
    assert refusal(row) == "no assistant turn, so nothing to learn: add a reply or remove the row"


def test_turns_that_are_no_list_or_have_other_keys():
    assert refusal({"messages": "hi"}) == "the conversation must be a list of turns, not str"
    assert refusal({"messages": [{"from": "gpt", "value": "a"}]}).startswith("turn 1 has no 'role': each turn needs")
    assert refusal({"conversations": ["hi"]}) == "turn 1 has no 'from': each turn needs 'from' and 'value'"
