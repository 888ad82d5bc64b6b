"""Conversation -> token ids and the positions of the response tokens. The only place that renders text."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from toss_lightning.data.formats import Conversation, Message
from toss_lightning.errors import DataError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATELESS = "{% macro strftime_now(format) %}no date{% endmacro %}"
"""Stands in a template for what would write the date of today."""
REFUSALS = (jinja2.TemplateError, ValueError, TypeError)
"""What a template raises over turns or options that it cannot render."""
REPLY_END = "\ue000"
"""A character of no meaning, put behind a reply to see where the template renders its end."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedRow:
    """One row as every other part of the program sees it."""

    row_id: int
    """Row number in its set, rows that were left out counted in."""
    input_ids: np.ndarray
    """int32 [T]."""
    response_positions: np.ndarray
    """int32 [N]: index in ``input_ids`` of each response token, ascending, all above 0."""
    end_of_turn: np.ndarray
    """bool [N]: the response token ends a turn, so that a model without it would never stop."""
    label: str | None = None
    source: str | None = None

    @property
    def ids_hash(self) -> str:
        """Identifies the row's ids and response positions."""
        return ids_hash(self.input_ids, self.response_positions)

    def truncated(self, length: int) -> "TokenizedRow":
        """The row's first ``length`` tokens."""
        kept = self.response_positions < length
        return TokenizedRow(
            self.row_id,
            self.input_ids[:length],
            self.response_positions[kept],
            self.end_of_turn[kept],
            self.label,
            self.source,
        )


def ids_hash(input_ids: np.ndarray, response_positions: np.ndarray) -> str:
    """Hash of one row's ids ``[T]`` and response positions ``[N]``."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    digest.update(b"|")
    digest.update(np.ascontiguousarray(response_positions, dtype="<i4").tobytes())
    return digest.hexdigest()


class ChatTokenizer:
    """Renders conversations with the tokenizer's own chat template and finds the response tokens.

    A template with ``{% generation %}`` marks is used as it says. For any other, a turn's response is the text that the
    template adds to its rendering of the turns before it, up to the end-of-turn token; tokens are then found by their
    character offsets in the one tokenisation of the whole text, so that a token which straddles the boundary, as the
    first word after a prompt that ends in a space does, still counts as response.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        train_on: which assistant turns are response: ``all`` or the ``last``.
        template_options: variables for the template, such as ``date_string`` or ``enable_thinking``.

    Raises:
        DataError: the tokenizer has no chat template, or cannot tell where its tokens lie in the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: Literal["all", "last"] = "all",
        template_options: dict[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template: use the chat version of the model,"
                " or set data.chat_template to a Jinja file"
            )
        if not tokenizer.is_fast:
            raise DataError(f"{tokenizer.name_or_path}: only fast tokenizers (tokenizer.json) say where a token lies")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.template_options = template_options or {}
        self.marked = bool(GENERATION_MARK.search(str(tokenizer.get_chat_template())))
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = np.array(sorted(special | {tokenizer.eos_token_id} - {None}), dtype=np.int64)

    def tokenize(self, conversation: Conversation, row_id: int = 0) -> TokenizedRow:
        """Turns one conversation into ids and response positions.

        Raises:
            DataError: the template refuses the conversation, or its responses cannot be told from the rest.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
        try:
            text, spans = self._by_marks(messages) if self.marked else self._by_prefix(messages)
        except _CannotSpan as error:
            raise DataError(f"{conversation.where}: {error}") from error
        except REFUSALS as error:
            raise DataError(f"{conversation.where}: {_refused('this row', error)}") from error
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int32).reshape(-1, 2)
        runs = [self._run(text, ids, offsets, span) for span in spans]
        positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, _, stop in runs])
        end = np.concatenate(
            [self._is_special(ids[start:stop]) & (np.arange(start, stop) >= closing) for start, closing, stop in runs]
        )
        if not len(positions) or positions[0] == 0:
            raise DataError(f"{conversation.where}: the chat template renders no prompt before the reply")
        return TokenizedRow(row_id, ids, positions, end, conversation.label, conversation.source)

    def prompt_ids(self, messages: Sequence[Message], where: str) -> np.ndarray:
        """Renders and tokenises some turns up to where the next reply begins.

        Args:
            messages: the turns; the last one is the user's.
            where: what a message names as their place.

        Returns:
            int32 ``[T]``.

        Raises:
            DataError: the template refuses the conversation.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            text = self._render(turns, prompt=True)
        except REFUSALS as error:
            raise DataError(f"{where}: {_refused('this row', error)}") from error
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def turn_ends(self) -> list[int]:
        """The tokens that end a reply as this template renders one; none where it ends in plain text."""
        turns = (Message("user", "Hello"), Message("assistant", "Hello"))
        row = self.tokenize(Conversation(turns, "a greeting"))
        ends: list[int] = row.input_ids[row.response_positions[row.end_of_turn]].tolist()
        return ends

    def writes_the_date(self) -> bool:
        """Whether the template writes the date of today, so that rows have other tokens tomorrow.

        Raises:
            DataError: the template refuses a prompt.
        """
        template = str(self.tokenizer.get_chat_template())
        if "strftime_now" not in template:
            return False
        turns = [{"role": "user", "content": "Hello"}]
        try:
            dateless = self.tokenizer.apply_chat_template(
                turns, chat_template=DATELESS + template, tokenize=False, **self.template_options
            )
            return bool(dateless != self._render(turns))
        except REFUSALS as error:
            raise DataError(
                f"{_refused('a lone user turn', error)}: give one that does not in data.chat_template"
            ) from error

    def _render(self, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **self.template_options
            )
        )

    def _by_marks(self, messages: list[dict[str, str]]) -> tuple[str, list["_Span"]]:
        """The rendered text and its spans between ``{% generation %}`` marks, by character, as the template says."""
        # the token mask of apply_chat_template runs on to the row's end where a span ends in a space (transformers 5)
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.template_options},
        )
        (text,), (marks,) = rendered
        spans = [_Span(first, last) for first, last in marks if first < last]
        if not spans:
            raise _CannotSpan("the chat template has {% generation %} marks, but they cover no token of this row")
        return text, spans[-1:] if self.train_on == "last" else spans

    def _by_prefix(self, messages: list[dict[str, str]]) -> tuple[str, list["_Span"]]:
        """The rendered text and the span of each response in it: what the template adds for that turn."""
        text = self._render(messages)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._added(text, messages, turn) for turn in (turns[-1:] if self.train_on == "last" else turns)]

    def _added(self, text: str, messages: list[dict[str, str]], turn: int) -> "_Span":
        if turn == 0:
            raise _CannotSpan(
                "the conversation begins with a reply, so nothing prompts it: remove it or add a user turn"
            )
        history, reply = messages[:turn], messages[turn]["content"].rstrip()
        before = self._render(history, prompt=True)
        after = text if turn + 1 == len(messages) else self._render(messages[: turn + 1])
        last = next((at for at, pair in enumerate(zip(text, after, strict=False)) if pair[0] != pair[1]), len(after))
        marked = self._render([*history, {"role": "assistant", "content": reply + REPLY_END}])
        reply_end = max(marked.rfind(REPLY_END), 0)
        if turn + 1 == len(messages) and not text.startswith(before):
            raise _CannotSpan(
                "the chat template's generation prompt is not how it renders a reply, so the reply cannot be found:"
                " give a template with {% generation %} marks in data.chat_template"
            )
        if (
            not text.startswith(before)
            or not text[:last].startswith(marked[:reply_end])
            or reply.lstrip() not in text[len(before) : reply_end]
        ):
            if turn + 1 == len(messages):
                raise _CannotSpan(
                    "the chat template changes the text of the reply, as some do around <think>, so its reply cannot be"
                    " found: write the reply as the template does, or give a template with {% generation %} marks in"
                    " data.chat_template"
                )
            raise _CannotSpan(
                f"the chat template renders turn {turn + 1} differently once other turns follow, so its reply cannot be"
                " found: set data.train_on: last, or give a template with {% generation %} marks in data.chat_template"
            )
        return _Span(len(before), last, reply_end)

    def _run(self, text: str, ids: np.ndarray, offsets: np.ndarray, span: "_Span") -> tuple[int, int, int]:
        """Finds a span's tokens ``[start, stop)``; its special tokens from ``closing`` on end the turn."""
        starts, stops = offsets[:, 0], offsets[:, 1]
        special = self._is_special(ids)
        # the first token that ends after the response begins, and the first that begins at its end or later
        start, stop = int(np.searchsorted(stops, span.first, "right")), int(np.searchsorted(starts, span.last, "left"))
        # a special token that only leans into the span, with spaces it has swallowed, belongs to the turn beside it
        while start < stop and special[start] and starts[start] < span.first:
            start += 1
        while stop > start and special[stop - 1] and len(text[: stops[stop - 1]].rstrip()) > span.last:
            stop -= 1
        if span.reply_end is None:
            closing = stop
            while closing > start and (
                special[closing - 1] or not str(self.tokenizer.decode(ids[closing - 1])).strip()
            ):
                closing -= 1
            return start, closing, stop
        closing = int(np.searchsorted(starts, span.reply_end, "left"))
        enders = np.flatnonzero(special[closing:stop])
        if len(enders):
            # what the template puts after the end-of-turn token, such as ChatML's newline, is generated by no model
            end, stop = stop, closing + int(enders[0]) + 1
            while stop < end and special[stop] and not text[stops[stop - 1] - 1].isspace():
                stop += 1
        return start, closing, stop

    def _is_special(self, ids: np.ndarray) -> np.ndarray:
        return np.isin(ids, self.special_ids)


def _refused(what: str, error: Exception) -> str:
    return f"the chat template refuses {what} ({' '.join(str(error).split())})"


class _Span(NamedTuple):
    """Characters of the rendered text that are one response: the reply and what ends the turn."""

    first: int
    last: int
    reply_end: int | None = None
    """Where the reply ends and the template's own text begins again; unknown for a template with marks."""


class _CannotSpan(Exception):
    """The responses of a rendered conversation cannot be told from the rest."""
