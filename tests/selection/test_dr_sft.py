"""DR-SFT's weights, against the formula token by token and against the objective whose gradient they are."""

import math
from pathlib import Path

import pytest
import torch
from scores_on_disk import add_base, make_scores
from torch.nn import functional as F

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.selection import TokenWeights
from toss_lightning.selection.dr_sft import DrSft


def some_losses(count: int = 200) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    target, base, degraded = (4 * torch.rand(count, generator=generator) for _ in range(3))
    return target, {"loss_base": base, "loss_degraded": degraded}


def one_weight(loss: float, base_loss: float, degraded_loss: float, beta: float) -> float:
    policy, plus, minus = -loss, -base_loss, -degraded_loss
    score = min(max(1 / (1 + math.exp(-(plus - minus))), 0.0), 0.5)
    eta = 1 - 4 * score
    inner = 0.5 * beta * (policy - plus - eta * (policy - minus))
    return max((1 - eta) * (1 - 1 / (1 + math.exp(-inner))), 1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.001, 0.1, 5.0])
def test_equals_the_formula_token_by_token(beta: float) -> None:
    losses, tokens = some_losses()
    pairs = zip(losses.tolist(), tokens["loss_base"].tolist(), tokens["loss_degraded"].tolist(), strict=True)
    wanted = torch.tensor([one_weight(*three, beta) for three in pairs])
    torch.testing.assert_close(DrSft(beta).weigh(losses, tokens), wanted, rtol=1e-5, atol=1e-6)


def test_the_weighted_loss_has_the_gradient_of_the_objective() -> None:
    """-(2 / beta) log sigmoid(beta / 2 (log pi - log pi+ - eta (log pi - log pi-)))"""
    losses, tokens = some_losses()
    beta, log_pi = 0.8, (-losses).requires_grad_()
    plus, minus = -tokens["loss_base"], -tokens["loss_degraded"]
    eta = 1 - 4 * torch.sigmoid(plus - minus).clamp(0, 0.5)
    objective = -(2 / beta) * F.logsigmoid(0.5 * beta * (log_pi - plus - eta * (log_pi - minus)))
    (wanted,) = torch.autograd.grad(objective.sum(), log_pi)
    weights = DrSft(beta).weigh(losses, tokens)
    above_floor = weights > 1e-3
    assert above_floor.sum() > 150
    torch.testing.assert_close(-weights[above_floor], wanted[above_floor], rtol=1e-4, atol=1e-5)


def test_what_only_the_degraded_reference_likes_hardly_counts() -> None:
    tokens = {"loss_base": torch.tensor([9.0, 1.0, 1.0]), "loss_degraded": torch.tensor([0.0, 1.0, 9.0])}
    weights = DrSft().weigh(torch.tensor([1.0, 1.0, 1.0]), tokens)
    assert weights[0] == pytest.approx(1e-3)
    assert weights[1:].tolist() == pytest.approx([1.0, 1.0], abs=5e-3)


def test_a_token_that_the_target_has_learned_far_beyond_the_base_counts_less() -> None:
    tokens = {"loss_base": torch.full((3,), 5.0), "loss_degraded": torch.full((3,), 5.0)}
    weights = DrSft(beta=0.5).weigh(torch.tensor([5.0, 2.0, 0.0]), tokens).tolist()
    assert weights[0] == 1.0
    assert weights[0] > weights[1] > weights[2]


def test_extreme_losses_leave_finite_weights_in_their_range() -> None:
    values = torch.tensor([0.0, 1e-6, 50.0, 1e4])
    target, base, degraded = (grid.flatten() for grid in torch.meshgrid(values, values, values, indexing="ij"))
    for beta in (0.001, 10.0):
        weights = DrSft(beta).weigh(target, {"loss_base": base, "loss_degraded": degraded})
        assert weights.isfinite().all()
        assert weights.min() >= 1e-3
        assert weights.max() <= 2


def test_training_is_handed_the_losses_of_base_and_degraded_reference(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0, 0.0], [0.0]], [[1.0, 2.0], [3.0]])
    add_base(scores, [[4.0, 5.0], [6.0]])
    assert DrSft().columns == ("base", "degraded")
    DrSft().select(scores).save(tmp_path / "selection")
    chosen = TokenWeights.load(tmp_path / "selection")
    assert chosen.flat().tolist() == [1, 1, 1]
    assert {name: [row.tolist() for row in rows.values()] for name, rows in chosen.columns.items()} == {
        "loss_base": [[4, 5], [6]],
        "loss_degraded": [[1, 2], [3]],
    }
    assert chosen.anchor == {}
    assert chosen.report["beta"] == 0.001


def test_losses_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0, 0.0]])
    with pytest.raises(StoreError, match="no column loss_base here: score with this reference first"):
        DrSft().select(scores)
    broken = make_scores(tmp_path / "broken", [[0.0, 0.0]], [[float("nan"), float("inf")]])
    with pytest.raises(StoreError, match="2 values of loss_degraded are not finite: score the custom set again"):
        DrSft().select(add_base(broken, [[0.0, 0.0]]))


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf")])
def test_a_beta_that_is_none(beta: float) -> None:
    with pytest.raises(ConfigError, match=f"loop.selection.beta: {beta} is not a strength: give 0 or more"):
        DrSft(beta)
