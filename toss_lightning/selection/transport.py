"""Entropic optimal transport between two weighted sets of points, in the log domain (Cuturi, 2013)."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**22
"""Entries of the cost matrix that are worked on at once: what a step needs beside the matrix itself."""


@dataclass(frozen=True, eq=False)
class Transport:
    """A solution of :func:`sinkhorn`.

    Attributes:
        f: Shape ``[n]``: the potential of the first set; up to a constant, the gradient of the value by its weights.
        g: Shape ``[m]``: the potential of the second set.
        value: the transport cost, entropy term included.
        error: summed difference between the weights of the second set and those that the plan gives it, at most.
        iterations: passes over the cost matrix, of rows and of columns each.
    """

    f: Tensor
    g: Tensor
    value: float
    error: float
    iterations: int


def cosine_cost(points: Tensor, others: Tensor) -> Tensor:
    """One minus the cosine of every pair; ``[n, D]`` and ``[m, D]`` to ``[n, m]``."""
    normal = torch.nn.functional.normalize
    # in place, for the matrix can be most of a machine's memory
    return (normal(points, dim=1) @ normal(others, dim=1).T).neg_().add_(1)


def sinkhorn(
    cost: Tensor,
    log_weights: Tensor,
    epsilon: float,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    start: Tensor | None = None,
) -> Transport:
    """Solves ``min_P <P, C> + epsilon KL(P || w x u)`` over plans P with marginals w and u, where u is uniform.

    The plan is ``P_ij = w_i u_j exp((f_i + g_j - C_ij) / epsilon)``. Weights are given as logarithms, so that a row of
    almost no weight still has a potential.

    Args:
        cost: Shape ``[n, m]``, C.
        log_weights: Shape ``[n]``, log w; w sums to 1.
        epsilon: strength of the entropy term, in the unit of the cost.
        tolerance: error at which to stop.
        max_iterations: where to stop in any case; the caller is to look at ``error``.
        start: Shape ``[m]``: a potential to start from, such as that of slightly different weights.
    """
    uniform = torch.full_like(cost[0], 1 / cost.shape[1]).log()
    g = torch.zeros_like(cost[0]) if start is None else start
    f = _soft_minimum(cost, g, uniform, epsilon)
    error, iterations = float("inf"), 0
    while error > tolerance and iterations < max_iterations:
        g = _soft_minimum(cost.T, f, log_weights, epsilon)
        before, f = f, _soft_minimum(cost, g, uniform, epsilon)
        # what the old f would have given the rows; the new one gives them w, and errs on the columns by no more
        error = float((log_weights.exp() * torch.expm1((before - f) / epsilon).abs()).sum())
        iterations += 1
    value = float((log_weights.exp() * f).sum() + (uniform.exp() * g).sum())
    return Transport(f, g, value, error, iterations)


def _soft_minimum(cost: Tensor, potential: Tensor, log_weights: Tensor, epsilon: float) -> Tensor:
    """``-epsilon log sum_j exp(log_weights_j + (potential_j - cost_ij) / epsilon)``; ``[n, m]`` to ``[n]``."""
    inner = log_weights + potential / epsilon
    blocks = cost.split(max(1, BLOCK // cost.shape[1]))
    return torch.cat([-epsilon * torch.logsumexp(inner - block / epsilon, dim=1) for block in blocks])
