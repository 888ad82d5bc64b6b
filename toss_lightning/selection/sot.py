"""SOT: weigh rows so that they lie near an anchor set and far from a harmful one (arXiv 2601.07200, ACL 2026)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.progress import progress_bar
from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection
from toss_lightning.selection.checks import check_above_zero, check_at_least, check_discard, check_one_of
from toss_lightning.selection.rows import keep_rows
from toss_lightning.selection.transport import Transport, cosine_cost, sinkhorn
from toss_lightning.selection.weights import TokenWeights

Anchor = Literal["utility", "safety"]
Weights = Literal["exp", "proportional", "uniform"]
ROUNDING = 1e-5
"""Differences of a gradient, in units of the mean cost, that float32 costs make where there are none."""


@dataclass(frozen=True, eq=False)
class PushPull:
    """What :func:`push_pull` found.

    Attributes:
        log_weights: Shape ``[n]`` float64; their exponentials sum to 1.
        objective: its value before each step, and behind the last one.
        pull: transport cost to the anchor set, before the first step and behind the last.
        push: transport cost to the harmful set, likewise.
        worst_error: the highest marginal error of all transport problems.
        unsolved: transport problems that stopped at ``max_iterations``.
    """

    log_weights: Tensor
    objective: list[float]
    pull: tuple[float, float]
    push: tuple[float, float]
    worst_error: float
    unsolved: int


class Sot(Selection):
    """Safety Optimal Transport: learns row weights, keeps the rows of the highest, and trains on them with weights.

    With embeddings of whole rows by the base, cosine cost, and w on the simplex over the R rows of the custom set:
    ``min_w OT_epsilon(w, anchor) - push * OT_epsilon(w, harmful)``. Costs are divided by their mean, so that
    ``epsilon`` and ``lr`` mean the same for every base.

    Args:
        discard: share of the rows that get weight 0, in [0, 1); the paper keeps 4000 of 5000.
        anchor: the set to be near to; it must be of the custom set's task: utility, or safety.
        push: what the distance from the harmful set counts (lambda).
        epsilon: strength of the entropy term, where the mean cost is 1.
        steps: steps of descent on the weights.
        lr: what a step multiplies log weights by: ``w_i <- w_i exp(-lr * gradient_i)``, renormalised.
        weights: what kept rows count: ``exp``, proportional to exp(w_i) (the paper's Eq. 7), ``proportional`` to w_i,
            or ``uniform``. The mean over kept rows is 1.
        tolerance: marginal error at which a transport problem counts as solved.
        max_iterations: iterations at which it is given up.
        device: where to compute, such as cuda.

    Raises:
        ConfigError: ``discard`` is outside [0, 1), there is no such option, or a number is too low or none.
    """

    columns = ()

    def __init__(
        self,
        discard: float = 0.2,
        anchor: Anchor = "utility",
        push: float = 1.0,
        epsilon: float = 0.05,
        steps: int = 50,
        lr: float = 0.05,
        weights: Weights = "exp",
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
        device: str = "cpu",
    ) -> None:
        check_discard(discard)
        check_one_of("anchor", anchor, get_args(Anchor))
        check_one_of("weights", weights, get_args(Weights))
        check_above_zero(epsilon=epsilon, lr=lr, tolerance=tolerance)
        check_at_least(1, steps=steps, max_iterations=max_iterations)
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"loop.selection.device: {device!r} is none: give cpu, or cuda") from error
        if not 0 <= push < math.inf:
            raise ConfigError(
                f"loop.selection.push: {push} is no number, or would pull towards the harmful set: give 0 or more"
            )
        self.discard, self.anchor, self.push, self.epsilon, self.steps = discard, anchor, push, epsilon, steps
        self.lr, self.weights, self.tolerance, self.max_iterations = lr, weights, tolerance, max_iterations
        self.device = device
        self.features = {"embedding": ("custom", anchor, "harmful")}

    def select(self, scores: TokenScores) -> TokenWeights:
        """Learns the weights and keeps the rows of the highest.

        Raises:
            ConfigError: no row comes out nearer to the anchor set, or farther from the harmful one, than another;
                or the device is not to be had.
            StoreError: an embedding is not finite.
        """
        custom, anchor, harmful = (self._embeddings(scores, name) for name in ("custom", self.anchor, "harmful"))
        anchor_cost, harmful_cost = cosine_cost(custom, anchor), cosine_cost(custom, harmful)
        unit = float((anchor_cost.mean() + harmful_cost.mean()) / 2)
        found = push_pull(
            anchor_cost.div_(unit),
            harmful_cost.div_(unit),
            **{name: getattr(self, name) for name in ("push", "epsilon", "steps", "lr", "tolerance", "max_iterations")},
        )
        if found.unsolved:
            rank_zero_warn(
                f"loop.selection.max_iterations: {found.unsolved} of {2 * self.steps + 2} transport problems were not"
                f" solved in {self.max_iterations} iterations (marginal error {found.worst_error:.1e}, wanted"
                f" {self.tolerance:.1e}): raise max_iterations or epsilon"
            )
        log_weights = found.log_weights.numpy()
        left_out = share_of(self.discard, len(log_weights))
        if left_out and np.ptp(log_weights) <= ROUNDING * self.lr * self.steps:
            raise ConfigError(
                f"data.{self.anchor}: SOT finds no row of data.custom nearer to this set and farther from data.harmful"
                " than another, so that only their order would say which go: are the two sets the same? Give others"
            )
        kept = exact_top(log_weights, len(log_weights) - left_out)
        return keep_rows(
            scores,
            kept,
            self._of_rows(log_weights, kept),
            discard=self.discard,
            anchor_set=self.anchor,
            mean_cost=unit,
            objective=[found.objective[0], found.objective[-1]],
            transport_to_anchor=list(found.pull),
            transport_to_harmful=list(found.push),
            # of rows that would be as spread as these if they all counted the same
            effective_rows=float(1 / np.exp(2 * log_weights).sum()),
            marginal_error=found.worst_error,
            transport_problems_unsolved=found.unsolved,
        )

    def _embeddings(self, scores: TokenScores, name: str) -> Tensor:
        try:
            values = torch.tensor(scores.feature("embedding", name), device=self.device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without the device
            reason = f"not to be had here ({str(error).splitlines()[0]})"
            raise ConfigError(f"loop.selection.device: {self.device}: {reason}: give cpu") from error
        if not values.isfinite().all():
            raise StoreError(f"{scores.path}: embeddings of the {name} set are not finite: score again")
        return values

    def _of_rows(self, log_weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
        w = np.exp(log_weights)
        values: np.ndarray = {"exp": np.exp(w), "proportional": w, "uniform": np.ones_like(w)}[self.weights]
        return values / values[kept].mean()


def push_pull(
    anchor_cost: Tensor,
    harmful_cost: Tensor,
    push: float = 1.0,
    epsilon: float = 0.05,
    steps: int = 50,
    lr: float = 0.05,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
) -> PushPull:
    """Descends ``OT_epsilon(w, anchor) - push * OT_epsilon(w, harmful)`` over the simplex, from uniform weights.

    The gradient by w is that of the potentials, ``f_anchor - push * f_harmful`` up to a constant; it is taken on
    ``z`` of ``w = softmax(z)`` (exponentiated gradient), so that a step does not depend on the number of rows.

    Args:
        anchor_cost: Shape ``[n, m]``.
        harmful_cost: Shape ``[n, k]``.
        push: what the second term counts.
        epsilon: strength of the entropy terms, in the unit of the costs.
        steps: how many to take.
        lr: length of a step.
        tolerance: as for :func:`~toss_lightning.selection.transport.sinkhorn`.
        max_iterations: likewise.
    """
    z = torch.zeros(len(anchor_cost), dtype=torch.float64)
    potentials: dict[str, Tensor | None] = {"anchor": None, "harmful": None}
    solved: list[tuple[Transport, Transport]] = []
    with progress_bar("weighing rows", steps + 1, "step") as bar:
        for step in range(steps + 1):
            log_weights = z.log_softmax(0)
            near, far = (
                sinkhorn(cost, log_weights.to(cost), epsilon, tolerance, max_iterations, potentials[name])
                for name, cost in (("anchor", anchor_cost), ("harmful", harmful_cost))
            )
            potentials = {"anchor": near.g, "harmful": far.g}
            solved.append((near, far))
            if step < steps:
                gradient = (near.f - push * far.f).cpu().double()
                z = z - lr * (gradient - (log_weights.exp() * gradient).sum())
            bar.update()
    errors = [one.error for both in solved for one in both]
    return PushPull(
        log_weights,
        [near.value - push * far.value for near, far in solved],
        (solved[0][0].value, solved[-1][0].value),
        (solved[0][1].value, solved[-1][1].value),
        max(errors),
        sum(error > tolerance for error in errors),
    )
