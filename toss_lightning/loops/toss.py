"""TossLoop: what the stages and actions of a plan do, for every method that trains one target."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.errors import ModelError
from toss_lightning.evaluation import report_evaluation
from toss_lightning.loops.checkpoints import set_results_aside
from toss_lightning.loops.method import Method, scored_columns
from toss_lightning.loops.plan import Action, Stage
from toss_lightning.loops.toss_plan import TossPlan
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.bilevel import Bilevel
from toss_lightning.models.module import REFERENCES
from toss_lightning.models.objective import Objective
from toss_lightning.progress import say
from toss_lightning.ranks import on_first_rank
from toss_lightning.report.cards import Rendered, model_card
from toss_lightning.report.summary import method_of, stage_name
from toss_lightning.scores import TokenScores, degraded_column
from toss_lightning.selection import OnlineSelection, TokenWeights


class TossLoop(TossPlan):
    """Trains reference adapters, scores, selects, trains and tests the target in one fit; see :class:`TossPlan`."""

    def begin(self) -> None:
        """Prints what is going to happen, and measures the base; a plan that only tests has nothing to measure."""
        if self._only_tests:
            return
        if self.trainer.ckpt_path is None:
            self._set_results_aside()
        weighted = any(isinstance(step, Stage) and step.weighted for step in self.plan.steps)
        if not self.summary.selection:
            self.summary.method = self.method.title(weighted, self.rounds)
        elif weighted:
            # resumed behind a selection, which may be given and another method's
            self._name_by(self.summary.selection)
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
            self._ask_again()
        if self.watch is not None and any(step.name in self.watch.settings.stages for step in self.plan.steps):
            self.watch.begin(self.trainer, self.summary)
        self._stage_started = time.monotonic()

    def _set_results_aside(self) -> None:
        """Leaves of an earlier run in this directory only what this one begins with, or is to test beside its own."""
        made = self.adapters_made(self.plan) or []
        tested = self._evaluator.adapters(made) if self._evaluator is not None else {}
        if self.trainer.is_global_zero:
            set_results_aside(self.run_dir, {path for name, path in tested.items() if path and name not in made})
        self.trainer.strategy.barrier("earlier results set aside")

    def _ask_again(self) -> None:
        """Repeats the step test of a run that is past it: other things may be asked now, and what was is on file."""
        if self.cursor == len(self.plan.steps):
            for step in self.plan.steps:
                if isinstance(step, Action) and step.kind == "test":
                    self.act(step)

    def _warn_of_rounding(self, weighted: bool) -> None:
        """Says where divergences from the base are taken in a precision that leaves little of small ones."""
        keys, dtype = self.method.divergences(weighted), self.summary.precision.partition("/")[2]
        if not keys or dtype == "float32":
            return
        rank_zero_warn(
            f"{' and '.join(keys)}: divergences from the base are taken in {dtype}, in which small ones are rounding"
            " (see docs/methods/safegrad.md): set model.base.dtype: float32 where memory allows"
        )

    def end(self, complete: bool) -> None:
        """Writes the summary.

        Raises:
            ModelError: a judge has failed, which kept nothing else from being done.
        """
        if not self._only_tests and not complete:
            how = " The same command with --ckpt_path auto, and other limits, goes on." if self.saver else ""
            say(f"The run was cut short by the Trainer's limits: no target adapter and no summary yet.{how}")
        elif not self._only_tests and self.trainer.is_global_zero:
            self.summary.finish(self.trainer, self.run_dir)
        self.trainer.strategy.barrier("summary written")
        if self._failed_judges:
            reasons = "; ".join(f"{judge}: {why}" for judge, why in self._failed_judges.items())
            again = "the same command" if self._only_tests else f"toss test --run_dir {self.run_dir}"
            raise ModelError(
                f"{reasons}. What the others said is in {self.run_dir / 'evaluation'}; {again} goes on judging"
            )

    # --- stages -------------------------------------------------------------------------------------------------------

    def arm(self, stage: Stage) -> None:
        """Hands the stage its rows, with what their tokens count, and the module what it minimises."""
        self._weights = None
        if stage.weighted:
            self._weights = self._load_selection()
            self._selected = self._weights.digest()
            self.summary.selection = self._weights.report
            self._name_by(self._weights.report)
        module, data, is_target = self.module, self.datamodule, stage.adapter == "target"
        objective = self._new_objective(stage)
        correction = module.correction if is_target else None
        data.begin_stage(
            stage.set,
            stage.epochs,
            self._weights.values() if self._weights is not None else None,
            self._weights.left_out if self._weights is not None else (),
            self._promoted_for(stage),
            mixed=is_target,
            companions=self._companions(stage),
            whole_step=objective.whole_step or (correction is not None and correction.whole_step),
        )
        module.stage_name = stage.name
        pool = partial(data.batches, "safety") if correction is not None else None
        module.begin_objective(objective, pool, len(data.sets["safety"].rows) if pool else 0)

    def _name_by(self, report: Mapping[str, Any]) -> None:
        """Calls the method what the selection says that the target is trained with."""
        self.summary.method = self.method.title(True, int(report.get("round", 0)), report.get("method"))

    def _new_objective(self, stage: Stage) -> Objective | Bilevel:
        """What the steps of a stage minimise; where a checkpoint left off, with what it held."""
        if stage.adapter == "seal":
            self.selector = self.selector or self._new_selector()
            return Bilevel(self.selector)
        online = self.selection if stage.weighted and isinstance(self.selection, OnlineSelection) else None
        objective = Objective(self.module.normalize, online)
        if self._objective_state:
            objective.load_state(self._objective_state)
            self._objective_state = {}
        return objective

    def _promoted_for(self, stage: Stage) -> set[int]:
        return {row_id for rows in self.promoted[: stage.round] for row_id in rows}

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
            "mixed": self.datamodule.stage_mixed,
            "promoted": len(self._promoted_for(stage)),
            "seconds": 0.0,
        }

    def set_slot(self, stage: Stage) -> None:
        """Sets the slot to where a stage starts from: the initial weights, which change nothing about the base."""
        self.module.bank.reset()

    def between_epochs(self, stage: Stage, epochs: int) -> None:
        """Judges the epoch that was just done, where the best one is kept."""
        if self._keeps_best(stage) and len(self.summary.epochs.get(stage.name, [])) < epochs:
            self._judge_epoch(stage)

    def _keeps_best(self, stage: Stage) -> bool:
        return self.keep_epoch == "best" and stage.adapter in REFERENCES

    def _judge_epoch(self, stage: Stage) -> None:
        """Keeps the slot's weights as the reference if no epoch before did as well on held-out rows.

        A refit so takes the place of the reference before it, also one that is then left out: nothing reads either.
        """
        module = self.module
        if module.held_out_step != self.trainer.global_step:
            self.evaluate(stage.name)
        epochs = self.summary.epochs.setdefault(stage.name, [])
        epochs.append(dict(module.held_out))
        if self.summary.best_epoch(stage.name, stage.adapter) == len(epochs) - 1:
            module.bank.copy(SLOT, stage.adapter)

    def end_stage(self, stage: Stage) -> None:
        """Files the adapter, its time, and the held-out losses after it."""
        module = self.module
        if module.held_out_step != self.trainer.global_step:
            self.evaluate(stage.name)
        if self._keeps_best(stage):
            self._judge_epoch(stage)
            module.bank.copy(stage.adapter, SLOT)
            module.held_out = self.summary.keep_epoch(stage.name, stage.adapter)
        self._count_time()
        self.summary.held_out[stage.name] = dict(module.held_out)
        self.judge(stage)
        if stage.adapter in REFERENCES and not self.is_left_out(stage):
            module.bank.copy(SLOT, stage.adapter)
        weights = self._weights.flat() if self._weights is not None else None
        data = self.datamodule
        template = module.tokenizer.chat_template if data.chat_template is not None else None
        rendered = Rendered(template is not None, data.template_options)
        card = model_card(stage.name, stage.adapter, module.bank.base_path, self.summary, weights, rendered)
        module.bank.save(SLOT, self.run_dir / "adapters" / stage.name, card, self.trainer.is_global_zero, template)
        self.trainer.strategy.barrier("adapter saved")

    def judge(self, stage: Stage) -> None:
        """Looks at what a stage brought, before its adapter is filed."""
        if stage.adapter == "target":
            self._judge_method()
        elif stage.adapter in REFERENCES:
            self.summary.judge_reference(stage.name, stage.adapter)

    def _judge_method(self) -> None:
        """Files what the plug-ins did to the target, and says loudly where they did nothing."""
        module, weighted = self.module, self._weights is not None
        idle = self.method.idle(self._weights, module.objective)
        self.summary.correction = dict(module.correction.report()) if module.correction else {}
        self.summary.idle = idle
        self.summary.plain = len(idle) >= self.method.plug_ins(weighted)
        self.summary.say_idle()

    # --- actions ------------------------------------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        """Does an action, and counts its time under its name."""
        # it may have begun in a process before, whose time counts too
        self.summary.stages.setdefault(action.name, {"seconds": 0.0})
        self._action, self._stage_started = action.name, time.monotonic()
        self.do(action)
        self._count_time()
        self._action = None

    def do(self, action: Action) -> None:
        """Scores the custom set, tests the adapters, or selects from the scores."""
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
        """Files token losses and row features of the custom set in the store, and what its selection reads besides.

        Args:
            columns: column -> adapter that its losses are taken with.
            features: kind -> sets.
            round: the round of TOSS-Pro.
        """
        logits = self.selector.logits.tolist() if self.selector is not None else None
        self.datamodule.score(
            self.trainer,
            columns,
            self._store,
            round=round,
            between=self._stop_if_told,
            features=features,
            selector=logits,
            held_out=self.selection.held_out,
        )
        scores = TokenScores(self._store)
        scores.check(self.datamodule.sets["custom"].hashes())
        self.summary.fingerprints = scores.fingerprints

    def _stop_if_told(self) -> None:
        if self.stopper:
            self.stopper.stop_if_told(self.trainer)

    def select(self) -> None:
        """Selects from the scores that are there; needs no model."""
        path = self.run_dir / "selection"
        on_first_rank(self.trainer, lambda: self._selected_now().save(path))
        selected = TokenWeights.load(path)
        self._selected, self.summary.selection = selected.digest(), selected.report
        self.summary.say_selected()

    def _selected_now(self) -> TokenWeights:
        """The weights of the scores that are there, with what made them, for runs that take them over."""
        scores = TokenScores(self._store, self.scores_round)
        found = self.selection.select(scores)
        made_by = Method(self.selection)
        read = {degraded_column(scores.round) if name == "degraded" else name for name in self.selection.columns}
        about = {
            "adapters": {name: digest for name, digest in scores.adapters.items() if name in read},
            "method": made_by.selected(scores.round),
            "safety_rows": made_by.companion_rows,
            "weighed_in_training": isinstance(self.selection, OnlineSelection),
        }
        return replace(found, report={**found.report, **about})

    def test(self) -> None:
        """Lets the adapters reply, and files and prints what the judges say."""
        assert self._evaluator is not None
        evaluator, sets = self._evaluator, self.datamodule.sets
        benign = sets["utility_val"].rows if "utility_val" in sets else []
        made = self.adapters_made(self.plan)
        if self._only_tests:  # before hours of replies, for what says so may be damaged
            self.summary.method = method_of(self.run_dir, self._selection_path)
        findings = evaluator.find(benign, made, self._stop_if_told)
        names = {name: stage_name(self.summary, name) for name in evaluator.adapters(made)}
        on_first_rank(self.trainer, lambda: report_evaluation(findings, evaluator, names))
        self._failed_judges = findings.failed
