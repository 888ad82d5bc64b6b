"""TOSS-Anchor: where a selection masks a token, the target is held to what the base would say there."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from toss_lightning.errors import ConfigError, check_choice
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import OnlineSelection, Selection, token_weights
from toss_lightning.selection.top_fraction import GlobalTopFraction, PerRowTopFraction
from toss_lightning.selection.weights import TokenWeights

Where = Literal["masked", "everywhere", "soft"]
NEGLIGIBLE = 1e-3
"""Share of the full anchor below which a soft one is left out, and its position needs no second look at the base."""


class Everything(Selection):
    """Weight 1 for every response token: plain fine-tuning, for an anchor to be added to."""

    columns = ()

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks nothing."""
        return token_weights(scores, np.ones(int(scores.offsets[-1]), np.float32))


class Anchored(Selection):
    """The task weights of another selection, and beside them a weight of ``KL(p_base || p_target)`` for each token.

    A mask alone takes a risky token out of the loss, yet the target still drifts there, for the tokens around it train
    the same adapter. The anchor holds it to the base's own distribution, whatever the custom set says there. Ours, not
    of the paper.

    Args:
        selection: whose task weights these are; :class:`GlobalTopFraction` by default.
        weight: weight of the anchor in nats of KL per nat of token loss.
        where: ``masked``: at tokens of task weight 0. ``everywhere``: at all response tokens; with :class:`Everything`
            that is the control, fine-tuning with a KL to the base. ``soft``: at every token with score S by
            ``weight * sigmoid((S - c) / temperature)``, c being the lowest score that was masked; left out where that
            is less than a thousandth of ``weight``, and at protected end-of-turn tokens. It needs a
            :class:`GlobalTopFraction`, and becomes ``masked`` as the temperature falls.
        temperature: how gradually, in nats of score, a ``soft`` anchor grows.
        safety_rows: rows of ``data.safety`` that stand beside the others in each optimizer step, their replies not
            trained on but anchored with ``weight``; 0 needs no such set.

    Raises:
        ConfigError: ``weight`` or ``temperature`` is not above 0, or ``safety_rows`` is no number of rows; or the
            selection gives this anchor no place.
    """

    def __init__(
        self,
        selection: Selection | None = None,
        weight: float = 1.0,
        where: Where = "masked",
        temperature: float = 0.25,
        safety_rows: int = 0,
    ) -> None:
        selection = GlobalTopFraction() if selection is None else selection
        check_choice("loop.selection.where", where, Where)
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ConfigError(f"loop.selection.{name}: {value} does nothing or is no number: give one above 0")
        if not isinstance(safety_rows, int) or safety_rows < 0:
            raise ConfigError(f"loop.selection.safety_rows: {safety_rows} is not a number of rows: give 0 or more")
        self.selection, self.weight, self.where, self.temperature = selection, weight, where, temperature
        self.safety_rows = safety_rows
        self._check_wrapped()
        self.columns, self.features, self.held_out = selection.columns, selection.features, selection.held_out

    def _check_wrapped(self) -> None:
        name = type(self.selection).__name__
        if isinstance(self.selection, OnlineSelection):
            raise ConfigError(
                f"loop.selection.selection: {name} weighs tokens during training, so what it masks is not known when"
                " the anchors are set: wrap a selection that decides beforehand, such as GlobalTopFraction"
            )
        if "selector" in self.selection.features:
            raise ConfigError(
                f"loop.selection.selection: {name} has a stage of its own, which an anchor would hide: wrap another one"
            )
        if isinstance(self.selection, Anchored):
            raise ConfigError("loop.selection.selection: it is anchored already: wrap what stands inside it")
        if isinstance(self.selection, Everything) and self.where == "masked":
            raise ConfigError("loop.selection.where: Everything masks no token to anchor: set it to everywhere")
        global_top = isinstance(self.selection, GlobalTopFraction) and not isinstance(self.selection, PerRowTopFraction)
        if self.where == "soft" and not global_top:
            raise ConfigError(
                f"loop.selection.where: soft grows from the one cut of GlobalTopFraction, and {name} has none:"
                " wrap GlobalTopFraction, or set it to masked"
            )

    def select(self, scores: TokenScores) -> TokenWeights:
        """Selects as the wrapped selection does, and adds the anchors.

        A selection that finds its share by itself may find nothing to mask, and then nothing is anchored either.

        Raises:
            ConfigError: the wrapped selection was given a share and masks nothing, so that there is nothing to anchor
                or to grow from.
        """
        chosen = self.selection.select(scores)
        task = chosen.flat()
        masked = task == 0
        finds_share = getattr(self.selection, "discard", 0.0) is None
        if self.where != "everywhere" and not masked.any() and not finds_share:
            raise ConfigError(
                f"loop.selection.where: {self.where} anchors by what is masked, and nothing is: raise"
                " loop.selection.selection.init_args.discard, or set it to everywhere"
            )
        if self.where == "soft":
            share = self._soft(scores, masked)
        else:
            share = np.ones(len(task)) if self.where == "everywhere" else masked.astype(np.float64)
        anchor = (self.weight * share).astype(np.float32)
        facts = {"where": self.where, "weight": self.weight, "sum": float(anchor.sum(dtype=np.float64))}
        rows = dict(zip(scores.row_ids.tolist(), scores.per_row(anchor), strict=True))
        report = {**chosen.report, "anchored": int(np.count_nonzero(anchor)), "anchor": facts}
        # rows that a wrapped selection leaves out are wanted for their anchors
        report.pop("rows_left_out", None)
        return replace(chosen, anchor=rows if anchor.any() else {}, report=report, left_out=frozenset())

    def _soft(self, scores: TokenScores, masked: np.ndarray) -> np.ndarray:
        """Shares of the full anchor that grow with the score; ``[tokens]``."""
        wrapped = self.selection
        assert isinstance(wrapped, GlobalTopFraction)
        score = scores.score(wrapped.utility_weight, wrapped.degraded_weight).astype(np.float64)
        # the logistic function as a tanh, which does not overflow
        share: np.ndarray = 0.5 * (1 + np.tanh((score - score[masked].min()) / (2 * self.temperature)))
        share[share < NEGLIGIBLE] = 0.0
        if wrapped.protect_end:
            share[scores.flat("end_of_turn")] = 0.0
        return share
