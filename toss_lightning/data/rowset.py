"""One set, tokenised, with an account of every row that is not in it."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data.formats import Conversation
from toss_lightning.data.sources import SetLike, load_set
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import DataError
from toss_lightning.progress import progress_bar

Overlong = Literal["drop", "truncate", "error"]
SAID = 3
"""Bad rows of a set of which it is told what is wrong with them."""
PATIENCE = 5.0
"""Seconds of tokenising before a person is shown how far it is."""

NAMED = 5
"""Rows that a message names at most."""


@dataclass(frozen=True)
class RowSet:
    """The rows of one set, and what became of the others."""

    name: str
    rows: list[TokenizedRow]
    digest: str
    """Identifies the conversations, before any tokenisation."""
    read: int
    bad: int = 0
    """Left out because they could not be read."""
    overlong: int = 0
    """Left out because they are longer than `max_length`."""
    truncated: int = 0
    """Cut to `max_length`."""
    without_response: int = 0
    """Left out because truncation took every response token."""
    texts: list[str] = field(default_factory=list)
    """What each row says, its messages one below the other."""

    def counts(self) -> dict[str, Any]:
        """What the summary table shows."""
        lengths = [len(row.input_ids) for row in self.rows]
        response = sum(len(row.response_positions) for row in self.rows)
        return {
            "set": self.name,
            "rows": len(self.rows),
            "tokens": sum(lengths),
            "response_tokens": response,
            "dropped": self.read - len(self.rows),
            "dropped_bad": self.bad,
            "dropped_overlong": self.overlong,
            "dropped_without_response": self.without_response,
            "truncated": self.truncated,
            "longest": max(lengths),
            "prompt_share": 1 - response / sum(lengths),
        }

    def hashes(self) -> dict[int, str]:
        """Row id -> hash of the row's ids and response positions."""
        return dict(self._hashes)

    def tokens_digest(self) -> str:
        """Identifies the ids and response positions of all rows."""
        return self._tokens_digest

    @cached_property
    def _hashes(self) -> dict[int, str]:
        return {row.row_id: row.ids_hash for row in self.rows}

    @cached_property
    def _tokens_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=12)
        for row_id, value in self._hashes.items():
            digest.update(f"{row_id}:{value};".encode())
        return digest.hexdigest()

    def split(self, share: float, name: str) -> tuple["RowSet", "RowSet"]:
        """Holds out ``share`` of the rows, drawn with a fixed seed, at least one and never all."""
        count = min(max(1, round(share * len(self.rows))), len(self.rows) - 1)
        out = set(np.random.default_rng(0).permutation(len(self.rows))[:count].tolist())
        kept = [row for index, row in enumerate(self.rows) if index not in out]
        held = [row for index, row in enumerate(self.rows) if index in out]
        texts = [
            [text for index, text in enumerate(self.texts) if (index in out) == wanted] for wanted in (False, True)
        ]
        rest = {key: getattr(self, key) for key in ("bad", "overlong", "truncated", "without_response")}
        return (
            RowSet(self.name, kept, self.digest, self.read - len(held), **rest, texts=texts[0]),
            RowSet(name, held, self.digest, len(held), texts=texts[1]),
        )


def load_rows(
    name: str,
    spec: SetLike,
    tokenizer: ChatTokenizer,
    max_length: int,
    overlong: Overlong = "drop",
    bad_rows: Literal["error", "drop"] = "error",
    show: bool = False,
) -> RowSet:
    """Reads and tokenises a set.

    Args:
        name: what the set is called in messages.
        spec: where it comes from.
        tokenizer: renders and tokenises.
        max_length: tokens that a row may have.
        overlong: what a longer row does: ``drop`` it, ``truncate`` it, or ``error``.
        bad_rows: what a row that cannot be read does: ``drop`` it, or ``error``.
        show: whether a bar shows how far a large set is.

    Raises:
        DataError: a row is bad or over-long and that is an error, or no row is left.
    """
    loaded = load_set(spec, bad_rows)
    rows: list[TokenizedRow] = []
    texts: list[str] = []
    lost = {"overlong": 0, "truncated": 0, "without_response": 0}
    bad = [*loaded.bad]
    digest = hashlib.blake2b(digest_size=12)
    for row_id, conversation in _counted(loaded.conversations, name, show):
        content = asdict(conversation)
        content.pop("where")
        digest.update(json.dumps([row_id, content], sort_keys=True).encode())
        try:
            row = tokenizer.tokenize(conversation, row_id)
        except DataError as error:
            if bad_rows == "error":
                raise
            bad.append(str(error))
            continue
        if len(row.input_ids) > max_length:
            if overlong == "error":
                raise DataError(
                    f"{conversation.where}: {len(row.input_ids)} tokens, but data.max_length is {max_length}:"
                    " raise it, or set data.overlong to drop or truncate"
                )
            if overlong == "drop":
                lost["overlong"] += 1
                continue
            row = row.truncated(max_length)
            if not len(row.response_positions):
                lost["without_response"] += 1
                continue
            lost["truncated"] += 1
        rows.append(row)
        texts.append("\n".join(message.content for message in conversation.messages))
    read = len(loaded.conversations) + len(loaded.bad)
    if not rows:
        first = f" (the first: {bad[0]})" if bad else ""
        raise DataError(
            f"data.{name}: no rows left of {read}: {len(bad)} bad{first}, {lost['overlong']} longer than"
            f" data.max_length ({max_length}), {lost['without_response']} without a response token once truncated"
        )
    if bad:
        first = "; ".join(bad[:SAID])
        rank_zero_warn(f"data.{name}: bad rows are left out, {len(bad)} of {read}. What is wrong, first: {first}")
    return RowSet(name, rows, digest.hexdigest(), read, len(bad), **lost, texts=texts)


def _counted(conversations: Mapping[int, Conversation], name: str, show: bool) -> Iterator[tuple[int, Conversation]]:
    with progress_bar(f"reading {name}", len(conversations), "row", show, delay=PATIENCE) as bar:
        for one in conversations.items():
            yield one
            bar.update()


def name_rows(numbers: Collection[int], of: str) -> str:
    """A few of some rows of a set, for a message."""
    first, more = sorted(numbers)[:NAMED], len(numbers) - NAMED
    return f"row {', '.join(map(str, first))}{f' and {more} others' if more > 0 else ''} of data.{of}"


def overlaps(sets: Sequence[RowSet]) -> list[tuple[str, str, int]]:
    """Pairs of sets with rows in common, and how many."""
    hashes = {rows.name: set(rows.hashes().values()) for rows in sets}
    names = list(hashes)
    pairs = [(one, two) for index, one in enumerate(names) for two in names[index + 1 :]]
    return [(one, two, len(hashes[one] & hashes[two])) for one, two in pairs if hashes[one] & hashes[two]]


def warn_of_rows(sets: Sequence[RowSet]) -> None:
    """Warns of rows that may not teach the model to stop, and of rows that stand in two sets."""
    for rows in sets:
        if count := sum(not row.end_of_turn.any() for row in rows.rows):
            rank_zero_warn(
                f"{count} of {len(rows.rows)} rows of the {rows.name} set hold no end-of-turn token (they are cut,"
                " or the chat template has none): a model trained on them may not learn to stop"
            )
    for one, two, count in overlaps(sets):
        rank_zero_warn(f"{count} rows stand in both the {one} and the {two} set: the results will flatter the method")
