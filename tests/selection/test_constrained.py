"""Constrained SFT's weights, against the formula token by token and against the objective whose gradient they are."""

import math
from pathlib import Path

import pytest
import torch
from scores_on_disk import add_base, make_scores
from torch.nn import functional as F

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.selection.constrained import ConstrainedSft

LENGTHS = (1, 3, 5, 6, 9)
ORDINALS = [ordinal for length in LENGTHS for ordinal in range(length)]
BETAS = [0.5 if ordinal == 0 else 2.0 if ordinal < 5 else 0.1 for ordinal in ORDINALS]


def some_losses() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    target, base = (3 * torch.rand(len(ORDINALS), generator=generator) for _ in range(2))
    return target, {"loss_base": base, "ordinal": torch.tensor(ORDINALS)}


def test_equals_the_formula_token_by_token() -> None:
    losses, tokens = some_losses()
    wanted = []
    for loss, base_loss, beta in zip(losses.tolist(), tokens["loss_base"].tolist(), BETAS, strict=True):
        moved = beta * (-loss + base_loss)
        wanted.append(2 * (1 - 1 / (1 + math.exp(-moved))))
    torch.testing.assert_close(ConstrainedSft().weigh(losses, tokens), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_the_weighted_loss_has_the_gradient_of_the_objective() -> None:
    """-(2 / beta_t) log sigmoid(beta_t (log pi - log pi_base))"""
    losses, tokens = some_losses()
    beta, log_pi = torch.tensor(BETAS), (-losses).requires_grad_()
    objective = -(2 / beta) * F.logsigmoid(beta * (log_pi + tokens["loss_base"]))
    (wanted,) = torch.autograd.grad(objective.sum(), log_pi)
    torch.testing.assert_close(-ConstrainedSft().weigh(losses, tokens), wanted, rtol=1e-5, atol=1e-6)


def test_plain_fine_tuning_at_the_start() -> None:
    losses, tokens = some_losses()
    assert (ConstrainedSft().weigh(losses, {**tokens, "loss_base": losses}) == 1).all()


def test_early_tokens_are_held_hardest() -> None:
    tokens = {"loss_base": torch.full((7,), 2.0), "ordinal": torch.arange(7)}
    weights = ConstrainedSft().weigh(torch.full((7,), 1.0), tokens).tolist()
    assert weights[1:5] == [weights[1]] * 4
    assert weights[1] < weights[0] < weights[5] == weights[6] < 1


def test_no_early_tokens_means_one_beta_for_all() -> None:
    tokens = {"loss_base": torch.full((4,), 2.0), "ordinal": torch.arange(4)}
    weights = ConstrainedSft(early_tokens=0).weigh(torch.full((4,), 1.0), tokens)
    assert weights.tolist() == pytest.approx([2 / (1 + math.exp(0.1))] * 4)


def test_extreme_losses_leave_finite_weights_in_their_range() -> None:
    values = torch.tensor([0.0, 1e-6, 50.0, 1e4])
    target, base = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    weights = ConstrainedSft().weigh(target, {"loss_base": base, "ordinal": torch.arange(16) % 6})
    assert weights.isfinite().all()
    assert weights.min() == pytest.approx(1e-3)
    assert weights.max() <= 2


def test_training_is_handed_the_losses_of_the_base_alone(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0, 0.0], [0.0]])
    with pytest.raises(StoreError, match="no column loss_base here"):
        ConstrainedSft().select(scores)
    chosen = ConstrainedSft().select(add_base(scores, [[4.0, 5.0], [6.0]]))
    assert ConstrainedSft().columns == ("base",)
    assert chosen.flat().tolist() == [1, 1, 1]
    assert {name: [row.tolist() for row in rows.values()] for name, rows in chosen.columns.items()} == {
        "loss_base": [[4, 5], [6]]
    }


@pytest.mark.parametrize("name", ["beta", "beta_first", "beta_early"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_beta_that_is_none(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"loop.selection.{name}: {value} is not a strength: give 0 or more"):
        ConstrainedSft(**{name: value})


def test_a_negative_number_of_early_tokens() -> None:
    with pytest.raises(ConfigError, match=r"loop.selection.early_tokens: -1 is not a number of tokens"):
        ConstrainedSft(early_tokens=-1)
