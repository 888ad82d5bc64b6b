"""DSIR: keep the rows whose words are likelier in a target set (Xie et al., arXiv 2302.03169)."""

import re
from collections.abc import Iterable
from hashlib import sha256
from typing import Literal, get_args

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection
from toss_lightning.selection.checks import check_at_least, check_discard, check_one_of, check_told_apart
from toss_lightning.selection.rows import keep_rows, seed_of
from toss_lightning.selection.weights import TokenWeights

WORDS = re.compile(r"\w+|[^\w\s]+")
Target = Literal["utility", "safety"]
FLOOR = 1e-8
"""Added to each probability before its logarithm is taken, as the published code does."""


class Dsir(Selection):
    """Data selection with importance resampling over hashed n-grams.

    A row's log importance weight is ``log w = sum_b c_b (log p_target,b - log p_custom,b)`` over the buckets b of its
    n-grams; ``R - floor(discard * R)`` of R rows are drawn in proportion to w without replacement (Gumbel top-k).

    Args:
        discard: share of the rows that get weight 0, in [0, 1).
        target: the set whose words are wanted: ``utility`` or ``safety``.
        resample: draw rows at random as their importance weights say; ``false`` keeps those of the highest weights.
        seed: fixes what is drawn; ``seed_everything`` by default.
        ngrams: the longest n-gram that is counted; 2 counts words and pairs of words.
        buckets: n-grams are hashed into this many.
        smoothing: added to the target set's count of every bucket (Laplace); the paper adds none.
        min_words: shorter rows are never kept; the published code asks for 100.

    Raises:
        ConfigError: ``discard`` is outside [0, 1), there is no such ``target``, or a number is too low or none.
    """

    columns = ()

    def __init__(
        self,
        discard: float = 0.2,
        target: Target = "utility",
        resample: bool = True,
        seed: int | None = None,
        ngrams: int = 2,
        buckets: int = 10_000,
        smoothing: float = 0.0,
        min_words: int = 0,
    ) -> None:
        check_discard(discard)
        check_one_of("target", target, get_args(Target))
        check_at_least(1, ngrams=ngrams, buckets=buckets)
        check_at_least(0, smoothing=smoothing, min_words=min_words)
        self.discard, self.target, self.resample, self.seed = discard, target, resample, seed
        self.ngrams, self.buckets, self.smoothing, self.min_words = ngrams, buckets, smoothing, min_words
        self.features = {"text": ("custom", target)}

    def select(self, scores: TokenScores) -> TokenWeights:
        """Draws the rows.

        Raises:
            ConfigError: a set has no word, or fewer rows are long enough than are to be kept.
            StoreError: without resampling, no row is likelier than another.
        """
        texts = scores.feature("text")
        rows = [self._hashed(text) for text in texts]
        wanted = (self._hashed(text) for text in scores.feature("text", self.target))
        log_ratio = np.log(self._shares(wanted, self.target, self.smoothing) + FLOOR)
        log_ratio -= np.log(self._shares(rows, "custom") + FLOOR)
        log_weight = np.array([log_ratio[row].sum() for row in rows])
        if not self.resample:
            question = f"has data.{self.target} the same texts? Give others, or set resample: true"
            check_told_apart(log_weight, share_of(self.discard, len(rows)), scores.path, "rows", question)
        seed = seed_of(self)
        noise = np.random.default_rng(seed).gumbel(size=len(rows)) if self.resample else 0.0
        kept = self._highest(log_weight + noise, np.array([len(words_of(text)) for text in texts]))
        return keep_rows(
            scores,
            kept,
            discard=self.discard,
            target=self.target,
            seed=seed if self.resample else None,
            mean_log_weight_kept=float(log_weight[kept].mean()),
            mean_log_weight_left_out=float(log_weight[~kept].mean()) if not kept.all() else None,
        )

    def _hashed(self, text: str) -> np.ndarray:
        return hashed_ngrams(text, self.ngrams, self.buckets)

    def _shares(self, rows: Iterable[np.ndarray], name: str, smoothing: float = 0.0) -> np.ndarray:
        """How often each bucket occurs among all n-grams of some rows; ``[buckets]``."""
        counts = np.full(self.buckets, smoothing)
        words = 0
        for row in rows:
            counts += np.bincount(row, minlength=self.buckets)
            words += len(row)
        if not words:
            raise ConfigError(f"data.{name}: no row has a word that DSIR could count: give rows with text")
        shares: np.ndarray = counts / counts.sum()
        return shares

    def _highest(self, values: np.ndarray, words: np.ndarray) -> np.ndarray:
        wanted = len(values) - share_of(self.discard, len(values))
        enough = np.flatnonzero(words >= self.min_words)
        if len(enough) < wanted:
            raise ConfigError(
                f"loop.selection.min_words: only {len(enough)} of {len(values)} rows have {self.min_words} words, but"
                f" discard: {self.discard} keeps {wanted}: lower min_words, or discard more"
            )
        kept = np.zeros(len(values), dtype=bool)
        kept[enough[exact_top(values[enough], wanted)]] = True
        return kept


def words_of(text: str) -> list[str]:
    """Lower-cased words and runs of punctuation."""
    return WORDS.findall(text.lower())


def hashed_ngrams(text: str, ngrams: int = 2, buckets: int = 10_000) -> np.ndarray:
    """The buckets of all n-grams of 1 to ``ngrams`` words; ``[K]`` int32."""
    words = words_of(text)
    found = [" ".join(words[at : at + n]) for n in range(1, ngrams + 1) for at in range(len(words) - n + 1)]
    return np.array([_bucket(ngram, buckets) for ngram in found], dtype=np.int32)


def _bucket(ngram: str, buckets: int) -> int:
    return int.from_bytes(sha256(ngram.encode()).digest(), "big") % buckets
