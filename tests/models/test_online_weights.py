"""What an objective notes about the weights that an online selection makes in training."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from toss_lightning.models.objective import Objective


class Weighs:
    """Weighs tokens by a function of their losses."""

    whole_step = False

    def __init__(self, weigh: Any) -> None:
        self._weigh = weigh

    def weigh(self, losses: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        return self._weigh(losses)


class Model:
    """Has the losses that it is given."""

    anchor_top = None
    device = torch.device("cpu")
    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums))

    def __init__(self, losses: Tensor) -> None:
        self.given = losses

    def losses_and_divergence(self, batch: dict[str, Any], kept: Tensor, *anchors: Any) -> tuple[Tensor, Tensor]:
        return self.given[kept], self.given.new_zeros(0)

    def check_finite(self, losses: Tensor, rows: Tensor) -> None:
        pass


def train(objective: Objective, steps: range) -> Objective:
    """Steps of three rows, the last of which the selection does not speak of."""
    for step in steps:
        losses = torch.rand(12, generator=torch.Generator().manual_seed(step)) * 5
        batch = {
            "row": torch.arange(3).repeat_interleave(4),
            "index": torch.arange(3),
            "selected": torch.tensor([True, True, False]),
            "weight": torch.ones(12),
            "step_tokens": 12.0,
        }
        model = Model(losses)
        objective.loss(model, batch)
        objective.end_step(model)
    return objective


@pytest.mark.parametrize(
    ("weigh", "said"),
    [
        (lambda losses: 1 - 2e-4 * losses, "nearly the same weight, 1 ± 0.0003"),
        (lambda losses: torch.full_like(losses, 0.5), "the same weight (0.5)"),
        (lambda losses: losses / 5, None),
        (lambda losses: (losses > 1).float(), None),
        # each step by itself is even, and the steps are not
        (lambda losses: torch.full_like(losses, float(losses[0])), None),
    ],
)
def test_weights_that_are_nearly_equal_over_all_steps_are_said_to_be(weigh: Any, said: str | None) -> None:
    objective = train(Objective(online=Weighs(weigh)), range(20))
    assert objective.spread.count == 20 * 8
    assert objective.degenerate == (said and f"Weighs gave every token {said}, over all steps")


def test_without_an_online_selection_nothing_is_said() -> None:
    assert train(Objective(), range(3)).degenerate is None


def test_a_resumed_stage_notes_what_an_undisturbed_one_does() -> None:
    def new() -> Objective:
        return Objective(online=Weighs(lambda losses: 1 - 1e-3 * losses))

    whole, half, resumed = train(new(), range(9)), train(new(), range(4)), new()
    resumed.load_state(half.state())
    train(resumed, range(4, 9))
    assert resumed.state() == whole.state()
    assert resumed.degenerate == whole.degenerate is not None
    assert all(type(value) in (int, float) for value in whole.state().values()), "plain values for a checkpoint"
