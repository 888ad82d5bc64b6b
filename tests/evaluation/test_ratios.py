"""Fieller's interval against the test that it inverts, the paired t-interval, and how often it holds."""

import math

import numpy as np
import pytest
from scipy import stats

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.ratios import Ratio, ratio_over_seeds


@pytest.mark.parametrize("seeds", [2, 3, 5, 40])
def test_the_interval_holds_what_students_test_does_not_refuse(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    theirs = draw.normal(3, 0.2, seeds)
    ours = 0.5 * theirs + draw.normal(0.6, 0.3, seeds)
    found = ratio_over_seeds(ours, theirs)
    assert found.ratio == pytest.approx(ours.mean() / theirs.mean())
    for end in (found.low, found.high):
        assert stats.ttest_1samp(ours - end * theirs, 0).pvalue == pytest.approx(0.05, rel=1e-3)
    for inside in np.linspace(found.low, found.high, 12)[1:-1]:
        assert stats.ttest_1samp(ours - inside * theirs, 0).pvalue > 0.05
    for outside in (found.low - 0.1, found.high + 0.1):
        assert stats.ttest_1samp(ours - outside * theirs, 0).pvalue < 0.05


def test_over_what_does_not_vary_it_is_students_interval() -> None:
    ours = np.array([1.0, 1.4, 0.9, 1.2])
    low, high = stats.t.interval(0.95, 3, ours.mean(), stats.sem(ours))
    found = ratio_over_seeds(ours, [2.0] * 4)
    assert (found.ratio, found.low, found.high) == pytest.approx((ours.mean() / 2, low / 2, high / 2), rel=1e-5)


@pytest.mark.parametrize("seeds", [3, 5])
def test_it_holds_as_often_as_it_says(seeds: int) -> None:
    """The noise of a baseline is in both: ours - baseline over theirs - baseline, as of the share of a gap."""
    draw, held, draws = np.random.default_rng(0), np.zeros(2), 2000
    for _ in range(draws):
        baseline, method, oracle = draw.normal([[0.8], [0.35], [0.2]], 0.05, (3, seeds))
        ours, theirs = method - baseline, oracle - baseline
        found = ratio_over_seeds(ours, theirs)
        drawn = draw.integers(seeds, size=(500, seeds))
        low, high = np.quantile(ours[drawn].mean(1) / theirs[drawn].mean(1), [0.025, 0.975])
        held += [found.low <= 0.75 <= found.high, low <= 0.75 <= high]
    fieller, bootstrap = held / draws
    assert fieller == pytest.approx(0.95, abs=0.012)
    assert bootstrap < 0.88


def test_a_second_mean_that_may_be_zero_leaves_it_open() -> None:
    assert ratio_over_seeds([1.0, 1.1, 0.9], [1.0, -0.5, 0.4]) == Ratio(pytest.approx(10 / 3), -math.inf, math.inf)
    assert ratio_over_seeds([1.0, 2.0], [1.0, -1.0]).ratio is None


def test_one_seed_has_a_ratio_alone() -> None:
    assert ratio_over_seeds([1.0], [4.0]) == Ratio(0.25, -math.inf, math.inf)


def test_a_ratio_that_every_seed_shows_is_a_point() -> None:
    found = ratio_over_seeds([1.0, 1.1, 1.2], [2.0, 2.2, 2.4])
    assert (found.low, found.high) == pytest.approx((0.5, 0.5), abs=1e-6)


def test_what_is_no_pair_of_seeds() -> None:
    for ours, theirs in (([1.0], [1.0, 2.0]), ([], []), ([math.nan], [1.0])):
        with pytest.raises(ConfigError, match=r"ratio_over_seeds: shapes .* give both for the same seeds"):
            ratio_over_seeds(ours, theirs)
