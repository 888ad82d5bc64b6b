"""SafeGrad: gradient surgery against the gradient of a KL alignment loss (arXiv 2508.07172)."""

from typing import Any

import numpy as np

from toss_lightning.gradients.base import Angle, Correction, Gradients, Probe, check_argument, norm
from toss_lightning.seeds import global_seed

ROUNDING = 2.0
"""An alignment gradient is rounding up to this many times the norm that rounding alone makes. While the target still is
nearly the base, a projection would follow a direction that says nothing."""


class SafeGrad(Correction):
    """Takes the part of the task gradient that works against alignment away, and adds the alignment gradient.

    The alignment gradient g_a is that of KL(base || target), mean over the response tokens of some rows of
    ``data.safety``, drawn in each step. If ``g . g_a < 0`` over all parameters, then ``g <- g - (g . g_a / ||g_a||^2)
    g_a``; in every step ``g <- g + rho g_a`` (arXiv 2508.07172, Algorithm 1).

    What rounding alone makes of an alignment gradient is measured at the first step, where the target is the base. One
    that is not clearly larger is left alone, and the step is the plain one.

    Args:
        rho: factor of the alignment gradient that is added, at least 0. The paper uses 1.
        examples: rows of ``data.safety`` in each step, all where it has fewer.

    Raises:
        ConfigError: an argument is out of its range.
    """

    divergence = True

    def __init__(self, rho: float = 1.0, examples: int = 8) -> None:
        super().__init__()
        check_argument(rho >= 0, "rho", rho, "a number that is at least 0")
        check_argument(examples >= 1, "examples", examples, "a number of rows, at least 1")
        self.rho, self.examples = rho, examples

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Projects if the two gradients conflict, and adds, in place."""
        rows = self._draw(probe.size)
        if not self._sums["steps"]:
            floor, noise = probe.gradient(rows, "rounding")
            self.record(rounding=norm(noise), rounding_kl=abs(floor))
        kl, alignment = probe.gradient(rows, "kl")
        angle = Angle.between(gradients, alignment)
        self.record(steps=1, kl=kl)
        if angle.other <= ROUNDING * self._sums["rounding"]:
            self.record(below_rounding=1)
            return
        self.record(compared=1, cosine=angle.cosine, conflicts=angle.conflict)
        if angle.conflict:
            self.record(removed=-angle.cosine)
        factor = self.rho - (angle.product / angle.other**2 if angle.conflict else 0.0)
        if factor:
            self.record(corrected=1)
            for name, value in gradients.items():
                value.add_(alignment[name], alpha=factor)

    def _draw(self, size: int) -> list[int]:
        if size <= self.examples:
            return list(range(size))
        generator = np.random.default_rng([global_seed(), int(self._sums["steps"])])
        rows: list[int] = np.sort(generator.choice(size, self.examples, replace=False)).tolist()
        return rows

    def report(self) -> dict[str, Any]:
        """Adds, over steps in conflict, the share of the norm of the gradient that was removed; the mean KL; and the KL
        that rounding alone makes, with the steps that were left alone for it.
        """
        return {
            **super().report(),
            "mean_norm_removed": self.mean("removed", "conflicts"),
            "mean_kl": self.mean("kl", "steps"),
            "rounding_kl": self._sums["rounding_kl"],
            "below_rounding": int(self._sums["below_rounding"]),
        }
