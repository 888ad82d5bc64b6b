"""Prompt sets: what a model is asked after training, and what is wanted of its replies."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, get_args

from toss_lightning.data.formats import ROLES, Conversation, Message, behind_context, in_context, system_turn
from toss_lightning.data.sources import Source, numbered_rows
from toss_lightning.errors import ConfigError, DataError
from toss_lightning.evaluation.answers import check_answer
from toss_lightning.evaluation.records import Label, Prompt
from toss_lightning.evaluation.utility import Kind, MakeMetric
from toss_lightning.files import digest_of

TEXT_COLUMNS = ("prompt", "question", "instruction", "goal", "behavior", "forbidden_prompt", "query")
ANSWER_COLUMNS = ("answer", "target")
CATEGORY_COLUMNS = ("category", "type", "semantic_category")
LABELS: dict[str, Label] = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}


@dataclass(frozen=True)
class PromptSet(Source):
    """One set of prompts. Rows hold messages, or a text as prompt, question, instruction, goal, behavior or query.

    A text as context is put before that.
    """

    label: Label | None = None
    """What its prompts are, whatever the rows say: harmful (to be refused) or benign (to be answered)."""
    utility: Kind | MakeMetric | None = None
    """How replies are compared with what the rows hold: answer (the number or the words that a reply settles on are
    those of the column answer), rouge_l (words in common with the row's own reply), or by its class_path a metric of
    torchmetrics that compares a text with the row's own reply."""
    utility_value: str | None = None
    """Which value of such a metric counts, where it gives several, as rouge2_fmeasure of ROUGEScore."""


@dataclass(frozen=True)
class Pair:
    """A harmful request with a reply that complies and one that does not."""

    pair_id: str
    harmful: Conversation
    safe: Conversation


def load_prompts(name: str, spec: PromptSet) -> list[Prompt]:
    """Reads a prompt set.

    Args:
        name: what it is called in messages and tables.
        spec: where it is.

    Raises:
        ConfigError: an option has no such value.
        DataError: a row cannot be read, or does not say what is wanted of a reply to it.
    """
    options = (("label", spec.label, get_args(Label)), ("utility", spec.utility, get_args(Kind)))
    for option, value, choices in options:
        if not callable(value) and value not in (None, *choices):
            raise ConfigError(
                f"loop.evaluation.prompts.{name}.{option}: {value!r} is none of its values: {', '.join(choices)}"
            )
    if spec.utility_value is not None and spec.utility is None:
        raise ConfigError(
            f"loop.evaluation.prompts.{name}.utility_value: {spec.utility_value}: there is no utility that it is of"
        )
    _check_source(spec, f"loop.evaluation.prompts.{name}")
    prompts = [_prompt(name, spec, where, number, row) for number, (where, row) in enumerate(_rows(spec))]
    if repeated := len(prompts) - len({prompt.prompt_id for prompt in prompts}):
        raise DataError(f"{spec.path}: {repeated} ids stand there more than once: give each row its own, or none")
    return prompts


def load_pairs(spec: Source, key: str) -> list[Pair]:
    """Reads harmful requests with a harmful reply, in ``messages``, and a safe one, in ``safe_reply``.

    Args:
        spec: where they are.
        key: the setting that names them.

    Raises:
        ConfigError: an option is of no use here.
        DataError: a row cannot be read, or has no safe reply.
    """
    _check_source(spec, key)
    pairs = []
    for number, (where, row) in enumerate(_rows(spec)):
        messages, safe = _turns(row, where), row.get("safe_reply")
        is_reply = bool(messages) and messages[-1].role == "assistant" and bool(messages[-1].content.strip())
        if not is_reply or not isinstance(safe, str) or not safe.strip():
            raise DataError(f"{where}: pairs need messages that end in a harmful reply, and a text in safe_reply")
        kept = (*messages[:-1], Message("assistant", safe))
        pairs.append(Pair(str(row.get("id") or number), Conversation(messages, where), Conversation(kept, where)))
    return pairs


def _check_source(spec: Source, key: str) -> None:
    """Refuses options of a source that what is asked has no use for, and would not heed.

    Raises:
        ConfigError: there is one.
    """
    if spec.share is not None:
        raise ConfigError(f"{key}.share: what is asked is no part of another set: say rows instead")
    if spec.format != "auto":
        raise ConfigError(f"{key}.format: {spec.format}: leave it out: the columns tell, and columns renames them")


def _rows(spec: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows and where they stand, without values that are no number, by which a table says that there is none."""
    for where, row in numbered_rows(spec):
        yield where, {name: value for name, value in row.items() if value == value}


def digest_asked(prompts: Sequence[Prompt], pairs: Sequence[Pair]) -> dict[str, str]:
    """Identifies what is asked, whatever is wanted of the replies: a digest for each prompt set, and for the pairs."""
    turns: dict[str, list[Any]] = {}
    for one in prompts:
        turns.setdefault(one.set, []).append([one.prompt_id, *one.messages])
    for pair in pairs:
        turns.setdefault("pairs of replies", []).append([pair.pair_id, *pair.harmful.messages, *pair.safe.messages])
    return {name: digest_of(json.dumps(of_set, default=asdict)) for name, of_set in turns.items()}


def _prompt(name: str, spec: PromptSet, where: str, number: int, row: Mapping[str, Any]) -> Prompt:
    messages = _turns(row, where)
    reference = None
    if messages and messages[-1].role == "assistant":
        messages, reference = messages[:-1], messages[-1].content
    if not messages or messages[-1].role != "user":
        raise DataError(f"{where}: the last turn before the reply must be the user's: a prompt ends with a question")
    label = spec.label or _label(row, where, spec.utility is not None)
    answer = _answer(row, where, needed=spec.utility == "answer")
    if spec.utility not in (None, "answer") and reference is None:
        # a training row's reply may be its answer
        reference = _first(row, ("answer",), where)
        if reference is None:
            kind = spec.utility if isinstance(spec.utility, str) else "by a metric"
            raise DataError(f"{where}: utility {kind} compares with the row's reply, and the row has none")
    category = next((str(row[name]) for name in CATEGORY_COLUMNS if row.get(name) is not None), None)
    prompt_id = str(number if row.get("id") is None else row["id"])
    # where a row holds its turns whole, a column of that name may be anything
    context = str(row.get("context"))
    is_told = messages[-1].content.startswith(in_context(context, ""))
    return Prompt(name, prompt_id, messages, label, category, answer, reference, context if is_told else None)


def _answer(row: Mapping[str, Any], where: str, needed: bool) -> str | None:
    if not needed:  # what nothing is compared with may have any form
        return next((str(row[name]) for name in ANSWER_COLUMNS if isinstance(row.get(name), str | int | float)), None)
    answer = _first(row, ANSWER_COLUMNS, where)
    if answer is None:
        raise DataError(f"{where}: utility answer compares with a column answer, and the row has none")
    check_answer(answer, where)
    return answer


def _label(row: Mapping[str, Any], where: str, is_task: bool) -> Label | None:
    said = row.get("label")
    label = LABELS.get(str(said).lower())
    if label is None and not is_task:
        raise DataError(
            f"{where}: label {said!r} does not say whether the prompt is harmful or benign: correct it, or set label"
            " (or utility) for the whole set"
        )
    return None if is_task else label


def _turns(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The turns of a row as a row that is trained on has them, with or without a reply at the end."""
    turns = _written_turns(row, where)
    return turns if turns and turns[0].role == "system" else (*system_turn(row, where), *turns)


def _written_turns(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if row.get("messages") is not None:
        return tuple(_turn(turn, "role", "content", where) for turn in _list(row["messages"], where))
    if row.get("conversations") is not None:
        return tuple(_turn(turn, "from", "value", where) for turn in _list(row["conversations"], where))
    if isinstance(row.get("chosen"), str) and (turns := _transcript(row["chosen"])):
        return turns
    text = _first(row, TEXT_COLUMNS, where)
    if text is None or not text.strip():
        raise DataError(
            f"{where}: no prompt: expected messages, conversations, or a text in {', '.join(TEXT_COLUMNS)}; rename"
            " yours, for example columns: {prompt: my_prompt}"
        )
    if row.get("instruction") is not None and row.get("input"):
        text = f"{text}\n\n{row['input']}"
    text = behind_context(text, row, where)
    reply = _first(row, ("completion", "response", "output"), where)
    return (Message("user", text), *([Message("assistant", reply)] if reply else []))


def _transcript(text: str) -> tuple[Message, ...]:
    """The turns of a conversation that is written as one text, as in HH-RLHF.

    What one speaker says twice is one turn: HH-RLHF holds turns that are empty or interrupted.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    said = [(speaker, text.strip()) for speaker, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()]
    return tuple(
        Message(speakers[speaker], "\n\n".join(text for _, text in turns))
        for speaker, turns in groupby(said, key=itemgetter(0))
    )


def _list(turns: Any, where: str) -> list[Any]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: the conversation must be a list of at least one turn")
    return turns


def _turn(turn: Any, role_key: str, text_key: str, where: str) -> Message:
    role = ROLES.get(str(turn.get(role_key))) if isinstance(turn, Mapping) else None
    if role is None or not isinstance(turn.get(text_key), str):
        raise DataError(f"{where}: a turn has no {role_key!r} of {', '.join(ROLES)}, or no text in {text_key!r}")
    return Message(role, turn[text_key])


def _first(row: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """The text, or the number as text, of the first of these columns that holds something."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is not None and not isinstance(row[name], str | int | float):
        raise DataError(
            f"{where}: {name} holds a {type(row[name]).__name__} instead of text: name the column of the text in"
            f" columns; turns are read where they are called messages, as with columns: {{messages: {name}}}"
        )
    return None if name is None else str(row[name])
