"""The plug-ins of a run together: whether they fit, what people call them, and whether they did anything."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data.mixtures import Mixture
from toss_lightning.errors import ConfigError, TrainingError
from toss_lightning.gradients import Correction
from toss_lightning.loops.plan import Plan, Stage
from toss_lightning.methods import TITLES
from toss_lightning.models import Lora
from toss_lightning.models.objective import Normalize, Objective, check_normalize
from toss_lightning.models.spread import Spread
from toss_lightning.report.summary import PLAIN
from toss_lightning.selection import Anchored, GlobalTopFraction, OnlineSelection, Seal, Selection, Sot, TokenWeights


@dataclass(frozen=True)
class Method:
    """What a run does to plain fine-tuning.

    Args:
        selection: from scores to token weights.
        correction: of the task gradient of the target's steps.
        mixture: rows of other sets that the target is trained on besides.
    """

    selection: Selection
    correction: Correction | None = None
    mixture: Mixture | None = None

    @property
    def needs(self) -> list[str]:
        """What must be there before scoring: reference adapters, and the stage ``seal`` where its logits are read."""
        references = [column for column in self.selection.columns if column != "base"]
        return [*references, *(["seal"] if "selector" in self.selection.features else [])]

    def check(
        self,
        steps: Collection[str],
        sets: Collection[str],
        rounds: int,
        lora: Lora,
        strategy: Strategy,
        normalize: Normalize,
    ) -> None:
        """Refuses what makes no sense together, before anything is trained.

        Args:
            steps: the steps of the plan, as written.
            sets: the sets that there are.
            rounds: of TOSS-Pro.
            lora: shape of the adapters.
            strategy: what runs them.
            normalize: what the loss of an optimizer step is divided by.

        Raises:
            ConfigError: something does not fit; the message says why.
        """
        name = type(self.selection).__name__
        inner, acts = self._inner, {"select", "target"} <= {*steps}
        if acts and normalize == "row" and isinstance(inner, Sot) and inner.weights != "uniform":
            raise ConfigError(
                "model.normalize: row divides each row by its own weight, so that loop.selection Sot with weights:"
                f" {inner.weights} would count all kept rows the same: set it to kept, or weights to uniform"
            )
        if acts and isinstance(self.selection, OnlineSelection):
            check_normalize(normalize, self.selection)
            if self.correction is not None and self.correction.whole_step and not self.selection.whole_step:
                raise ConfigError(
                    f"model.correction: {type(self.correction).__name__} chooses rows of a step by the loss that is to"
                    f" be trained, which loop.selection {name} weighs only while it is: choose another of either"
                )
        if "seal" in steps and not isinstance(self.selection, Seal):
            raise ConfigError(
                f"loop.plan: the stage seal trains what loop.selection Seal reads, but the selection is {name}: leave"
                " seal out, or set the selection to Seal"
            )
        if rounds and "score" in steps and "degraded" not in self.selection.columns:
            raise ConfigError(
                f"loop.rounds: {rounds} rounds train the degraded adapter again, and {name} does not look at it: set"
                " rounds to 0, or choose a selection that reads its token losses"
            )
        read = [*self.selection.features.values(), self.selection.held_out] if "score" in steps else []
        wanted = {one for names in read for one in names}
        if "seal" in steps and isinstance(self.selection, Seal):
            wanted.add(self.selection.safe)
        if self.companion_rows:
            wanted.add("safety")
        if missing := sorted(wanted - set(sets)):
            # a share of this set would be held out
            whole = missing[0].removesuffix("_val")
            how = "a path to it, or data.holdout" if whole in sets else "a path to it"
            raise ConfigError(f"data.{missing[0]}: loop.selection {name} reads this set: give {how}")
        if self.correction is not None:
            self._check_correction(self.correction, steps, sets, lora)
        if isinstance(strategy, ModelParallelStrategy) and (
            self.correction is not None or isinstance(self.selection, Anchored)
        ):
            part = "loop.selection: Anchored" if self.correction is None else "model.correction"
            raise ConfigError(
                f"{part}: needs adapters that lie whole on each device, which trainer.strategy"
                f" {type(strategy).__name__} does not leave: use ddp"
            )

    def warn_of_unused(self, plan: Plan) -> None:
        """Warns of a selection that the target is not trained with, as where another method's file names the plan."""
        plain = any(isinstance(step, Stage) and step.adapter == "target" and not step.weighted for step in plan.steps)
        if plain and type(self.selection) is not GlobalTopFraction:  # which every plan has by default
            whole = ", ".join([*self.needs, "score", "select", "target"])
            rank_zero_warn(
                f"loop.selection: {type(self.selection).__name__} is not used, for loop.plan ({', '.join(plan.names)})"
                " has no step select: the target learns from every token alike. To train with it: --loop.plan"
                f" '[{whole}]'"
            )

    @staticmethod
    def _check_correction(correction: Correction, steps: Collection[str], sets: Collection[str], lora: Lora) -> None:
        name = type(correction).__name__
        if "target" not in steps:
            raise ConfigError(f"model.correction: {name} corrects the target's steps, and loop.plan has no target")
        if "safety" not in sets:
            raise ConfigError(f"data.safety: model.correction {name} draws on this set: give a path to it")
        if correction.whole_step and lora.dora:
            raise ConfigError(
                f"model.correction: {name} takes gradients of single rows, which DoRA's magnitudes do not have: set"
                " model.lora.dora to false"
            )

    @property
    def _inner(self) -> Selection:
        """The selection that decides the task weights."""
        return self.selection.selection if isinstance(self.selection, Anchored) else self.selection

    @property
    def companion_rows(self) -> int:
        """Safety rows that stand beside the target's in each step, anchored to the base."""
        return self.selection.safety_rows if isinstance(self.selection, Anchored) else 0

    def divergences(self, weighted: bool) -> list[str]:
        """The keys of the plug-ins that take a divergence from the base in training.

        Args:
            weighted: the target is trained with a selection's weights.
        """
        anchored = weighted and isinstance(self.selection, Anchored)
        corrected = self.correction is not None and self.correction.divergence
        return [*(["loop.selection"] if anchored else []), *(["model.correction"] if corrected else [])]

    def title(self, weighted: bool, round: int, selected: str | None = None) -> str:
        """What people call the target of such a run.

        Args:
            weighted: the target is trained with a selection's weights.
            round: the round of TOSS-Pro that the scores are of.
            selected: what made the selection, where it comes from another run.
        """
        parts = [selected or self.selected(round)] if weighted else []
        for plugin in (self.correction, self.mixture):
            if plugin is not None:
                parts.append(title_of(plugin))
        return " + ".join(parts) or PLAIN

    def selected(self, round: int) -> str:
        """What people call the selection, made from the scores of a round."""
        inner = self._inner
        name = title_of(inner)
        if round and name.startswith("TOSS"):
            name = name.replace("TOSS", "TOSS-Pro", 1)
        if inner is not self.selection:
            name = "TOSS-Anchor" if type(inner) is GlobalTopFraction and not round else f"{name} + anchor"
        return name

    def idle(self, weights: TokenWeights | None, objective: Objective) -> list[str]:
        """Which plug-ins changed next to nothing, in words: they did what plain fine-tuning does, but for a factor.

        Args:
            weights: what the target was trained with.
            objective: of its stage.

        Raises:
            TrainingError: an online selection left the target nothing to learn from in any step.
        """
        found = []
        if weights is not None:
            name, same = title_of(self.selection), _spread(weights, objective.normalize).narrow
            if isinstance(self.selection, OnlineSelection):
                if objective.spread.count and not objective.spread.total:
                    raise TrainingError(
                        f"stage target: loop.selection {name} gave every token the weight 0 in every step, which left"
                        " no token to train on: choose settings or a selection that keeps some"
                    )
                if same and objective.degenerate:
                    found.append(objective.degenerate)
            elif same and not weights.anchor:
                found.append(f"{name} gave every token {same}")
        if self.correction is not None:
            report = self.correction.report()
            if not report["corrected"] and not report.get("rows_left_out_share"):
                found.append(f"{title_of(self.correction)} changed no step's gradient")
        return found

    def plug_ins(self, weighted: bool) -> int:
        """How many act on the target."""
        return weighted + (self.correction is not None) + (self.mixture is not None)


def _spread(weights: TokenWeights, normalize: Normalize) -> Spread:
    """Of the weights that act: what a whole row counts is divided out where rows are normalised one by one."""
    spread = Spread()
    for row in weights.weights.values():
        values = row / row.mean() if normalize == "row" and row.any() else row
        spread.add(torch.from_numpy(values))
    return spread


def title_of(plugin: object) -> str:
    """What people call what a plug-in does; its class where it is their own."""
    return TITLES.get(type(plugin).__name__, type(plugin).__name__)


def scored_columns(selection: Selection, references: Sequence[str]) -> list[str]:
    """The token losses to file: what the selection reads, and those of every reference at hand, for another selection.

    Args:
        selection: the one that will read them.
        references: reference adapters at hand.
    """
    return [*(["base"] if "base" in selection.columns else []), *references]
