"""How tables write numbers."""

import math

import pytest

from toss_lightning.evaluation.cells import number


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
