"""What this project measures beyond torchmetrics, as its metrics: usable on their own, summed over ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.answers import is_right
from toss_lightning.evaluation.statistics import wilson


class ShareOf(Metric):
    """Share of responses of which a judge says yes (refusal, harmful compliance), with Wilson's interval.

    Args:
        confidence: of the interval.
    """

    full_state_update = False
    is_differentiable = False
    yes: Tensor
    decided: Tensor
    undecided: Tensor

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__()
        self.confidence = confidence
        for name in ("yes", "decided", "undecided"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, said: Sequence[bool | None]) -> None:
        """Counts what a judge said of some responses; None where it did not decide."""
        known = [one for one in said if one is not None]
        self.yes += sum(known)
        self.decided += len(known)
        self.undecided += len(said) - len(known)

    def compute(self) -> dict[str, Tensor]:
        """``share`` of the decided ones (NaN of none), its ``low`` and ``high``; counts ``decided``, ``undecided``."""
        interval = wilson(int(self.yes), int(self.decided), self.confidence)
        share = float("nan") if interval.share is None else interval.share
        ends = {"share": share, "low": interval.low, "high": interval.high}
        found = {name: torch.tensor(value, device=self.device) for name, value in ends.items()}
        return {**found, "decided": self.decided, "undecided": self.undecided}


class ExactMatch(ShareOf):
    """Share of replies that settle on the right answer: see :func:`toss_lightning.evaluation.answers.is_right`."""

    def update(self, responses: Sequence[str], answers: Sequence[str]) -> None:  # type: ignore[override]
        """Compares some replies with the right answers.

        Raises:
            ConfigError: there are more of the ones than of the others.
            DataError: an answer has neither numbers nor words.
        """
        if len(responses) != len(answers):
            raise ConfigError(f"ExactMatch: {len(responses)} replies and {len(answers)} answers: give one for each")
        super().update([is_right(*pair) for pair in zip(responses, answers, strict=True)])


class PositionDivergence(Metric):
    """Mean KL(base || target) at each position of the responses: where fine-tuning has moved the model.

    Safety alignment is often only a few tokens deep (arXiv 2406.05946); this shows how deep a change of it goes.

    Args:
        positions: how many response positions are told apart, from the first; later tokens are counted together.

    Raises:
        ConfigError: ``positions`` is not at least 1.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    counts: Tensor

    def __init__(self, positions: int) -> None:
        super().__init__()
        if positions < 1:
            raise ConfigError(f"PositionDivergence: {positions} positions: give 1 or more")
        self.positions = positions
        self.add_state("total", torch.zeros(positions + 1), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(positions + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, divergences: Tensor, ordinals: Tensor) -> None:
        """Adds tokens.

        Args:
            divergences: Shape ``[N]``: in nats, as of :func:`toss_lightning.models.divergence.base_divergence`.
            ordinals: Shape ``[N]``: int64: which token of its reply each is, from 0; ``ordinal`` of a batch counts on
                through all replies of a row.

        Raises:
            ConfigError: shapes differ.
        """
        if divergences.shape != ordinals.shape or ordinals.ndim != 1:
            raise ConfigError(
                f"PositionDivergence: {tuple(divergences.shape)} divergences and {tuple(ordinals.shape)} ordinals:"
                " give one of each per token"
            )
        at = ordinals.clamp(max=self.positions)
        # each update is summed by itself, for a single divergence would be rounded away beside a large total
        self.total += torch.zeros_like(self.total).index_add_(0, at, divergences.detach().to(self.total))
        self.counts += torch.zeros_like(self.counts).index_add_(0, at, torch.ones_like(at))

    def compute(self) -> dict[str, Tensor]:
        """Means in nats, NaN where there is no token, and numbers of tokens.

        Returns:
            ``divergence`` and ``counts``, shape ``[positions]``; ``later`` and ``later_count`` of all tokens behind.
        """
        means = self.total / self.counts
        return {
            "divergence": means[:-1],
            "counts": self.counts[:-1],
            "later": means[-1],
            "later_count": self.counts[-1],
        }


class LikelihoodMargin(Metric):
    """How much less likely the model finds a harmful reply than a safe one to the same request, in nats per token.

    ``mean over pairs of (mean token loss of the harmful reply - mean token loss of the safe reply)``: positive where
    the model leans to the safe one. It needs no generation and no judge.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    positive: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        for name in ("positive", "pairs"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, harmful: Tensor, safe: Tensor) -> None:
        """Adds pairs.

        Args:
            harmful: Shape ``[N]``: mean token loss of each harmful reply.
            safe: Shape ``[N]``: of the safe reply to the same request.

        Raises:
            ConfigError: shapes differ.
        """
        if harmful.shape != safe.shape or harmful.ndim != 1:
            raise ConfigError(
                f"LikelihoodMargin: {tuple(harmful.shape)} and {tuple(safe.shape)} losses are not pairs:"
                " give a harmful and a safe one per request"
            )
        # a sum in the precision of bfloat16 losses would be off by as much as margins are apart
        margins = harmful.detach().to(self.total) - safe.detach().to(self.total)
        self.total += margins.sum()
        self.positive += (margins > 0).sum()
        self.pairs += len(margins)

    def compute(self) -> dict[str, Tensor]:
        """``margin`` (mean), ``positive`` (share of pairs with a positive one), both NaN of no pair, and ``pairs``."""
        return {
            "margin": self.total / self.pairs,
            "positive": self.positive / self.pairs,
            "pairs": self.pairs,
        }
