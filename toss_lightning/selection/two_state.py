"""A chain of two states along each row, benign and harmful: its posterior, and its fit by EM, batched over rows.

The state stays with probability s from one token to the next and is otherwise drawn anew, harmful with probability pi,
which is also how a row begins; so the chain is stationary and reads the same in both directions. A token score x is
evidence of ``(x - c) / tau``, a log-likelihood ratio of harmful to benign. That is normalised for a score that varies
around c + m in harmful tokens and around c - m in benign ones with the same variance ``2 m tau``: the law that EM fits.
Everything is in log odds, ``log P(harmful) - log P(benign)``.
"""

import math
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

EDGE = 1e-9
"""How close to 0 and 1 EM brings a probability."""
WEAKEST = 1e6
"""The highest temperature: scores that say nothing."""
SMALLEST = 1e-300
"""In place of the variance of scores that are all the same."""


class Chain(NamedTuple):
    """How the hidden state moves, and what a score says of it."""

    stay: float
    """s, in [0, 1)."""
    prior: float
    """pi, in (0, 1)."""
    temperature: float = 1.0
    """tau, above 0."""
    centre: float = 0.0
    """c: the score that speaks for neither state."""

    def evidence(self, scores: Tensor) -> Tensor:
        """Log-likelihood ratios of harmful to benign; Shape ``[M]``, as ``scores``."""
        return (scores - self.centre) / self.temperature

    def log_transitions(self) -> tuple[float, float, float, float]:
        """``log P(next | now)`` for benign-benign, benign-harmful, harmful-benign, harmful-harmful."""
        benign, harmful = (1 - self.stay) * (1 - self.prior), (1 - self.stay) * self.prior
        return math.log(self.stay + benign), math.log(harmful), math.log(benign), math.log(self.stay + harmful)

    @property
    def log_odds(self) -> float:
        """Of a token about which nothing is known."""
        return math.log(self.prior) - math.log1p(-self.prior)


class Packed(NamedTuple):
    """Some rows, their tokens side by side: first every row's first token, then every second one, and so on."""

    tokens: Tensor
    """Shape ``[M]`` int64: where each token stands in the flat column."""
    sizes: list[int]
    """Rows that have a token at each step, never rising: the longest rows come first."""


def pack(offsets: np.ndarray, limit: int = 1 << 20) -> Iterator[Packed]:
    """Cuts rows into batches of similar length.

    Args:
        offsets: Shape ``[R + 1]``: row r's tokens are ``offsets[r]:offsets[r + 1]`` of a flat column.
        limit: tokens that a batch may have, unless one row has more.
    """
    lengths = np.diff(offsets)
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    first = 0
    while first < len(order):
        rows = order[first : first + max(1, limit // int(lengths[order[first]]))]
        sizes = len(rows) - np.searchsorted(np.sort(lengths[rows]), np.arange(lengths[rows[0]]), "right")
        steps = np.repeat(np.arange(len(sizes)), sizes)
        rank = np.arange(len(steps)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield Packed(torch.from_numpy(offsets[rows[rank]] + steps), sizes.tolist())
        first += len(rows)


def predicted(evidence: Tensor, sizes: list[int], chain: Chain, backward: bool = False) -> Tensor:
    """Log odds of each token's state given the evidence of all tokens before it, or ``backward`` of all after it.

    With x the log odds of a token, its own evidence counted in, those of its neighbour are
    ``log(P01 + P11 e^x) - log(P00 + P10 e^x)``: one step of the forward recursion divided by its normaliser. The chain
    is reversible, so the same step serves the backward one.

    Args:
        evidence: Shape ``[M]``, log-likelihood ratios in the order of :class:`Packed`.
        sizes: as in :class:`Packed`.
        chain: how the state moves.
        backward: begin at the rows' ends.

    Returns:
        Shape ``[M]``, as ``evidence``.
    """
    stay_benign, to_harmful, to_benign, stay_harmful = (
        torch.tensor(value, dtype=evidence.dtype) for value in chain.log_transitions()
    )
    found = torch.full_like(evidence, chain.log_odds)
    stops = np.cumsum(sizes).tolist()
    steps = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    # rows that have both of two neighbouring tokens; a row that only begins or ends here keeps the prior
    pairs = [(now, after, after.stop - after.start) for now, after in pairwise(steps)]
    for now, after, rows in reversed(pairs) if backward else pairs:
        known, unknown = (after, now) if backward else (now, after)
        odds = found[known][:rows] + evidence[known][:rows]
        harmful, benign = (
            torch.logaddexp(to_harmful, stay_harmful + odds),
            torch.logaddexp(stay_benign, to_benign + odds),
        )
        torch.sub(harmful, benign, out=found[unknown][:rows])
    return found


class Counts(NamedTuple):
    """What a batch of rows says of the chain, in expectation over its hidden states."""

    log_odds: Tensor
    """Shape ``[M]``: posterior of each token, in the order of :class:`Packed`."""
    log_likelihood: float
    """Of the rows, less that of the same rows without any harm."""
    draws: float
    """How often the state was drawn: once at each row's beginning, and where it did not stay."""
    harmful_draws: float
    """How many of these were harmful."""


def posterior(evidence: Tensor, sizes: list[int], chain: Chain) -> Tensor:
    """Posterior log odds of each token given its whole row; Shape ``[M]``, as ``evidence``. Linear in M."""
    before, after = (predicted(evidence, sizes, chain, backward) for backward in (False, True))
    return before + evidence + after - chain.log_odds


def expected_counts(evidence: Tensor, sizes: list[int], chain: Chain) -> Counts:
    """The E step of EM for ``chain``; arguments as for :func:`predicted`."""
    before, after = (predicted(evidence, sizes, chain, backward) for backward in (False, True))
    odds = before + evidence + after - chain.log_odds
    harmful = torch.sigmoid(odds)
    _, to_harmful, to_benign, stay_harmful = chain.log_transitions()
    rows, second = sizes[0], torch.arange(sizes[0], len(evidence))
    steps = torch.tensor(sizes, dtype=torch.int64)
    first = second - steps[:-1].repeat_interleave(steps[1:])
    # P(this one and the next harmful) = P(this one) P(the next | this one, all that follows)
    follows = evidence[second] + after[second] - chain.log_odds
    both = harmful[first] * torch.sigmoid(stay_harmful - to_benign + follows)
    begins, ends = harmful[second] - both, harmful[first] - both
    neither = 1 - both - begins - ends
    drawn_harmful = begins.sum() + both.sum() * math.exp(to_harmful - stay_harmful)
    drawn_benign = ends.sum() + neither.sum() * math.exp(to_benign - chain.log_transitions()[0])
    starts = harmful[:rows].sum()
    likelihood = softplus(before + evidence) + logsigmoid(-before)
    return Counts(
        odds,
        float(likelihood.sum()),
        float(rows + drawn_harmful + drawn_benign),
        float(starts + drawn_harmful),
    )


class Fit(NamedTuple):
    """What EM found."""

    chain: Chain
    log_likelihoods: list[float]
    """Of the scores, before each M step and at the end; it never falls."""
    evidence: float
    """Log-likelihood of the scores, less that of the same scores if no token were harmful."""
    converged: bool


def fit(
    scores: Tensor,
    offsets: np.ndarray,
    start: Chain,
    free: Collection[str],
    tolerance: float = 1e-2,
    max_iterations: int = 500,
) -> Fit:
    """Fits parameters of the chain to scores without labels, by EM; every M step is in closed form.

    tau stays at 1 or above: a score is a log-likelihood ratio of two language models, and to read more into it than it
    says would be to claim that they are underconfident.

    Args:
        scores: Shape ``[tokens]`` float64.
        offsets: as in :func:`pack`.
        start: where EM begins; also the value of what is not fitted.
        free: fields of :class:`Chain` to fit.
        tolerance: EM ends when an iteration raises the log-likelihood, in nats, by less.
        max_iterations: EM ends after as many.
    """
    batches = list(pack(offsets))
    packed = [scores[batch.tokens] for batch in batches]
    rows = sum(batch.sizes[0] for batch in batches)
    moments = Moments(len(scores), float(scores.mean()), float(scores.var(correction=0)))
    chain, history = start, list[float]()
    while True:
        totals = _Totals()
        for batch, values in zip(batches, packed, strict=True):
            totals.add(expected_counts(chain.evidence(values), batch.sizes, chain), values)
        history.append(totals.evidence + moments.log_likelihood(chain))
        converged = len(history) > 1 and history[-1] - history[-2] < tolerance
        if converged or len(history) > max_iterations:
            return Fit(chain, history, totals.evidence, converged)
        if "stay" in free and moments.tokens > rows:
            chain = chain._replace(stay=min(1 - (totals.draws - rows) / (moments.tokens - rows), 1 - EDGE))
        if "prior" in free:
            chain = chain._replace(prior=min(max(totals.harmful_draws / totals.draws, EDGE), 1 - EDGE))
        chain = moments.likeliest(chain, totals, free)


class _Totals:
    """Sums over batches of what an M step needs."""

    def __init__(self) -> None:
        self.evidence = self.draws = self.harmful_draws = self.signs = self.agreement = 0.0

    def add(self, counts: Counts, scores: Tensor) -> None:
        """Adds a batch; ``signs`` and ``agreement`` are the sums of ``P(harmful) - P(benign)`` and of it times x."""
        sign = torch.tanh(counts.log_odds / 2)
        self.signs += float(sign.sum())
        self.agreement += float(sign @ scores)
        self.evidence += counts.log_likelihood
        self.draws += counts.draws
        self.harmful_draws += counts.harmful_draws


class Moments(NamedTuple):
    """What the law of the scores needs to know of them: how many there are, their mean and their variance."""

    tokens: int
    mean: float
    variance: float

    def square(self, centre: float) -> float:
        """Mean of ``(x - c)^2``, above 0."""
        return max(self.variance + (self.mean - centre) ** 2, SMALLEST)

    def log_likelihood(self, chain: Chain) -> float:
        """Of the scores, if no token were harmful and m were the likeliest for that chain."""
        square = self.square(chain.centre)
        # solves m^2 + 2 tau m = mean of (x - c)^2
        shift = square / (math.sqrt(chain.temperature**2 + square) + chain.temperature)
        variance = 2 * shift * chain.temperature
        apart = square + 2 * shift * (self.mean - chain.centre) + shift**2
        return -self.tokens / 2 * (math.log(2 * math.pi * variance) + apart / variance)

    def likeliest(self, chain: Chain, totals: _Totals, free: Collection[str]) -> Chain:
        """The M step of tau and c, as far as they are free; tau in its bounds."""
        sign, agreement = totals.signs / self.tokens, totals.agreement / self.tokens
        if "centre" not in free:
            along, spread = agreement - sign * chain.centre, self.square(chain.centre)
            if "temperature" in free:
                chain = chain._replace(temperature=_temperature(along, spread - along**2))
            return chain
        # with c = mean - m sign, what is left of m and tau is as above, in scores less their mean
        rest = max(1 - sign**2, EDGE)
        along, variance = (agreement - sign * self.mean) / rest, max(self.variance, SMALLEST)
        if "temperature" in free:
            chain = chain._replace(temperature=_temperature(along, variance - rest * along**2))
        shift = variance / (math.sqrt(chain.temperature**2 + rest * variance) + chain.temperature)
        return chain._replace(centre=self.mean - shift * sign)


def _temperature(shift: float, variance: float) -> float:
    """tau of ``variance = 2 m tau``, in its bounds."""
    return min(max(variance / (2 * shift), 1.0), WEAKEST) if shift > 0 else WEAKEST
