"""Rows of a run token by token: what each says, its score, and what it counted."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.errors import ConfigError
from toss_lightning.report.summary import Summary, stage_name
from toss_lightning.scores import TokenScores, degraded_column
from toss_lightning.selection import TokenWeights

HARMFUL = "harmful"
"""The label that tables and pictures look for."""
BROKEN, PARTS = "\ufffd", 4
"""What decoders put for bytes that are not yet a whole character, and how many tokens such a one has at most."""
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Kinds of characters that show nothing, or that change how others are shown."""
BLANK = {*"\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0", *map(chr, [*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)])}
"""Others that show nothing."""


@dataclass(frozen=True)
class RiskScore:
    """How much better the safety-degraded reference likes each response token than another; higher is riskier."""

    values: np.ndarray
    """Shape ``[tokens]`` float32, in nats."""
    made_of: tuple[str, str]
    """The two columns whose difference it is: losses of the first minus losses of the second."""

    @property
    def said(self) -> str:
        """As a legend says it."""
        first, second = (stage_name(Summary(), name) for name in self.made_of)
        return f"token loss of the {first} minus that of the {second}"


def risk_score(scores: TokenScores) -> RiskScore | None:
    """The token score of Eq. 2 of arXiv 2603.01185; the base stands for a utility reference that was not scored.

    None where no degraded reference was, as of selections that look at something else than harm.
    """
    degraded, there = degraded_column(scores.round), scores.adapters
    first = next((name for name in ("utility", "base") if name in there), None)
    if first is None or degraded not in there:
        return None
    values = scores.combine({f"loss_{first}": 1.0, f"loss_{degraded}": -1.0})
    return RiskScore(values, (first, degraded))


@dataclass(frozen=True)
class Token:
    """A token of a row."""

    text: str
    """Empty where it is a part of a character, which the token behind it ends."""
    ordinal: int | None = None
    """Which response token it is, from 1; None for a token of the prompt or of the template."""
    losses: Mapping[str, float] | None = None
    """Column -> token loss in nats."""
    score: float | None = None
    weight: float | None = None
    """What it counts in the task loss; None where nothing was selected."""
    anchor: float = 0.0
    """What its divergence from the base counts."""

    @property
    def masked(self) -> bool:
        """Left out of the task loss."""
        return self.weight == 0


@dataclass(frozen=True)
class Row:
    """A row of the custom set."""

    row_id: int
    label: str | None
    source: str | None
    tokens: Sequence[Token]
    mean_score: float | None
    left_out: bool
    """Not even in a batch."""

    @property
    def response_tokens(self) -> int:
        """How many it has."""
        return sum(token.ordinal is not None for token in self.tokens)

    @property
    def masked(self) -> int:
        """How many of them are."""
        return sum(token.masked for token in self.tokens)


def facts_of(row: Row) -> list[str]:
    """What is said of a row besides its id."""
    counts = f"{row.response_tokens} response tokens"
    facts = [one_line(row.label or "no label"), *([one_line(row.source)] if row.source else [])]
    facts += [f"{row.masked} of {counts} masked" if row.masked else counts]
    facts += [f"mean score {signed(row.mean_score)}"] if row.mean_score is not None else []
    return [*facts, *(["left out of the batches"] if row.left_out else [])]


class Rows:
    """The rows of a store, by row id.

    Args:
        scores: the store.
        weights: what was selected from it.
        tokenizer: that of its rows.
        score: of its tokens.
    """

    def __init__(
        self,
        scores: TokenScores,
        weights: TokenWeights | None,
        tokenizer: PreTrainedTokenizerBase,
        score: RiskScore | None,
    ) -> None:
        self.scores, self.weights, self.tokenizer, self.score = scores, weights, tokenizer, score
        self._at = {row_id: at for at, row_id in enumerate(scores.row_ids.tolist())}
        self._ids, self._positions = scores.lists("input_ids"), scores.lists("response_positions")
        self._labels, self._sources = scores.values("label"), scores.values("source")
        columns = [name for name in scores.adapters if not name.startswith("degraded")]
        columns += [degraded_column(scores.round)] if scores.rounds else []
        self._losses = {name: scores.flat(f"loss_{name}") for name in columns}

    def __getitem__(self, row_id: int) -> Row:
        """A row.

        Raises:
            ConfigError: there is none of this id.
        """
        if row_id not in self._at:
            known = f"{min(self._at)} to {max(self._at)}"
            raise ConfigError(
                f"--row {row_id}: no such row in {self.scores.path}, whose row ids go from {known} (rows that were"
                " left out of the set are counted)"
            )
        at = self._at[row_id]
        here = slice(*self.scores.offsets[at : at + 2].tolist())
        weights = self.weights.weights[row_id] if self.weights is not None else None
        anchors = self.weights.anchor.get(row_id) if self.weights is not None else None
        texts = [Token(text) for text in pieces(self.tokenizer, self._ids[at].tolist())]
        scores = self.score.values[here] if self.score is not None else None
        for ordinal, position in enumerate(self._positions[at].tolist()):
            texts[position] = Token(
                texts[position].text,
                ordinal + 1,
                {name: float(values[here][ordinal]) for name, values in self._losses.items()},
                float(scores[ordinal]) if scores is not None else None,
                float(weights[ordinal]) if weights is not None else None,
                float(anchors[ordinal]) if anchors is not None else 0.0,
            )
        return Row(
            row_id,
            self._labels[at],
            self._sources[at],
            texts,
            float(scores.mean()) if scores is not None else None,
            self.weights is not None and row_id in self.weights.left_out,
        )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to the text of those before it.

    A token alone would lose the space that it begins with, in some vocabularies, and a character of several tokens
    would be none. Such a character stands at its last token.
    """
    found: list[str] = []
    begin = read = 0
    for end in range(1, len(ids) + 1):
        known, whole = (_decoded(tokenizer, ids[begin:to]) for to in (read, end))
        if whole.endswith(BROKEN) and end - read < PARTS and end < len(ids):
            found.append("")
            continue
        found.append(whole[len(known) :])
        begin, read = read, end
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def choose_rows(
    scores: TokenScores, weights: TokenWeights | None, score: RiskScore | None, count: int
) -> dict[str, list[int]]:
    """Row ids worth a look: heading -> the rows below it.

    Args:
        scores: the store.
        weights: what was selected from it.
        score: of its tokens.
        count: rows below each heading, at most.
    """
    lengths = np.diff(scores.offsets)
    every = np.ones(len(lengths), dtype=bool)
    labels = np.array(scores.values("label"), dtype=object)
    harmful, others = labels == HARMFUL, (labels != HARMFUL) & (labels != np.array(None))
    masked = row_means(scores, weights.flat() == 0) if weights is not None else np.zeros(len(lengths))
    wanted = {}
    if score is not None:
        wanted["Riskiest, by the mean score of their tokens"] = (-row_means(scores, score.values), every)
    if masked.any() and harmful.any():
        wanted["Labelled harmful, and masked least"] = (masked, harmful)
        wanted["Labelled otherwise, and masked most"] = (-masked, others & (masked > 0))
    elif masked.any():
        wanted["Masked most"] = (-masked, masked > 0)
    wanted["Drawn at random"] = (np.random.default_rng(0).random(len(lengths)), every)
    chosen = {}
    for heading, (order, among) in wanted.items():
        ranked = np.argsort(order, kind="stable")
        if len(picked := ranked[among[ranked]][:count]):
            chosen[heading] = scores.row_ids[picked].tolist()
    return chosen


def row_means(scores: TokenScores, values: np.ndarray) -> np.ndarray:
    """The mean of ``values`` ``[tokens]`` over the tokens of each row; ``[R]`` float64."""
    sums: np.ndarray = np.add.reduceat(values.astype(np.float64), scores.offsets[:-1])
    return sums / np.diff(scores.offsets)


def signed(score: float) -> str:
    """A score as people read it."""
    return f"{score:+.2f}".replace("-", "−")


def visible(said: str) -> str:
    """With a sign for whatever would not be seen, or would make what follows look different."""
    return "".join(_SIGNS.get(sign) or (f"[U+{ord(sign):04X}]" if _is_unseen(sign) else sign) for sign in said)


def _is_unseen(sign: str) -> bool:
    return unicodedata.category(sign) in UNSEEN or sign in BLANK


_SIGNS = {"\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\x1b": "␛", "\x7f": "␡"}


def one_line(said: str) -> str:
    """The same on one line."""
    return " ".join(visible(said).split())
