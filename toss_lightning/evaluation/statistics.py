"""What of a difference between runs is more than noise: intervals and p-values over prompts, seeds and judges.

Letters in shapes: S seeds, P prompts.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.student import Student

BLOCK = 1 << 20
"""Values that are drawn at once."""
ROUNDING = 1e-12
"""Share of the values below which a difference is one of rounding."""

Values = Sequence[float | None] | np.ndarray
Table = Sequence[Sequence[float | None]] | np.ndarray


@dataclass(frozen=True, slots=True)
class Interval:
    """A share, and between what it may lie."""

    share: float | None
    """None where nothing was counted."""
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, and between what it may lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, between what it may lie, and how often chance alone would give one as large."""

    mean: float
    """Ours minus theirs."""
    low: float
    high: float
    p: float
    """Two-sided."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two judges agree beyond chance."""

    kappa: float | None
    """None where both always say the same one thing, or decide nothing together."""
    low: float
    high: float
    share: float | None
    """Of the responses that both decide, those of which they say the same."""
    decided: int
    """Responses that both decide."""
    undecided: int
    """Responses left out, for at least one does not decide."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (1927) of a share, which holds at 0 of n and at n of n too.

    With ``z`` the normal quantile and ``p = successes / n``::

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    The n must be independent: the prompts of one run, not those of several seeds together.

    Raises:
        ConfigError: no such share or confidence.
    """
    if not 0 <= successes <= n:
        raise ConfigError(f"wilson: {successes} of {n} is not a share: give 0 <= successes <= n")
    z = NormalDist().inv_cdf((1 + _level(confidence)) / 2)
    if n == 0:
        return Interval(None, 0.0, 1.0)
    p = successes / n
    middle = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)
    # rounding must not put an end of the range outside, or an observed 0 or 1 outside of its own interval
    return Interval(p, 0.0 if successes == 0 else low, 1.0 if successes == n else high)


def t_interval(values: Values, confidence: float = 0.95, bounded: bool = False) -> Mean:
    """Student's interval of a mean over seeds; one seed alone says nothing, and has an infinite one.

    Args:
        values: one for each seed.
        confidence: how often such an interval holds the mean.
        bounded: values lie between 0 and 1, where the interval, which does not know that by itself, then ends.

    Raises:
        ConfigError: a value is missing, or there is none.
    """
    seeds = _numbers("t_interval", values)
    if not len(seeds):
        raise ConfigError("t_interval: no values: give one per seed")
    mean, level = float(seeds.mean()), _level(confidence)
    if len(seeds) == 1:
        return Mean(mean, -math.inf, math.inf)
    reach = Student(len(seeds) - 1).quantile(level) * float(seeds.std(ddof=1)) / math.sqrt(len(seeds))
    low, high = mean - reach, mean + reach
    return Mean(mean, max(0.0, low), min(1.0, high)) if bounded else Mean(mean, low, high)


def paired_difference(
    ours: Values, theirs: Values, draws: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Difference:
    """Mean difference of two runs on the same prompts, and whether it is noise of these prompts.

    The interval is the percentile interval of the bootstrap over prompts. The p-value is that of the sign-flip
    permutation test, ``(1 + draws at least as extreme) / (1 + draws)``; of yes-or-no values it is McNemar's exact test
    up to the draws. Both speak of these two runs: what another training seed would have given is no part of them.

    Where no pair differs the interval is a point, which says too much: look at the two shares' own intervals.

    Args:
        ours: Shape ``[P]``: one value per prompt; bools count as 0 and 1.
        theirs: Shape ``[P]``: of the same prompts in the same order.
        draws: of the bootstrap, and of the permutation test.
        seed: of both.
        confidence: of the interval.

    Raises:
        ConfigError: shapes differ, a value is missing, or there are fewer than two prompts.
    """
    left, right = _numbers("ours", ours), _numbers("theirs", theirs)
    if left.shape != right.shape or left.ndim != 1 or len(left) < 2:
        raise ConfigError(
            f"paired_difference: shapes {left.shape} and {right.shape} are not pairs:"
            " give both the same 2 or more prompts"
        )
    difference, level, generator = left - right, _level(confidence), np.random.default_rng(seed)
    count, total = len(difference), float(difference.sum())

    def resampled(size: int) -> np.ndarray:
        return difference[generator.integers(count, size=(size, count))].mean(1)

    def flipped(size: int) -> np.ndarray:
        return total - 2 * (generator.integers(2, size=(size, count), dtype=np.int8) @ difference)

    low, high = np.quantile(_drawn(resampled, draws, count), [(1 - level) / 2, (1 + level) / 2])
    # sums that are equal on paper may differ by rounding
    extreme = np.abs(_drawn(flipped, draws, count)) >= abs(total) - 1e-9 * float(np.abs(difference).sum())
    return Difference(total / count, float(low), float(high), (1 + int(extreme.sum())) / (1 + draws))


def paired_difference_over_seeds(ours: Table, theirs: Table, confidence: float = 0.95) -> Difference:
    """Mean difference of two methods, several seeds each on the same prompts: would other seeds and prompts show it?

    Seeds and prompts are both taken as drawn at random: the two-way analysis of variance that compares readers of the
    same cases (Dorfman, Berbaum and Metz, 1992; Hillis, 2007). With the mean squares ``MS`` of the ``[S, P]``
    differences for seeds, for prompts and for the rest::

        var(mean) = (MS_rest + max(MS_seeds - MS_rest, 0) + max(MS_prompts - MS_rest, 0)) / S P
        df        = (S P var)^2 / (MS_seeds^2 / (S - 1) + MS_prompts^2 / (P - 1))       (Satterthwaite)

    (df being at least that of the smaller of the two, ``min(S, P) - 1``, for the formula leaves out MS_rest)
    and interval and p-value are Student's; where nothing varies, the p-value is that of flipping the signs of the
    prompts, ``2^(1 - P)``. With two or three seeds the interval is somewhat too narrow, though less than that of
    resampling seeds and prompts (Owen's pigeonhole bootstrap, 2007);
    flipping signs by seed has no p-value below ``2^(1 - S)``.

    Args:
        ours: Shape ``[S, P]``: row s is a run with seed s; bools count as 0 and 1.
        theirs: Shape ``[S, P]``: the same seeds and prompts in the same order; or ``[1, P]``, as of the base.
        confidence: of the interval.

    Raises:
        ConfigError: shapes do not fit, a value is missing, or there are fewer than two seeds or prompts.
    """
    left, right = _numbers("ours", ours), _numbers("theirs", theirs)
    if left.ndim != 2 or min(left.shape) < 2 or right.shape not in (left.shape, (1, *left.shape[1:])):
        raise ConfigError(
            f"paired_difference_over_seeds: shapes {left.shape} and {right.shape} are not seeds x prompts of both:"
            " give 2 or more seeds of the same 2 or more prompts"
        )
    difference, level = left - right, _level(confidence)
    # what is 0 on paper may not be so by rounding
    difference[np.abs(difference) <= ROUNDING * max(np.abs(left).max(), np.abs(right).max())] = 0.0
    seeds, prompts = difference.shape
    mean = float(difference.mean())
    negligible = (ROUNDING * float(np.abs(difference).max())) ** 2
    of_seeds, of_prompts = difference.mean(1, keepdims=True) - mean, difference.mean(0, keepdims=True) - mean
    rest = float(((difference - mean - of_seeds - of_prompts) ** 2).sum()) / ((seeds - 1) * (prompts - 1))
    by_seed = prompts * float((of_seeds**2).sum()) / (seeds - 1)
    by_prompt = seeds * float((of_prompts**2).sum()) / (prompts - 1)
    squares = rest + max(by_seed - rest, 0) + max(by_prompt - rest, 0)
    if squares <= negligible:
        return Difference(mean, mean, mean, 2.0 ** (1 - prompts) if mean else 1.0)
    # where neither seeds nor prompts differ on their own, there is nothing to combine
    under = by_seed**2 / (seeds - 1) + by_prompt**2 / (prompts - 1)
    student = Student(max(squares**2 / under if under > negligible**2 else 0.0, min(seeds, prompts) - 1))
    error = math.sqrt(squares / (seeds * prompts))
    reach = student.quantile(level) * error
    return Difference(mean, mean - reach, mean + reach, student.p(mean / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: those below ``a`` hold together with error at most ``a``.

    The i-th smallest of m becomes ``(m - i + 1) p``, at least as large as the one before, at most 1.

    Raises:
        ConfigError: a p-value is missing or outside [0, 1].
    """
    values = _numbers("holm", p_values)
    if ((values < 0) | (values > 1)).any():
        raise ConfigError("holm: a p-value is outside [0, 1]: give probabilities")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


def kappa(
    first: Sequence[bool | None],
    second: Sequence[bool | None],
    groups: Sequence[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Agreement:
    """Cohen's kappa (1960) of two judges over the responses that both decide, with its percentile interval.

    ``(agreement - chance) / (1 - chance)``, chance being the agreement of two judges who say yes as often as these two
    and know nothing of the responses. Draws in which both always say the same one thing have no kappa and are left out.

    Args:
        first: one verdict per response, None where the judge does not decide.
        second: of the same responses in the same order.
        groups: what each response belongs to, such as its prompt, where some belong together and are drawn together.
        draws: of the bootstrap.
        seed: of the bootstrap.
        confidence: of the interval.

    Raises:
        ConfigError: the judges judged different numbers of responses.
    """
    groups = range(len(first)) if groups is None else groups
    if not len(first) == len(second) == len(groups):
        raise ConfigError(
            f"kappa: {len(first)} and {len(second)} verdicts in {len(groups)} groups: give all of the same responses"
        )
    by_group: dict[Hashable, list[int]] = {}
    for group, a, b in zip(groups, first, second, strict=True):
        if a is not None and b is not None:
            by_group.setdefault(group, [0, 0, 0, 0])[2 * (not a) + (not b)] += 1
    counts, level = np.array([*by_group.values()], dtype=np.int64).reshape(-1, 4), _level(confidence)
    cells, count = counts.sum(0), int(counts.sum())
    undecided = len(first) - count
    value = float(_kappas(cells)) if count else math.nan
    share = float(cells[0] + cells[3]) / count if count else None
    if math.isnan(value):
        return Agreement(None, -1.0, 1.0, share, count, undecided)
    # groups enter by their counts alone, so that drawing them is drawing how often each kind of counts comes
    kinds, often = np.unique(counts, axis=0, return_counts=True)
    drawn = _kappas(np.random.default_rng(seed).multinomial(len(counts), often / len(counts), draws) @ kinds)
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Agreement(value, float(low), float(high), share, count, undecided)


def _kappas(cells: np.ndarray) -> np.ndarray:
    """Kappa of counts ``[..., 4]`` of yes-yes, yes-no, no-yes and no-no; NaN where chance agreement is full."""
    shares = cells / cells.sum(-1, keepdims=True)
    first, second = shares[..., 0] + shares[..., 1], shares[..., 0] + shares[..., 2]
    # 1 - chance, exactly 0 where one cell holds all
    beyond = first * (1 - second) + (1 - first) * second
    return 1 - np.divide(shares[..., 1] + shares[..., 2], beyond, out=np.full_like(beyond, np.nan), where=beyond > 0)


def _drawn(draw: Callable[[int], np.ndarray], draws: int, count: int) -> np.ndarray:
    """``draws`` results of ``draw``, each of ``count`` values, no more than ``BLOCK`` values at a time."""
    size = max(1, BLOCK // count)
    return np.concatenate([draw(min(size, draws - at)) for at in range(0, draws, size)])


def _numbers(name: str, values: Values | Table) -> np.ndarray:
    """As float64, all there and finite."""
    array = np.asarray(values, dtype=np.float64)
    missing = int((~np.isfinite(array)).sum())
    if missing:
        raise ConfigError(
            f"{name}: {missing} of {array.size} values are missing: leave them out on both sides, and count them"
        )
    return array


def _level(confidence: float) -> float:
    """The confidence itself, if it is one."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: {confidence} is not between 0 and 1: give 0.95, say")
    return confidence
