"""Conversation -> token ids and the positions of the response tokens. The only place that renders text."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.data.formats import Conversation
from toss_lightning.errors import DataError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        turns = [number for number, turn in enumerate(conversation.messages) if turn.role == "assistant"]
        if self.train_on == "last":
            turns = turns[-1:]
        try:
            ids, runs = (self._by_marks if self.marked else self._by_prefix)(messages, turns)
        except _CannotSpan as error:
            raise DataError(f"{conversation.where}: {error}") from error
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(f"{conversation.where}: the chat template refuses this row ({error})") from error
        positions = np.concatenate([np.arange(*run, dtype=np.int32) for run in runs])
        end = np.concatenate([self._end_of_turn(ids[slice(*run)]) for run in runs])
        if not len(positions) or positions[0] == 0:
            raise DataError(f"{conversation.where}: the chat template renders no prompt before the reply")
        return TokenizedRow(row_id, ids, positions, end, conversation.label, conversation.source)

    def _render(self, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **self.template_options
        )

    def _by_marks(self, messages: list[dict[str, str]], turns: list[int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        encoded = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **self.template_options
        )
        mask = np.array(encoded["assistant_masks"], dtype=np.int8)
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
        runs = [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        if not runs:
            raise _CannotSpan("the chat template has {% generation %} marks, but they cover no token of this row")
        return np.array(encoded["input_ids"], dtype=np.int32), runs[-1:] if self.train_on == "last" else runs

    def _by_prefix(self, messages: list[dict[str, str]], turns: list[int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        starts, stops = (list(side) for side in zip(*encoded["offset_mapping"], strict=True))
        runs = []
        for turn in turns:
            first, last = self._response_text(text, messages, turn)
            # the first token that ends after the response begins, and the first that begins at its end or later
            start, stop = bisect_left(stops, first + 1), bisect_left(starts, last)
            runs.append((start, self._trim(ids, start, stop)))
        return ids, runs

    def _response_text(self, text: str, messages: list[dict[str, str]], turn: int) -> tuple[int, int]:
        """Character span ``[first, last)`` of what the template adds for one assistant turn."""
        before, after = self._render(messages[:turn], prompt=True), self._render(messages[: turn + 1])
        last = next((at for at, pair in enumerate(zip(text, after, strict=False)) if pair[0] != pair[1]), len(after))
        if not text.startswith(before) or messages[turn]["content"].strip() not in text[len(before) : last]:
            raise _CannotSpan(
                f"the chat template renders turn {turn + 1} differently once other turns follow, so its reply cannot be"
                " found: set data.train_on: last, or give a template with {% generation %} marks in data.chat_template"
            )
        return len(before), last

    def _trim(self, ids: np.ndarray, start: int, stop: int) -> int:
        """Cuts what the template puts after the end-of-turn token, such as ChatML's newline: no model generates it."""
        special = np.flatnonzero(np.isin(ids[start:stop], self.special_ids))
        if len(special) and not self.tokenizer.decode(ids[start + special[-1] + 1 : stop]).strip():
            return start + int(special[-1]) + 1
        return stop

    def _end_of_turn(self, run: np.ndarray) -> np.ndarray:
        """bool [N]: the special tokens that close a run of response ids ``[N]``."""
        special = np.isin(run, self.special_ids)
        return np.logical_and.accumulate(special[::-1])[::-1]


class _CannotSpan(Exception):
    """The responses of a rendered conversation cannot be told from the rest."""
