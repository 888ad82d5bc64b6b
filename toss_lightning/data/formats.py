"""Rows of the usual dataset formats -> :class:`Conversation`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toss_lightning.errors import DataError

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
PROMPT_COLUMNS = ("prompt", "question")
SYSTEM_COLUMNS = ("system", "system_prompt")
COMPLETION_COLUMNS = ("completion", "response", "answer")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str


def in_context(context: str, request: str) -> str:
    """A request behind a text that it is about, as HarmBench puts it."""
    return f"{context}\n\n---\n\n{request}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a set, whatever format it came in; ``where`` is ``file:row``, for messages to people."""

    messages: tuple[Message, ...]
    where: str
    label: str | None = None
    source: str | None = None


def detect_format(columns: Iterable[str], where: str) -> Format:
    """Recognises a format from the column names.

    Raises:
        DataError: the columns fit none; the message lists what would.
    """
    names = set(columns)
    if format := _fitting(names):
        return format
    raise DataError(
        f"{where}: columns {sorted(names)} fit no known format; expected messages, conversations, instruction + output,"
        " or prompt + completion: rename yours, for example columns: {prompt: my_input, completion: my_output}"
    )


def _fitting(names: set[str]) -> Format | None:
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if {"instruction", "output"} <= names:
        return "alpaca"
    if names.intersection(PROMPT_COLUMNS) and names.intersection(COMPLETION_COLUMNS):
        return "prompt_completion"
    return None


def to_conversation(row: Mapping[str, Any], format: Format, where: str, source: str | None = None) -> Conversation:
    """Reads one row.

    Args:
        row: column name -> value.
        format: the row's format; ``auto`` recognises it from the columns.
        where: ``file:row``, named in errors.
        source: what the row's source is called if the row itself does not say.

    Raises:
        DataError: unknown columns or roles, a reply that is missing, empty or not a string.
    """
    if format == "auto":
        format = _fitting({name for name, value in row.items() if value is not None}) or detect_format(row, where)
    messages = tuple(_READERS[format](row, where))
    if messages and messages[0].role != "system":
        messages = (*system_turn(row, where), *messages)
    for message in messages:
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{where}: empty reply: fill it in, remove the row, or set data.bad_rows: drop")
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where}: no assistant turn, so nothing to learn: add a reply or remove the row")
    label, named = row.get("label"), row.get("source")
    return Conversation(
        messages, where, None if label is None else str(label), str(named) if named is not None else source
    )


def _messages(row: Mapping[str, Any], where: str) -> Iterable[Message]:
    yield from _turns(_column(row, ("messages",), where), "role", "content", where)


def _sharegpt(row: Mapping[str, Any], where: str) -> Iterable[Message]:
    yield from _turns(_column(row, ("conversations",), where), "from", "value", where)


def _alpaca(row: Mapping[str, Any], where: str) -> Iterable[Message]:
    instruction, extra = _text(_column(row, ("instruction",), where), "instruction", where), row.get("input")
    asked = f"{instruction}\n\n{_text(extra, 'input', where)}" if extra else instruction
    yield Message("user", behind_context(asked, row, where))
    yield Message("assistant", _text(_column(row, ("output",), where), "reply", where))


def _prompt_completion(row: Mapping[str, Any], where: str) -> Iterable[Message]:
    for columns, role in ((PROMPT_COLUMNS, "user"), (COMPLETION_COLUMNS, "assistant")):
        value = _column(row, columns, where)
        if isinstance(value, list):
            yield from _turns(value, "role", "content", where)
        elif role == "user":
            yield Message(role, behind_context(_text(value, "prompt", where), row, where))
        else:
            yield Message(role, _text(value, "reply", where))


def behind_context(asked: str, row: Mapping[str, Any], where: str) -> str:
    """What is asked, behind the text in the column ``context``, if there is one."""
    context = row.get("context")
    if not context or context != context:  # nothing there, as the NaN of a table says too
        return asked
    if isinstance(context, bool) or not isinstance(context, str | int | float):
        raise DataError(
            f"{where}: context holds a {type(context).__name__}, and what is asked stands behind a text: convert it, or"
            " leave it out with columns: {unused: context}"
        )
    return in_context(str(context), asked)


def system_turn(row: Mapping[str, Any], where: str) -> Iterable[Message]:
    """The system turn of a row that has it in a column of its own."""
    for name in SYSTEM_COLUMNS:
        if row.get(name):
            yield Message("system", _text(row[name], "system", where))
            return


def _turns(turns: Any, role_key: str, text_key: str, where: str) -> Iterable[Message]:
    if not isinstance(turns, list):
        raise DataError(f"{where}: the conversation must be a list of turns, not {type(turns).__name__}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or role_key not in turn:
            raise DataError(
                f"{where}: turn {number} has no {role_key!r}: each turn needs {role_key!r} and {text_key!r}"
            )
        role = ROLES.get(str(turn[role_key]))
        if role is None:
            raise DataError(f"{where}: unknown role {turn[role_key]!r} in turn {number}; known: {', '.join(ROLES)}")
        yield Message(role, _text(turn.get(text_key), "reply" if role == "assistant" else role, where))


def _column(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"{where}: column {' or '.join(repr(name) for name in names)} is missing or null")


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: the {what} must be a string, not {kind}: quote it or convert the column")
    return value


_READERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
