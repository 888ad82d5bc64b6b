"""How tables write numbers."""

import math

import pytest

from toss_lightning.evaluation.cells import difference, interval, number


@pytest.mark.parametrize(
    ("low", "value", "high", "written"),
    [
        (0.43, 0.45, 0.47, "45% [43%, 47%]"),
        # of 14 thousand questions
        (0.445, 0.453, 0.461, "45.3% [44.5%, 46.1%]"),
        (1.0, 1.0, 1.0, "100% [100%, 100%]"),
        (None, 0.5, None, "50%"),
    ],
)
def test_an_interval_of_shares(low: float | None, value: float, high: float | None, written: str) -> None:
    assert interval({"low": low, "value": value, "high": high, "undecided": 0}, True) == written


def test_no_difference_of_shares_goes_beyond_all_of_them() -> None:
    assert difference({"mean": 0.67, "low": 0.06, "high": 1.27}, True) == "+67% [+6%, +100%]"
    assert difference({"mean": 0.67, "low": 0.06, "high": 1.27}, False) == "+0.670 [+0.060, +1.270]"
    assert difference({"mean": -0.004, "low": -0.009, "high": 0.001}, True) == "−0.4% [−0.9%, +0.1%]"


@pytest.mark.parametrize(
    ("value", "share", "sign", "written"),
    [
        (0.25, True, False, "25%"),
        (-0.25, True, True, "−25%"),
        (1.5, False, True, "+1.500"),
        (math.inf, False, False, "∞"),
        (-math.inf, True, False, "−∞"),
        (math.nan, False, False, "–"),
    ],
)
def test_a_number(value: float, share: bool, sign: bool, written: str) -> None:
    assert number(value, share, sign) == written
