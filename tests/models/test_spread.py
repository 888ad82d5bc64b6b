"""Weights that are nearly equal, against numpy's mean and standard deviation."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from toss_lightning.models.spread import Spread
from toss_lightning.selection.dr_sft import DrSft


def spread_of(*weights: torch.Tensor) -> Spread:
    spread = Spread()
    for some in weights:
        spread.add(some)
    return spread


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("deviation", "narrow"), [(0.0005, True), (0.008, True), (0.012, False), (0.5, False)])
def test_what_is_narrow_is_a_standard_deviation_below_a_hundredth_of_the_mean(
    scale: float, deviation: float, narrow: bool
) -> None:
    drawn = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (scale * (1 + deviation * (drawn - drawn.mean()) / drawn.std(correction=0))).float()
    spread = spread_of(*weights.split(700))
    assert (weights.numpy().std() < 0.01 * weights.numpy().mean()) == narrow
    assert (spread.narrow is not None) == narrow
    assert spread.count == 5000
    assert spread.total / spread.count == pytest.approx(weights.double().mean().item(), rel=1e-12)
    if narrow:
        mean, deviated = spread.narrow.removeprefix("nearly the same weight, ").split(" ± ")
        assert float(mean) == pytest.approx(scale, rel=1e-2)
        assert float(deviated) == pytest.approx(scale * deviation, rel=0.25), "one digit of it is said"


def test_equal_weights_are_said_to_be_equal_and_a_mask_is_none() -> None:
    assert spread_of(torch.full((7,), 0.1), torch.full((90_001,), 0.1)).narrow == "the same weight (0.1)"
    assert spread_of(torch.ones(3)).narrow == "the same weight (1)"
    assert spread_of(torch.ones(9), torch.zeros(1)).narrow is None
    assert spread_of(torch.zeros(9)).narrow is None
    assert spread_of().narrow is spread_of(torch.ones(0)).narrow is None


def test_a_degraded_reference_that_is_the_base_weighs_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    base, target = (4 * torch.rand(500, generator=generator) for _ in range(2))
    weights = DrSft().weigh(target, {"loss_base": base, "loss_degraded": base})
    assert weights.min() < weights.max(), "they are not equal"
    assert spread_of(weights).narrow.startswith("nearly the same weight, 1 ± 0.000")
    told_apart = DrSft().weigh(target, {"loss_base": base, "loss_degraded": base - 1.0 * (base > 2)})
    assert spread_of(told_apart).narrow is None


def test_sums_go_on_exactly_from_where_they_were() -> None:
    weights = [torch.from_numpy(np.random.default_rng(seed).random(33).astype(np.float32)) for seed in range(6)]
    whole, half = spread_of(*weights), spread_of(*weights[:3])
    again = Spread(**asdict(half))
    for some in weights[3:]:
        again.add(some)
    assert asdict(again) == asdict(whole)
