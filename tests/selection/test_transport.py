"""Entropic transport against POT (pythonot.github.io), the reference implementation of the field."""

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toss_lightning.selection import transport
from toss_lightning.selection.transport import cosine_cost, sinkhorn

EXACT = {"tolerance": 1e-12, "max_iterations": 100_000}


def problem(seed: int = 0, rows: int = 23, others: int = 17) -> tuple[Tensor, Tensor]:
    """Costs between random points, and uneven weights of the first."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(rows, 5, generator=generator, dtype=torch.float64) + 0.5
    cost = cosine_cost(points, torch.randn(others, 5, generator=generator, dtype=torch.float64))
    return cost, torch.randn(rows, generator=generator, dtype=torch.float64).log_softmax(0)


def by_pot(cost: Tensor, weights: Tensor, epsilon: float):
    uniform = np.full(cost.shape[1], 1 / cost.shape[1])
    return ot.solve(cost.numpy(), weights.numpy(), uniform, reg=epsilon, reg_type="KL", max_iter=100_000, tol=1e-10)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0, 10.0])
def test_value_and_plan_are_those_of_pot(epsilon: float) -> None:
    for seed in range(3):
        cost, log_weights = problem(seed)
        ours, theirs = sinkhorn(cost, log_weights, epsilon, **EXACT), by_pot(cost, log_weights.exp(), epsilon)
        assert ours.value == pytest.approx(theirs.value, abs=1e-9)
        plan = log_weights.exp()[:, None] / cost.shape[1] * ((ours.f[:, None] + ours.g - cost) / epsilon).exp()
        np.testing.assert_allclose(plan.numpy(), theirs.plan, atol=1e-10)


def test_a_small_epsilon_is_plain_optimal_transport() -> None:
    cost, log_weights = problem()
    exact = ot.emd2(log_weights.exp().numpy(), np.full(17, 1 / 17), cost.numpy())
    assert sinkhorn(cost, log_weights, 1e-3, tolerance=1e-6).value == pytest.approx(exact, abs=5e-3)


def test_the_potential_is_the_gradient_by_the_weights() -> None:
    cost, log_weights = problem()
    f, weights, epsilon, small = sinkhorn(cost, log_weights, 0.1, **EXACT).f, log_weights.exp(), 0.1, 1e-5
    for seed in range(4):
        # along the simplex: what one row gains, others lose
        direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction = weights * (direction - (weights * direction).sum())
        up, down = (by_pot(cost, weights + sign * small * direction, epsilon).value for sign in (1, -1))
        assert float((f * direction).sum()) == pytest.approx((up - down) / (2 * small), abs=1e-7)


def test_a_row_of_no_weight_has_a_potential_too() -> None:
    cost, log_weights = problem()
    log_weights[0] = -500.0
    found = sinkhorn(cost, log_weights.log_softmax(0), 0.05)
    assert found.f.isfinite().all()
    assert found.error < 1e-4


def test_the_error_bounds_how_far_the_marginals_are_off() -> None:
    cost, log_weights = problem(rows=40)
    for iterations in (1, 2, 5, 20):
        found = sinkhorn(cost, log_weights, 0.02, tolerance=0.0, max_iterations=iterations)
        plan = log_weights.exp()[:, None] / 17 * ((found.f[:, None] + found.g - cost) / 0.02).exp()
        assert found.iterations == iterations
        np.testing.assert_allclose(plan.sum(1).numpy(), log_weights.exp().numpy(), atol=1e-12)
        assert 0 < float((plan.sum(0) - 1 / 17).abs().sum()) <= found.error


def test_a_problem_that_is_not_solved_says_so() -> None:
    cost, log_weights = problem()
    found = sinkhorn(cost, log_weights, 0.005, tolerance=1e-9, max_iterations=3)
    assert found.iterations == 3
    assert found.error > 1e-9


def test_a_start_near_the_solution_saves_iterations_and_changes_nothing_else() -> None:
    cost, log_weights = problem()
    cold = sinkhorn(cost, log_weights, 0.02, **EXACT)
    warm = sinkhorn(cost, log_weights, 0.02, **EXACT, start=cold.g)
    assert warm.iterations < cold.iterations / 5
    assert warm.value == pytest.approx(cold.value, abs=1e-10)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, log_weights = problem()
    whole = sinkhorn(cost, log_weights, 0.05)
    for block in (1, 40, 100):
        monkeypatch.setattr(transport, "BLOCK", block)
        cut = sinkhorn(cost, log_weights, 0.05)
        torch.testing.assert_close(cut.f, whole.f)
        assert cut.iterations == whole.iterations


def test_float32_costs_do() -> None:
    cost, log_weights = problem(rows=300, others=200)
    exact = sinkhorn(cost, log_weights, 0.05, **EXACT)
    found = sinkhorn(cost.float(), log_weights.float(), 0.05)
    assert found.error < 1e-4
    assert found.value == pytest.approx(exact.value, abs=1e-4)


def test_cosine_costs_are_those_of_pot() -> None:
    points, others = torch.randn(6, 4), 100 * torch.randn(3, 4)
    np.testing.assert_allclose(
        cosine_cost(points, others), ot.dist(points.numpy(), others.numpy(), "cosine"), atol=1e-6
    )
    assert cosine_cost(torch.zeros(1, 4), others).tolist() == [[1.0, 1.0, 1.0]]


def test_costs_are_made_in_the_one_matrix_that_holds_them() -> None:
    class Matrices(TorchDispatchMode):
        """The storages of everything that has an entry for each pair."""

        def __init__(self) -> None:
            super().__init__()
            self.found: dict[int, Tensor] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.numel() == 40 * 30:
                self.found[made.untyped_storage().data_ptr()] = made  # held, so that no storage is used again
            return made

    points, others = torch.randn(40, 4), torch.randn(30, 4)
    with Matrices() as matrices:
        cost = cosine_cost(points, others)
    assert [*matrices.found] == [cost.untyped_storage().data_ptr()]
