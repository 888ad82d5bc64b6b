"""Intervals and p-values, against SciPy, scikit-learn, closed forms, and how often they hold in simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation import statistics
from toss_lightning.evaluation.statistics import (
    Agreement,
    Difference,
    Interval,
    Mean,
    holm,
    kappa,
    paired_difference,
    paired_difference_over_seeds,
    t_interval,
    wilson,
)
from toss_lightning.evaluation.student import Student


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 50), (1, 7), (33, 100), (50, 50), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(successes: int, n: int, confidence: float) -> None:
    wanted = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    got = wilson(successes, n, confidence)
    assert got.share == successes / n
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert 0 <= got.low <= got.share <= got.high <= 1


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson(0, 0) == Interval(None, 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"wilson: 3 of 2 is not a share: give 0 <= successes <= n"):
        wilson(3, 2)
    with pytest.raises(ConfigError, match=r"confidence: 95 is not between 0 and 1: give 0.95, say"):
        wilson(1, 2, confidence=95)


@pytest.mark.parametrize("n", [2, 3, 5, 30, 4000])
def test_t_interval_equals_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    got = t_interval(values)
    assert (got.mean, got.low, got.high) == pytest.approx((values.mean(), low, high), rel=1e-5)


def test_t_interval_of_one_seed_and_of_none() -> None:
    assert t_interval([2.0]) == Mean(2.0, -math.inf, math.inf)
    with pytest.raises(ConfigError, match="t_interval: no values: give one per seed"):
        t_interval([])


@pytest.mark.parametrize("freedom", [1.0, 1.3, 2.0, 2.7, 8.5, 120.0, 9000.0])
def test_students_tail_and_quantile_equal_scipy(freedom: float) -> None:
    student = Student(freedom)
    for t in (0.0, 0.3, -1.96, 4.0, 7.0):
        assert student.p(t) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=2e-3)
    for level in (0.5, 0.9, 0.95, 0.99):
        assert student.quantile(level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-3)


def two_runs(count: int, seed: int = 0, gain: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    theirs = generator.normal(size=count)
    return theirs + gain + generator.normal(size=count), theirs


def test_the_interval_equals_scipys_bootstrap_up_to_the_draws() -> None:
    ours, theirs = two_runs(80)
    wanted = stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    got = paired_difference(ours, theirs, draws=20_000)
    assert got.mean == pytest.approx((ours - theirs).mean(), abs=1e-12)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=0.01)


@pytest.mark.parametrize("gain", [0.0, 0.15, 0.6])
def test_the_p_value_equals_scipys_permutation_test_up_to_the_draws(gain: float) -> None:
    ours, theirs = two_runs(60, 3, gain)
    wanted = stats.permutation_test(
        (ours, theirs), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", vectorized=True,
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert paired_difference(ours, theirs, draws=20_000).p == pytest.approx(wanted, abs=0.012)


def test_the_p_value_equals_a_double_loop_over_all_signs() -> None:
    ours, theirs = two_runs(9, 5)
    difference = ours - theirs
    sums = [
        abs(sum(s * d for s, d in zip(signs, difference, strict=True)))
        for signs in itertools.product((1, -1), repeat=9)
    ]
    exact = np.mean([value >= abs(difference.sum()) - 1e-12 for value in sums])
    assert paired_difference(ours, theirs, draws=50_000).p == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(12, 3), (5, 5), (0, 4), (30, 22)])
def test_of_yes_or_no_values_the_p_value_is_mcnemars(only_ours: int, only_theirs: int) -> None:
    same = [True] * 20 + [False] * 30
    ours = same + [True] * only_ours + [False] * only_theirs
    theirs = same + [False] * only_ours + [True] * only_theirs
    wanted = stats.binomtest(only_ours, only_ours + only_theirs).pvalue
    assert paired_difference(ours, theirs, draws=20_000).p == pytest.approx(wanted, abs=0.012)


def test_differences_that_are_equal_on_paper_count_as_equal() -> None:
    """0.1 + 0.2 - 0.3 is not 0: all signs alike happens for 2 of 2^3 draws."""
    got = paired_difference([0.1, 0.2, 0.3], [0.0, 0.0, 0.0], draws=20_000)
    assert got.p == pytest.approx(0.25, abs=0.012)
    assert paired_difference([1, 0, 1], [1, 0, 1]) == Difference(0.0, 0.0, 0.0, 1.0)


def test_memory_is_bounded_and_draws_are_all_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 100)
    sizes: list[int] = []

    def draw(size: int) -> np.ndarray:
        sizes.append(size)
        return np.zeros(size)

    assert len(statistics._drawn(draw, 25, 10)) == 25
    assert sizes == [10, 10, 5]
    assert len(statistics._drawn(draw, 3, 1000)) == 3


def test_the_same_seed_gives_the_same_numbers() -> None:
    ours, theirs = two_runs(40)
    assert paired_difference(ours, theirs, 500, seed=7) == paired_difference(ours, theirs, 500, seed=7)
    assert paired_difference(ours, theirs, 500, seed=7) != paired_difference(ours, theirs, 500, seed=8)


def test_the_interval_over_prompts_holds_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = rejected = 0
    for _ in range(400):
        hard = generator.random(60)
        ours, theirs = generator.random(60) < 0.5 * hard, generator.random(60) < 0.9 * hard
        got = paired_difference(ours, theirs, draws=500)
        held += got.low <= -0.2 <= got.high
        rejected += paired_difference(ours, generator.random(60) < 0.5 * hard, draws=500).p <= 0.05
    assert 0.91 <= held / 400 <= 0.98
    assert rejected / 400 <= 0.08


def seeds_and_prompts(generator: np.random.Generator, seeds: int, spread: float) -> np.ndarray:
    """Differences of mean 0.2 ``[S, 40]``."""
    noise = generator.normal(0, 0.4, (seeds, 40))
    return 0.2 + generator.normal(0, spread, (seeds, 1)) + generator.normal(0, 0.3, (1, 40)) + noise


@pytest.mark.parametrize(("seeds", "at_least"), [(2, 0.86), (3, 0.9), (5, 0.92)])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_the_interval_over_seeds_and_prompts_holds_as_often_as_it_says(
    seeds: int, at_least: float, spread: float
) -> None:
    generator, zeros = np.random.default_rng(seeds), np.zeros((1, 40))
    found = [paired_difference_over_seeds(seeds_and_prompts(generator, seeds, spread), zeros) for _ in range(300)]
    assert np.mean([got.low <= 0.2 <= got.high for got in found]) >= at_least
    # interval and p-value are of one distribution
    assert all((got.p < 0.05) == (not got.low <= 0 <= got.high) for got in found)


def test_resampling_would_hold_far_less_often_where_seeds_differ() -> None:
    generator = np.random.default_rng(0)
    by_prompt = by_both = 0
    for _ in range(200):
        difference = seeds_and_prompts(generator, 3, 0.5)
        got = paired_difference(difference.mean(0), np.zeros(40), draws=300)
        by_prompt += got.low <= 0.2 <= got.high
        seeds, prompts = (
            generator.multinomial(3, [1 / 3] * 3, 300) / 3,
            generator.multinomial(40, [1 / 40] * 40, 300) / 40,
        )
        low, high = np.quantile(((seeds @ difference) * prompts).sum(1), [0.025, 0.975])
        by_both += low <= 0.2 <= high
    assert by_prompt / 200 < 0.6
    assert by_both / 200 < 0.85


def test_seeds_that_all_agree_leave_the_t_test_over_prompts() -> None:
    difference = np.random.default_rng(0).normal(0.1, 1, 50)
    got = paired_difference_over_seeds(np.stack([difference] * 3), np.zeros((3, 50)))
    wanted = stats.ttest_1samp(difference, 0)
    interval = wanted.confidence_interval(0.95)
    assert (got.mean, got.low, got.high, got.p) == pytest.approx(
        (difference.mean(), interval.low, interval.high, wanted.pvalue), rel=1e-4
    )


def test_prompts_that_all_agree_leave_the_t_test_over_seeds() -> None:
    seeds = np.array([0.3, 0.1, 0.4])
    got = paired_difference_over_seeds(np.stack([seeds] * 20, axis=1), np.zeros((1, 20)))
    wanted = stats.ttest_1samp(seeds, 0)
    interval = wanted.confidence_interval(0.95)
    assert (got.low, got.high, got.p) == pytest.approx((interval.low, interval.high, wanted.pvalue), rel=1e-4)


def test_mean_squares_equal_a_double_loop() -> None:
    difference = seeds_and_prompts(np.random.default_rng(4), 4, 0.3)
    seeds, prompts = difference.shape
    mean = difference.mean()
    by_seed = sum(prompts * (row.mean() - mean) ** 2 for row in difference) / (seeds - 1)
    by_prompt = sum(seeds * (column.mean() - mean) ** 2 for column in difference.T) / (prompts - 1)
    rest = sum(
        (difference[s, p] - difference[s].mean() - difference[:, p].mean() + mean) ** 2
        for s in range(seeds) for p in range(prompts)
    ) / ((seeds - 1) * (prompts - 1))  # fmt: skip
    assert min(by_seed, by_prompt) > rest
    squares = by_seed + by_prompt - rest
    freedom = squares**2 / (by_seed**2 / (seeds - 1) + by_prompt**2 / (prompts - 1))
    error = math.sqrt(squares / seeds / prompts)
    got = paired_difference_over_seeds(difference, np.zeros_like(difference))
    reach = stats.t.ppf(0.975, freedom) * error
    assert (got.low, got.high) == pytest.approx((mean - reach, mean + reach), rel=1e-4)
    assert got.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, freedom), rel=1e-3)


def test_differences_that_never_vary() -> None:
    zeros = [[0.0] * 3] * 2
    assert paired_difference_over_seeds(zeros, zeros) == Difference(0.0, 0.0, 0.0, 1.0)
    # by the signs of three prompts no p-value is lower
    assert paired_difference_over_seeds([[True] * 3] * 2, zeros) == Difference(1.0, 1.0, 1.0, 0.25)


def test_differences_of_rounding_are_none() -> None:
    ours, theirs = np.full((3, 6), 0.1 + 0.2), np.full((3, 6), 0.3)
    assert (ours != theirs).all()
    assert paired_difference_over_seeds(ours, theirs) == Difference(0.0, 0.0, 0.0, 1.0)
    ours[0, 0] += 1.0
    assert paired_difference_over_seeds(ours, theirs).mean == pytest.approx(1 / 18)


def test_seeds_and_prompts_that_are_the_same_on_average() -> None:
    ours = np.zeros((2, 30))
    ours[0, 3], ours[0, 7], ours[1, 3], ours[1, 7] = 1, -1, -1, 1
    got = paired_difference_over_seeds(ours, np.zeros((2, 30)))
    reach = stats.t.ppf(0.975, 1) * math.sqrt(4 / 29 / 60)
    assert (got.mean, got.low, got.high, got.p) == pytest.approx((0, -reach, reach, 1), rel=1e-3)


def test_values_that_are_missing_or_no_pairs() -> None:
    with pytest.raises(
        ConfigError, match="ours: 2 of 3 values are missing: leave them out on both sides, and count them"
    ):
        paired_difference([1, None, math.nan], [1, 2, 3])
    with pytest.raises(
        ConfigError, match=r"shapes \(2,\) and \(3,\) are not pairs: give both the same 2 or more prompts"
    ):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ConfigError, match="not pairs"):
        paired_difference([1], [2])
    with pytest.raises(
        ConfigError, match=r"shapes \(1, 2\) and \(1, 2\) are not seeds x prompts of both: give 2 or more"
    ):
        paired_difference_over_seeds([[1, 2]], [[1, 2]])
    with pytest.raises(ConfigError, match="not seeds x prompts"):
        paired_difference_over_seeds(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ConfigError, match="theirs: 1 of 4 values are missing"):
        paired_difference_over_seeds(np.zeros((2, 2)), [[1, 2], [None, 4]])


def test_holm_equals_the_step_down_of_its_definition() -> None:
    # the table of Holm's procedure worked by hand
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    values = np.random.default_rng(0).random(7) ** 3
    adjusted = holm(values.tolist())
    for level in (0.01, 0.05, 0.2):
        rejected, left = set(), sorted(range(7), key=lambda i: values[i])
        while left and values[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i in range(7) if adjusted[i] <= level} == rejected


@pytest.mark.parametrize("value", [-0.1, 1.2])
def test_holm_of_what_is_no_probability(value: float) -> None:
    with pytest.raises(ConfigError, match=r"holm: a p-value is outside \[0, 1\]"):
        holm([0.5, value])


def two_judges(count: int = 150) -> tuple[list[bool | None], list[bool | None]]:
    generator = np.random.default_rng(2)
    first = generator.random(count) < 0.3
    second = np.where(generator.random(count) < 0.15, ~first, first)
    return [bool(said) for said in first], [bool(said) for said in second]


def test_kappa_equals_scikit_learn_and_its_interval_scipys_bootstrap() -> None:
    first, second = two_judges()
    got = kappa([*first, None, True, None], [*second, True, None, None])
    assert got.kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert got.share == pytest.approx(np.mean(np.array(first) == np.array(second)))
    assert (got.decided, got.undecided) == (150, 3)
    wanted = stats.bootstrap(
        (np.array(first), np.array(second)), cohen_kappa_score, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=0.03)


def test_kappa_draws_together_what_belongs_together() -> None:
    generator = np.random.default_rng(2)
    first = generator.random(40) < 0.4
    second = first ^ (generator.random(40) < 0.2)
    alone = kappa(first.tolist(), second.tolist())
    # the same replies of three adapters say no more than those of one
    thrice = [np.tile(one, 3).tolist() for one in (first, second)]
    together = kappa(*thrice, groups=[*range(40)] * 3)
    assert together.kappa == pytest.approx(alone.kappa)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=0.03)
    apart = kappa(*thrice)
    assert apart.high - apart.low < 0.7 * (alone.high - alone.low)
    with pytest.raises(ConfigError, match="3 and 3 verdicts in 2 groups"):
        kappa([True] * 3, [False] * 3, groups=["a", "b"])


def test_kappa_of_opposites_of_equals_and_of_chance() -> None:
    said = [True, False] * 50
    assert kappa(said, said).kappa == 1
    assert kappa(said, [not value for value in said]).kappa == -1
    assert kappa(said, [True, True, False, False] * 25).kappa == 0


def test_kappa_where_there_is_none() -> None:
    assert kappa([True] * 4, [True] * 4) == Agreement(None, -1.0, 1.0, 1.0, 4, 0)
    assert kappa([None, True], [True, None]) == Agreement(None, -1.0, 1.0, None, 0, 2)
    with pytest.raises(ConfigError, match="kappa: 1 and 2 verdicts in 1 groups: give all of the same"):
        kappa([True], [True, False])
