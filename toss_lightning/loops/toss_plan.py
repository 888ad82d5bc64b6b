"""What a plan of TOSS is made of: its settings, what fits together, what identifies it, and where it is."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer

from toss_lightning.data.datamodule import HELD_OUT
from toss_lightning.data.stages import Companions
from toss_lightning.errors import ConfigError, check_choice
from toss_lightning.evaluation import Evaluation, Evaluator, SafetyProbe
from toss_lightning.files import restore_directory, sweep, user_path
from toss_lightning.identity import identify
from toss_lightning.loops.given import check_maker, check_scores, load_selection
from toss_lightning.loops.method import Method
from toss_lightning.loops.metrics import MetricsCsv
from toss_lightning.loops.plan import TOSS_PLAN, Action, Given, Plan, Stage, make_plan
from toss_lightning.loops.plan_loop import PlanLoop
from toss_lightning.loops.safety_watch import SafetyWatch
from toss_lightning.loops.strategies import check_trainer
from toss_lightning.models.module import REFERENCES
from toss_lightning.models.probe import check_probed
from toss_lightning.models.sharding import is_sharding
from toss_lightning.report.summary import Summary
from toss_lightning.seeds import global_seed
from toss_lightning.selection import (
    Anchored,
    GlobalTopFraction,
    Seal,
    Selection,
    SelectorTraining,
    TokenWeights,
)

KeepEpoch = Literal["last", "best"]
JUDGED_BY = {"utility": "utility_val", "degraded": "harmful_val"}
"""Reference -> the held-out rows of its kind."""


class TossPlan(PlanLoop):
    """The settings of a plan, and what they and the data at hand make of it.

    Args:
        trainer: the Trainer whose ``fit_loop`` this becomes.
        plan: steps in order.
        selection: from scores to token weights.
        epochs: passes over the custom set in ``sft`` and ``target``.
        reference_epochs: passes over the utility and harmful sets; as ``epochs`` by default.
        keep_epoch: a reference is what its ``last`` epoch leaves, or its ``best`` one: that behind which its own
            held-out loss, on ``utility_val`` or on ``harmful_val``, is lowest.
        scores_from: a store to select from, instead of a ``score`` step.
        scores_round: the round of that store; its last one by default.
        selection_from: a selection to train the target with, instead of a ``select`` step.
        evaluation: what the step ``test`` asks of the adapters, and who judges.
        safety_probe: what is measured of ``sft`` and ``target`` while they train, and the drift that ends them.

    Attributes:
        written: the plan as it was given; ``steps`` may be a part of it.
        rounds: how often the degraded adapter is trained again.
        promoted: the rows that each round so far added to the harmful set.

    Raises:
        ConfigError: the Trainer accumulates gradients itself, its strategy does not leave adapters whole, or a setting
            is not one of its values.
    """

    rounds = 0

    def __init__(
        self,
        trainer: Trainer,
        plan: Sequence[str] = TOSS_PLAN,
        selection: Selection | None = None,
        epochs: int = 2,
        reference_epochs: int | None = None,
        keep_epoch: KeepEpoch = "last",
        scores_from: str | None = None,
        scores_round: int | None = None,
        selection_from: str | None = None,
        evaluation: Evaluation | None = None,
        safety_probe: SafetyProbe | None = None,
    ) -> None:
        check_trainer(trainer)
        check_choice("loop.keep_epoch", keep_epoch, KeepEpoch)
        super().__init__(trainer)
        self.written, self.steps = tuple(plan), list(plan)
        self.epochs, self.evaluation = epochs, evaluation
        self.reference_epochs = epochs if reference_epochs is None else reference_epochs
        self.keep_epoch = keep_epoch
        self.selection = selection if selection is not None else GlobalTopFraction()
        self.scores_from, self.scores_round, self.selection_from = scores_from, scores_round, selection_from
        self.promoted: list[list[int]] = []
        self.summary = Summary()
        self.selector: SelectorTraining | None = None
        self._objective_state: dict[str, Any] = {}
        self._evaluator: Evaluator | None = None
        self.watch = SafetyWatch(safety_probe) if safety_probe is not None else None
        if self.watch is not None:
            trainer.callbacks.insert(0, self.watch)  # type: ignore[attr-defined]
        self._weights: TokenWeights | None = None
        self._selected: str | None = None
        self._failed_judges: dict[str, str] = {}
        self._stage_started = 0.0
        self._action: str | None = None
        self._lines = 0

    def end_with(self, step: str) -> None:
        """Leaves out what comes behind a step of the plan.

        Raises:
            ConfigError: the plan has no such step.
        """
        if step not in self.steps:
            raise ConfigError(f"loop.plan: no {step!r} step in {', '.join(self.steps)}: add it")
        self.steps = self.steps[: self.steps.index(step) + 1]

    def only_test(self) -> set[str]:
        """Leaves out everything but the evaluation of adapters that are there; returns the sets that it reads."""
        self.steps = ["test"]
        return {"utility_val"} if self.evaluation is not None and self.evaluation.reads_the_task else set()

    # --- the plan -----------------------------------------------------------------------------------------------------

    def make_plan(self) -> Plan:
        """Checks the settings against the data and the adapters at hand, and repairs what a kill left half-renamed."""
        for plugin in (self.selection, self.module.correction, self.datamodule.mixture):
            identify(plugin)  # takes down its code, whose file may be edited while the run goes on
        references = [name for name in REFERENCES if getattr(self.module.references, name)]
        sets = self.datamodule.sets
        method = self.method
        if not self._only_tests:
            module = self.module
            method.check(self.written, sets, self.rounds, module.lora, self.trainer.strategy, module.normalize)
            if module.correction is not None:
                check_probed(module, len(sets["safety"].rows))
        given = Given(
            sets,
            references,
            self.scores_from is not None,
            self.selection_from is not None,
            method.needs,
            self.selection.epochs if isinstance(self.selection, Seal) else 1,
        )
        plan = make_plan(self.steps, self.epochs, self.reference_epochs, given, 0 if self._only_tests else self.rounds)
        if self.keep_epoch == "best":
            self._check_best_epochs(plan)
        if "test" in self.steps:
            self._evaluator = self._new_evaluator()
            self._evaluator.adapters(self.adapters_made(plan))
        if not self._only_tests:
            method.warn_of_unused(plan)
            if self.watch is not None:
                self.watch.prepare(self.trainer, self.datamodule.chat, self.datamodule.max_tokens, self.written)
            self._check_given()
            self._check_mixture(plan)
        self.datamodule.check_fits(self._served(plan), self.module.context)
        if self.trainer.is_global_zero:
            restore_directory(self.run_dir / "selection")
            for directory in (self.run_dir, self.run_dir / "adapters", self.run_dir / "promoted"):
                sweep(directory)
        self.trainer.strategy.barrier("directories restored")
        return plan

    def _check_best_epochs(self, plan: Plan) -> None:
        """Refuses to keep the best epoch of a reference without the held-out rows that tell which it is.

        Raises:
            ConfigError: they are not there, or not looked at in full.
        """
        trained = {step.adapter for step in plan.steps if isinstance(step, Stage)}
        for adapter, held_out in JUDGED_BY.items():
            if adapter in trained and held_out not in self.datamodule.sets:
                raise ConfigError(
                    f"loop.keep_epoch: held-out rows tell which epoch of the {adapter} reference is best: give"
                    f" data.{held_out} or data.holdout"
                )
        if trained & {*JUDGED_BY}:
            self._check_all_held_out("loop.keep_epoch: the best epoch")

    def _check_all_held_out(self, what: str) -> None:
        """Refuses ``trainer.limit_val_batches`` where held-out rows decide something.

        Which of them stand in the first batches differs with max_tokens and with the number of ranks.

        Args:
            what: what they decide, in words.

        Raises:
            ConfigError: the Trainer has such a limit.
        """
        limit = self.trainer.limit_val_batches
        if isinstance(limit, int) or limit < 1:
            raise ConfigError(f"{what} is told by all held-out rows: leave out trainer.limit_val_batches ({limit})")

    def _check_mixture(self, plan: Plan) -> None:
        """Draws the rows that the target will be served besides, for there may be too few to draw from."""
        if self.datamodule.mixture is not None and "target" in {step.name for step in plan.steps}:
            self.datamodule.mixture.rows(self.datamodule.sets, global_seed())

    def _served(self, plan: Plan) -> set[str]:
        """The sets whose rows go through the model."""
        stages = [step for step in plan.steps if isinstance(step, Stage)]
        served = {stage.set for stage in stages}
        if "test" in self.steps and self.evaluation is not None and self.evaluation.reads_the_task:
            served |= {"utility_val"} & {*self.datamodule.sets}
        served |= {beside.set for stage in stages if (beside := self._companions(stage)) is not None}
        if stages and self.trainer.limit_val_batches:
            served |= {*HELD_OUT} & {*self.datamodule.sets}
        if any(isinstance(step, Action) and step.kind == "score" for step in plan.steps):
            served |= {"custom", *self.selection.features.get("embedding", ()), *self.selection.held_out}
        if any(stage.adapter == "target" for stage in stages):
            served |= {"safety"} if self.module.correction is not None else set()
            served |= {*self.datamodule.mixture.sets} if self.datamodule.mixture is not None else set()
        return served

    @property
    def _only_tests(self) -> bool:
        return self.steps == ["test"]

    def _new_evaluator(self) -> Evaluator:
        """Reads the prompts, so that what is wrong with them is said before anything is trained."""
        if self.evaluation is None:
            raise ConfigError(
                "loop.evaluation: the step test needs prompts: name them, or add --config evaluation/demo, whose keys"
                " to change"
            )
        if is_sharding(self.trainer.strategy):
            raise ConfigError(
                "loop.plan: the step test lets each device reply alone, and trainer.strategy"
                f" {type(self.trainer.strategy).__name__} leaves none the whole base: leave test out, and run toss test"
                " with --trainer.strategy ddp"
            )
        data = self.datamodule
        return Evaluator(self.evaluation, self.trainer, data.chat, self.run_dir, data.max_tokens)

    def adapters_made(self, plan: Plan) -> list[str] | None:
        """The adapters that a plan leaves behind; None where it only tests."""
        return None if self._only_tests else [step.name for step in plan.steps if isinstance(step, Stage)]

    def _check_given(self) -> None:
        """Looks at the scores or the selection that are given before anything is trained."""
        if self.scores_from:
            computed = self.module.fingerprints()
            check_scores(self._store, self.scores_round, self.datamodule, self.selection, computed)
        if self.selection_from:
            self._load_selection()

    def _load_selection(self) -> TokenWeights:
        computed = self.module.fingerprints()
        weights = load_selection(self._selection_path, self.datamodule, self.selection, computed, self._selected)
        if self.selection_from:
            check_maker(self._selection_path, weights, self.selection)
        return weights

    # --- what identifies a run, and where it is -----------------------------------------------------------------------

    @property
    def method(self) -> Method:
        """The plug-ins of this run."""
        return Method(self.selection, self.module.correction, self.datamodule.mixture)

    def identity(self) -> dict[str, str]:
        """What the optimizer steps depend on, beside the base and the shape of the adapters."""
        return {
            "loop.selection": identify(self.selection),
            "loop.keep_epoch": self.keep_epoch,
            "loop.scores_from": f"{self.scores_from}, round {self.scores_round}",
            "trainer.gradient_clip_val": f"{self.trainer.gradient_clip_val} {self.trainer.gradient_clip_algorithm}",
            "seed_everything": str(global_seed()),
            "loop.safety_probe": self.watch.prober.identity() if self.watch is not None else "none",
            **self.module.identity(),
            **self.datamodule.identity(),
        }

    def state(self) -> dict[str, Any]:
        """What the target is trained with, and everything for the summary."""
        self._count_time()
        return {
            "selected": self._selected,
            "summary": self.summary.state(),
            "failed_judges": self._failed_judges,
            "metrics": self._metrics.lines if self._metrics else 0,
            "selector": self.selector.state() if self.selector else {},
            "objective": self.module.objective.state() if self.stage else {},
            "correction": self.module.correction.state() if self._corrects else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the state back."""
        self.summary.load_state(state["summary"])
        self._lines = state["metrics"]
        self._failed_judges = state.get("failed_judges", {})
        self._selected = state["selected"]
        self._objective_state = state["objective"]
        if state["selector"]:
            self.selector = self._new_selector()
            self.selector.load_state(state["selector"])
        if state["correction"]:
            self.module.correction.load_state(state["correction"])

    @property
    def _corrects(self) -> bool:
        """The running stage has its gradients corrected."""
        return self.stage is not None and self.stage.adapter == "target" and self.module.correction is not None

    def _new_selector(self) -> SelectorTraining:
        assert isinstance(self.selection, Seal)
        return self.selection.training(len(self.datamodule.sets["custom"].rows))

    def _companions(self, stage: Stage) -> Companions | None:
        """Rows of another set that stand beside the stage's own in every step."""
        if stage.adapter == "seal" and isinstance(self.selection, Seal):
            return Companions(self.selection.safe, self.datamodule.batch_size)
        if stage.weighted and isinstance(self.selection, Anchored) and self.selection.safety_rows:
            return Companions("safety", self.selection.safety_rows, {"weight": 0.0, "anchor": self.selection.weight})
        return None

    def _count_time(self) -> None:
        now, running = time.monotonic(), self._action or (self.stage.name if self.stage is not None else None)
        if running in self.summary.stages:
            self.summary.stages[running]["seconds"] += now - self._stage_started
        self._stage_started = now

    @property
    def _metrics(self) -> MetricsCsv | None:
        return next((logger for logger in self.trainer.loggers if isinstance(logger, MetricsCsv)), None)

    @property
    def _store(self) -> Path:
        return user_path(self.scores_from) if self.scores_from else self.run_dir / "scores"

    @property
    def _selection_path(self) -> Path:
        return user_path(self.selection_from) if self.selection_from else self.run_dir / "selection"
