"""SPF: takes the safety subspace out of a task gradient that conflicts with safety (arXiv 2601.10141)."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from toss_lightning.errors import ConfigError
from toss_lightning.gradients.base import (
    Angle,
    Correction,
    Gradients,
    Probe,
    check_argument,
    check_reference,
    exact,
)


class SPF(Correction):
    """Projects the task gradient off the leading directions of a safety gradient, in steps in which the two conflict.

    In every step the safety gradient is computed anew, as the gradient of the mean token loss of the first rows of
    ``data.safety``. If its inner product with the task gradient, over all parameters, is negative, then each matrix
    loses its part in the leading left singular vectors of its safety gradient: ``G <- G - U_k U_k^T G``. No safety
    gradient is ever added (arXiv 2601.10141).

    Args:
        k: leading directions taken out of each matrix, fewer than the LoRA rank; null is a quarter of the rank, and
            at least 1. Directions without a singular value, as all of A's have while B is 0, are left out.
        energy: share, in (0, 1], of the squared norm of a matrix' safety gradient; the fewest directions that hold it
            are taken, at most ``k``. null takes ``k``.
        examples: rows of ``data.safety`` that the safety gradient is computed on. The paper uses 1.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, k: int | None = None, energy: float | None = None, examples: int = 1) -> None:
        super().__init__()
        check_argument(k is None or k >= 1, "k", k, "a number of directions, at least 1, or null")
        check_argument(energy is None or 0 < energy <= 1, "energy", energy, "a share in (0, 1], or null")
        check_argument(examples >= 1, "examples", examples, "a number of rows, at least 1")
        self.k, self.energy, self.examples = k, energy, examples
        self._count = 0

    def check(self, size: int, rank: int) -> None:
        """Refuses directions that leave nothing of a gradient.

        Raises:
            ConfigError: ``k`` leaves nothing of a gradient of this rank, or the reference set has too few rows.
        """
        check_reference(size, self.examples, "examples")
        if (count := self._directions(rank)) >= rank:
            raise ConfigError(
                f"model.correction.k: {count} directions are all that the gradient of a LoRA matrix of rank"
                f" {rank} can have, so nothing would be left of it: "
                + (f"give at most {rank - 1}" if rank > 1 else "raise model.lora.r to at least 2")
            )

    def begin_stage(self, probe: Probe, rank: int) -> None:
        """Settles the number of directions."""
        super().begin_stage(probe, rank)
        self._count = self._directions(rank)

    def _directions(self, rank: int) -> int:
        return max(1, rank // 4) if self.k is None else self.k

    def correct(self, gradients: Gradients, probe: Probe) -> None:
        """Projects in place if the two gradients conflict."""
        loss, safety = probe.gradient(range(self.examples))
        angle = Angle.between(gradients, safety)
        self.record(steps=1, compared=1, cosine=angle.cosine, loss=loss, conflicts=angle.conflict)
        if not angle.conflict:
            return
        removed, directions = project_out(gradients, safety, self._count, self.energy)
        self.record(corrected=1, removed=removed / angle.norm, directions=directions / len(gradients))

    def report(self) -> dict[str, Any]:
        """Adds the loss of the safety rows and, over corrected steps, the share of the norm of the gradient that was
        removed and the directions per matrix.
        """
        return {
            **super().report(),
            "mean_norm_removed": self.mean("removed", "corrected"),
            "mean_directions": self.mean("directions", "corrected"),
            "mean_safety_loss": self.mean("loss", "steps"),
        }


def project_out(gradients: Gradients, safety: Gradients, count: int, energy: float | None = None) -> tuple[float, int]:
    """Takes the leading left singular vectors of each matrix of ``safety`` out of that of ``gradients``, in place.

    Matrices of equal shape are handled together, in float64: TF32, which float32 products may fall back to on a GPU,
    leaves far more behind than rounding.

    Args:
        gradients: what is projected; a parameter of other than two axes counts as ``[first, rest]``.
        safety: whose directions are taken out.
        count: directions per matrix.
        energy: see :class:`SPF`.

    Returns:
        The norm of what was removed, over all matrices, and the number of directions.
    """
    groups: dict[torch.Size, list[str]] = defaultdict(list)
    for name, value in gradients.items():
        groups[value.shape].append(name)
    removed, found = 0.0, 0
    for shape, names in groups.items():
        task = torch.stack([exact(gradients[name]).reshape(shape[0], -1) for name in names])
        basis, counts = left_directions(
            torch.stack([exact(safety[name]).reshape(shape[0], -1) for name in names]), count, energy
        )
        part = basis @ (basis.mT @ task)
        for name, rest in zip(names, task - part, strict=True):
            gradients[name].copy_(rest.reshape(shape))
        removed += float(part.square().sum())
        found += int(counts.sum())
    return removed**0.5, found


def left_directions(matrices: Tensor, count: int, energy: float | None = None) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors, from the eigenvectors of the smaller Gram matrix: r by r for a gradient of LoRA.

    Args:
        matrices: Shape ``[M, m, n]`` float64, rounded to float32 before.
        count: at most as many per matrix.
        energy: at most as many as hold this share of the matrix' squared norm.

    Returns:
        Shape ``[M, m, min(count, m, n)]``, orthonormal columns, 0 where a matrix has fewer directions; and shape
        ``[M]``, how many each has.
    """
    high, wide = matrices.shape[1:]
    gram = matrices.mT @ matrices if high > wide else matrices @ matrices.mT
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    singular = values.sqrt()
    # what rounding makes of a singular value of 0, whose vector could be any
    found = singular > singular[:, :1] * max(high, wide) * torch.finfo(torch.float32).eps
    if energy is not None:
        found &= values.cumsum(-1) - values < energy * values.sum(-1, keepdim=True)
    vectors, singular, found = vectors[..., :count], singular[:, :count], found[:, :count]
    if high > wide:
        vectors = matrices @ vectors / singular.masked_fill(~found, 1.0).unsqueeze(1)
    return vectors * found.unsqueeze(1), found.sum(-1)
