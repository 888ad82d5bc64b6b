"""TossLoop: what the stages and actions of a plan do, for every method that trains one target."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data.datamodule import Companions
from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.evaluation import Evaluation, Evaluator, report_evaluation
from toss_lightning.files import restore_directory, sweep
from toss_lightning.identity import name_plugin
from toss_lightning.loops.method import Method, scored_columns
from toss_lightning.loops.metrics import MetricsCsv
from toss_lightning.loops.plan import TOSS_PLAN, Action, Given, Plan, Stage, make_plan
from toss_lightning.loops.plan_loop import PlanLoop
from toss_lightning.loops.strategies import check_trainer
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.module import REFERENCES
from toss_lightning.models.objective import Bilevel, Objective
from toss_lightning.progress import say
from toss_lightning.report.cards import model_card
from toss_lightning.report.summary import Summary, method_of, stage_name
from toss_lightning.scores import TokenScores
from toss_lightning.seeds import global_seed
from toss_lightning.selection import (
    Anchored,
    GlobalTopFraction,
    OnlineSelection,
    Seal,
    Selection,
    SelectorTraining,
    TokenWeights,
)


class TossLoop(PlanLoop):
    """Trains reference adapters, scores, selects and trains the target, in one fit.

    Args:
        trainer: the Trainer whose ``fit_loop`` this becomes.
        plan: steps in order.
        selection: from scores to token weights.
        epochs: passes over the custom set in ``sft`` and ``target``.
        reference_epochs: passes over the utility and harmful sets; as ``epochs`` by default.
        scores_from: a store to select from, instead of a ``score`` step.
        scores_round: the round of that store; its last one by default.
        selection_from: a selection to train the target with, instead of a ``select`` step.
        evaluation: what the step ``test`` asks of the adapters, and who judges.

    Attributes:
        rounds: how often the degraded adapter is trained again.
        promoted: the rows that each round so far added to the harmful set.

    Raises:
        ConfigError: the Trainer accumulates gradients itself, or its strategy does not leave adapters whole.
    """

    rounds = 0

    def __init__(
        self,
        trainer: Trainer,
        plan: Sequence[str] = TOSS_PLAN,
        selection: Selection | None = None,
        epochs: int = 2,
        reference_epochs: int | None = None,
        scores_from: str | None = None,
        scores_round: int | None = None,
        selection_from: str | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        check_trainer(trainer)
        super().__init__(trainer)
        self.steps, self.epochs, self.evaluation = list(plan), epochs, evaluation
        self.reference_epochs = epochs if reference_epochs is None else reference_epochs
        self.selection = selection if selection is not None else GlobalTopFraction()
        self.scores_from, self.scores_round, self.selection_from = scores_from, scores_round, selection_from
        self.promoted: list[list[int]] = []
        self.summary = Summary()
        self.selector: SelectorTraining | None = None
        self._objective_state: dict[str, Any] = {}
        self._evaluator: Evaluator | None = None
        self._weights: TokenWeights | None = None
        self._selected: str | None = None
        self._stage_started = 0.0
        self._lines = 0

    def end_with(self, step: str) -> None:
        """Leaves out what comes behind a step of the plan.

        Raises:
            ConfigError: the plan has no such step.
        """
        if step not in self.steps:
            raise ConfigError(f"loop.plan: no {step!r} step in {', '.join(self.steps)}: add it")
        self.steps = self.steps[: self.steps.index(step) + 1]

    def only_test(self) -> None:
        """Leaves out everything but the evaluation of adapters that are there."""
        self.steps = ["test"]

    # --- the plan ---------------------------------------------------------------------------------------------------

    def make_plan(self) -> Plan:
        """Checks the settings against the data and the adapters at hand, and repairs what a kill left half-renamed."""
        references = [name for name in REFERENCES if getattr(self.module.references, name)]
        sets = self.datamodule.sets
        method = self.method
        if not self._only_tests:
            method.check(self.steps, sets, self.rounds, self.module.lora, self.trainer.strategy, self.module.normalize)
        given = Given(
            sets,
            references,
            self.scores_from is not None,
            self.selection_from is not None,
            method.needs,
            self.selection.epochs if isinstance(self.selection, Seal) else 1,
        )
        plan = make_plan(self.steps, self.epochs, self.reference_epochs, given, 0 if self._only_tests else self.rounds)
        if "test" in self.steps:
            self._evaluator = self._new_evaluator()
        if not self._only_tests:
            self._check_given()
            self.datamodule.check_fits(self._served(plan))
        if self.trainer.is_global_zero:
            restore_directory(self.run_dir / "selection")
            for directory in (self.run_dir, self.run_dir / "adapters", self.run_dir / "promoted"):
                sweep(directory)
        self.trainer.strategy.barrier("directories restored")
        return plan

    def _served(self, plan: Plan) -> set[str]:
        """The sets whose rows go through the model."""
        stages = [step for step in plan.steps if isinstance(step, Stage)]
        served = {stage.set for stage in stages}
        served |= {beside.set for stage in stages if (beside := self._companions(stage)) is not None}
        if any(isinstance(step, Action) and step.kind == "score" for step in plan.steps):
            served |= {"custom", *self.selection.features.get("embedding", ())}
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
        data = self.datamodule
        evaluator = Evaluator(self.evaluation, self.trainer, data.chat, self.run_dir, data.max_tokens)
        evaluator.adapters(self.steps)
        return evaluator

    def _check_given(self) -> None:
        """Looks at the scores or the selection that are given before anything is trained."""
        if self.scores_from:
            scores = TokenScores(self._store, self.scores_round)
            scores.check(self.datamodule.sets["custom"].hashes())
            if missing := scores.missing(self.selection.columns, self.selection.features):
                raise StoreError(
                    f"loop.scores_from: {self._store} has no {', no '.join(missing)}, which"
                    f" {type(self.selection).__name__} reads: score with this selection, or choose another"
                )
        if self.selection_from:
            self._load_selection()

    def _load_selection(self) -> TokenWeights:
        weights = TokenWeights.load(self._selection_path)
        custom = self.datamodule.sets["custom"].hashes()
        weights.check(custom, self._selection_path, self.datamodule.fingerprints())
        if self._selected not in (None, weights.digest()):
            raise StoreError(
                f"{self._selection_path}: this is not the selection that the run was begun with: select again with the"
                " same settings, or start a new run"
            )
        if isinstance(self.selection, OnlineSelection) != bool(weights.columns):
            raise StoreError(
                f"{self._selection_path}: made for another kind of loop.selection than {type(self.selection).__name__}:"
                " give the one that it was made with, or select again"
            )
        return weights

    @property
    def method(self) -> Method:
        """The plug-ins of this run."""
        return Method(self.selection, self.module.correction, self.datamodule.mixture)

    def identity(self) -> dict[str, str]:
        """What the optimizer steps depend on, beside the base and the shape of the adapters."""
        return {
            "loop.selection": name_plugin(self.selection),
            "loop.scores_from": f"{self.scores_from}, round {self.scores_round}",
            "trainer.gradient_clip_val": f"{self.trainer.gradient_clip_val} {self.trainer.gradient_clip_algorithm}",
            "seed_everything": str(global_seed()),
            **self.module.identity(),
            **self.datamodule.identity(),
        }

    def state(self) -> dict[str, Any]:
        """What the target is trained with, and everything for the summary."""
        self._count_time()
        return {
            "selected": self._selected,
            "summary": self.summary.state(),
            "metrics": self._metrics.lines if self._metrics else 0,
            "selector": self.selector.state() if self.selector else {},
            "objective": self.module.objective.state() if self.stage else {},
            "correction": self.module.correction.state() if self._corrects else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the state back."""
        self.summary.load_state(state["summary"])
        self._lines = state["metrics"]
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

    def begin(self) -> None:
        """Prints what is going to happen, and measures the base."""
        weighted = any(isinstance(step, Stage) and step.weighted for step in self.plan.steps)
        self.summary.method = self.method.title(weighted, self.rounds)
        self.summary.start(self.trainer, self.plan.names)
        self.summary.precision = self.module.fingerprints()["precision"]
        self._warn_of_rounding(weighted)
        if self._metrics:
            self._metrics.forget_from(self.trainer.global_step, self._lines)
        if not self.summary.held_out:
            self.evaluate("base")
            self.summary.held_out["base"] = dict(self.module.held_out)
        else:
            say(f"Resumed: {self.trainer.global_step} optimizer steps are done; it goes on with {self.place}")
        self._stage_started = time.monotonic()

    def _warn_of_rounding(self, weighted: bool) -> None:
        """Says where divergences from the base are taken in a precision that leaves little of small ones."""
        keys, dtype = self.method.divergences(weighted), self.summary.precision.partition("/")[2]
        if not keys or dtype == "float32":
            return
        rank_zero_warn(
            f"{' and '.join(keys)}: divergences from the base are taken in {dtype}, in which small ones are rounding"
            " (docs/methods/safegrad.md says how small): set model.base.dtype: float32 where memory allows"
        )

    def end(self, complete: bool) -> None:
        """Writes the summary."""
        if self._only_tests:
            return
        if not complete:
            say("The run was cut short by the Trainer's limits: no target adapter and no summary yet.")
        elif self.trainer.is_global_zero:
            self.summary.finish(self.trainer, self.run_dir)

    # --- stages -----------------------------------------------------------------------------------------------------

    def arm(self, stage: Stage) -> None:
        """Hands the stage its rows, with what their tokens count, and the module what it minimises."""
        self._weights = None
        if stage.weighted:
            self._weights = self._load_selection()
            self._selected = self._weights.digest()
            self.summary.selection = self._weights.report
            self.summary.method = self.method.title(True, int(self._weights.report.get("round", 0)))
        module, data, is_target = self.module, self.datamodule, stage.adapter == "target"
        objective = self._new_objective(stage)
        correction = module.correction if is_target else None
        data.begin_stage(
            stage.set,
            stage.epochs,
            self._weights.values() if self._weights is not None else None,
            self._promoted_for(stage),
            mixed=is_target,
            companions=self._companions(stage),
            whole_step=objective.whole_step or (correction is not None and correction.whole_step),
        )
        module.stage_name = stage.name
        pool = partial(data.batches, "safety") if correction is not None else None
        module.begin_objective(objective, pool, len(data.sets["safety"].rows) if pool else 0)

    def _new_objective(self, stage: Stage) -> Objective | Bilevel:
        """What the steps of a stage minimise; where a checkpoint left off, with what it held."""
        objective: Objective | Bilevel
        if stage.adapter == "seal":
            self.selector = self.selector or self._new_selector()
            objective = Bilevel(self.selector)
        else:
            online = self.selection if stage.weighted and isinstance(self.selection, OnlineSelection) else None
            objective = Objective(self.module.normalize, online)
        if self._objective_state:
            objective.load_state(self._objective_state)
            self._objective_state = {}
        return objective

    def _promoted_for(self, stage: Stage) -> set[int]:
        return {row_id for rows in self.promoted[: stage.round] for row_id in rows}

    def _companions(self, stage: Stage) -> Companions | None:
        """Rows of another set that stand beside the stage's own in every step."""
        if stage.adapter == "seal" and isinstance(self.selection, Seal):
            return Companions(self.selection.safe, self.datamodule.batch_size)
        if stage.weighted and isinstance(self.selection, Anchored) and self.selection.safety_rows:
            return Companions("safety", self.selection.safety_rows, {"weight": 0.0, "anchor": self.selection.weight})
        return None

    def begin_stage(self, stage: Stage) -> None:
        """Sets the slot to where the stage starts from."""
        self.set_slot(stage)
        self.module.stage_name = stage.name
        self._stage_started = time.monotonic()
        self.summary.stages[stage.name] = {
            "set": stage.set,
            "epochs": stage.epochs,
            "steps": self.module.stage_steps,
            "rows": self.datamodule.stage_rows.own,
            "promoted": len(self._promoted_for(stage)),
            "seconds": 0.0,
        }

    def set_slot(self, stage: Stage) -> None:
        """Sets the slot to where a stage starts from: the initial weights, which change nothing about the base."""
        self.module.bank.reset()

    def end_stage(self, stage: Stage) -> None:
        """Files the adapter, its time, and the held-out losses after it."""
        module = self.module
        if module.held_out_step != self.trainer.global_step:
            self.evaluate(stage.name)
        self._count_time()
        self.summary.held_out[stage.name] = dict(module.held_out)
        self.judge(stage)
        if stage.adapter in REFERENCES and not self.is_left_out(stage):
            module.bank.copy(SLOT, stage.adapter)
        weights = self._weights.flat() if self._weights is not None else None
        card = model_card(stage.name, stage.adapter, module.bank.base_path, self.summary, weights)
        module.bank.save(SLOT, self.run_dir / "adapters" / stage.name, card, self.trainer.is_global_zero)
        self.trainer.strategy.barrier("adapter saved")

    def judge(self, stage: Stage) -> None:
        """Looks at what a stage brought, before its adapter is filed."""
        if stage.adapter == "target":
            self._judge_method()

    def _judge_method(self) -> None:
        """Files what the plug-ins did to the target, and says loudly where they did nothing."""
        module, weighted = self.module, self._weights is not None
        idle = self.method.idle(self._weights, module.objective)
        self.summary.correction = module.correction.report() if module.correction else {}
        self.summary.idle = idle
        self.summary.plain = len(idle) >= self.method.plug_ins(weighted)
        self.summary.say_idle()

    def _count_time(self) -> None:
        now = time.monotonic()
        if self.stage is not None and self.stage.name in self.summary.stages:
            self.summary.stages[self.stage.name]["seconds"] += now - self._stage_started
        self._stage_started = now

    # --- actions ----------------------------------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        """Scores the custom set, or selects from its scores."""
        started = time.monotonic()
        self.do(action)
        self.summary.stages[action.name] = {"seconds": time.monotonic() - started}

    def do(self, action: Action) -> None:
        """Does an action."""
        if action.kind == "score":
            columns = scored_columns(self.selection, self._references_at_hand())
            self.score({name: name for name in columns}, self.selection.features)
        elif action.kind == "test":
            self.test()
        else:
            self.select()

    def _references_at_hand(self) -> list[str]:
        """The reference adapters that are given, or were trained before this step."""
        trained = {step.adapter for step in self.plan.steps[: self.cursor] if isinstance(step, Stage)}
        return [name for name in REFERENCES if name in trained or getattr(self.module.references, name)]

    def score(self, columns: Mapping[str, str], features: Mapping[str, Sequence[str]], round: int = 0) -> None:
        """Files token losses and row features of the custom set in the store.

        Args:
            columns: column -> adapter that its losses are taken with.
            features: kind -> sets.
            round: the round of TOSS-Pro.
        """
        logits = self.selector.logits.tolist() if self.selector is not None else None
        self.datamodule.score(self.trainer, columns, self._store, round, self._stop_if_told, features, logits)
        scores = TokenScores(self._store)
        scores.check(self.datamodule.sets["custom"].hashes())
        self.summary.fingerprints = scores.fingerprints

    def _stop_if_told(self) -> None:
        if self.saver:
            self.saver.stop_if_told(self.trainer)

    def select(self) -> None:
        """Selects from the scores that are there; needs no model."""
        path = self.run_dir / "selection"
        if self.trainer.is_global_zero:
            self.selection.select(TokenScores(self._store, self.scores_round)).save(path)
        self.trainer.strategy.barrier("selection written")
        selected = TokenWeights.load(path)
        self._selected, self.summary.selection = selected.digest(), selected.report
        self.summary.say_selected()

    def test(self) -> None:
        """Lets the adapters reply, and files and prints what the judges say."""
        assert self._evaluator is not None
        evaluator, sets = self._evaluator, self.datamodule.sets
        benign = sets["utility_val"].rows if "utility_val" in sets else []
        findings = evaluator.find(benign, self._stop_if_told)
        if self.trainer.is_global_zero:
            if self._only_tests:
                self.summary.method = method_of(self.run_dir)
            names = {name: stage_name(self.summary, name) for name in evaluator.adapters()}
            report_evaluation(findings, evaluator, names)
        self.trainer.strategy.barrier("evaluation written")

    @property
    def _metrics(self) -> MetricsCsv | None:
        return next((logger for logger in self.trainer.loggers if isinstance(logger, MetricsCsv)), None)

    @property
    def _store(self) -> Path:
        return Path(self.scores_from) if self.scores_from else self.run_dir / "scores"

    @property
    def _selection_path(self) -> Path:
        return Path(self.selection_from) if self.selection_from else self.run_dir / "selection"
