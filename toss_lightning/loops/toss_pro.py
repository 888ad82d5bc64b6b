"""TossProLoop: what the stages and actions of TOSS and TOSS-Pro do."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.files import restore_directory, sweep
from toss_lightning.identity import settings_of
from toss_lightning.loops.metrics import MetricsCsv
from toss_lightning.loops.plan import TOSS_PLAN, Action, Given, Plan, Stage, make_plan
from toss_lightning.loops.plan_loop import PlanLoop
from toss_lightning.loops.rounds import check_rounds, compare_rounds, describe_promoted, promoted_count
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.module import REFERENCES
from toss_lightning.progress import say
from toss_lightning.report.cards import model_card
from toss_lightning.report.summary import Summary
from toss_lightning.scores import TokenScores, degraded_column
from toss_lightning.seeds import global_seed
from toss_lightning.selection import GlobalTopFraction, Promotion, Selection, TokenWeights, promote

Refit = Literal["from_scratch", "continue"]


class TossProLoop(PlanLoop):
    """Runs a plan: the reference adapters, scoring, rounds of promotion, selection, and the target, in one fit.

    With the default plan, TOSS; with ``rounds``, TOSS-Pro (Algorithm 1 of arXiv 2603.01185). ``[target]`` alone is
    plain fine-tuning.

    Args:
        trainer: the Trainer whose ``fit_loop`` this becomes; filled in by the command line.
        plan: steps in order: ``utility``, ``degraded`` (train a reference adapter), ``score`` (token losses of the
            custom set), ``select`` (token weights), ``sft`` (plain fine-tuning, as a control), ``target``.
        selection: from scores to token weights.
        epochs: passes over the custom set in ``sft`` and ``target``.
        reference_epochs: passes over the utility and harmful sets; as ``epochs`` by default.
        rounds: how often, behind ``score`` (and not in a plan without that step), rows of the custom set are promoted
            into the harmful set, the degraded adapter is trained again on it, and the custom set is scored again; the
            paper finds 1 to 2 useful.
        promote: rows that a round promotes: a whole number, or a share of the harmful set; the paper gives no number.
        promotion: ``top_tokens`` walks down the ranked tokens and takes their rows (the paper), ``row_mean`` takes the
            rows of the highest mean score (ours), ``random`` any rows (the paper's ablation).
        promote_again: a row promoted before may be taken again, and counts: the other reading of the algorithm.
        refit: how the degraded adapter is trained again: ``from_scratch``, or ``continue`` from the last round's.
        stop_early: no further round once a refit does not lower the held-out harmful loss, whose scores are then not
            taken, or once a round promotes no new row (ours).
        scores_from: a store to select from, instead of a ``score`` step.
        scores_round: the round of that store; its last one by default.
        selection_from: a selection to train the target with, instead of a ``select`` step; it may come from another
            base with the same tokenizer.

    Raises:
        ConfigError: the Trainer accumulates gradients itself, or its strategy does not leave adapters whole.
    """

    def __init__(
        self,
        trainer: Trainer,
        plan: Sequence[str] = TOSS_PLAN,
        selection: Selection | None = None,
        epochs: int = 2,
        reference_epochs: int | None = None,
        rounds: int = 0,
        promote: int | float = 0.5,
        promotion: Promotion = "top_tokens",
        promote_again: bool = False,
        refit: Refit = "from_scratch",
        stop_early: bool = False,
        scores_from: str | None = None,
        scores_round: int | None = None,
        selection_from: str | None = None,
    ) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                "trainer.accumulate_grad_batches: leave it at 1: data.batch_size counts the rows of an optimizer step,"
                " and data.max_tokens cuts them into micro-batches"
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise ConfigError(
                f"trainer.strategy: {type(trainer.strategy).__name__} would shard the base, which a 4-bit base does not"
                " survive: use auto or ddp, or for an unquantised base configs/trainer/fsdp2.yaml"
            )
        # the attribute has no public name; the default would scatter a checkpoint of megabytes over a directory
        if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.strategy._save_distributed_checkpoint:
            raise ConfigError("trainer.strategy: set save_distributed_checkpoint: false: a checkpoint is one file here")
        for name, value, kind in (("promotion", promotion, Promotion), ("refit", refit, Refit)):
            if value not in get_args(kind):
                raise ConfigError(f"loop.{name}: {value!r} is not one of {', '.join(get_args(kind))}")
        super().__init__(trainer)
        self.steps, self.epochs = list(plan), epochs
        self.reference_epochs = epochs if reference_epochs is None else reference_epochs
        self.selection = selection if selection is not None else GlobalTopFraction()
        self.rounds, self.promote, self.promotion = rounds, promote, promotion
        self.promote_again, self.refit, self.stop_early = promote_again, refit, stop_early
        self.scores_from, self.scores_round, self.selection_from = scores_from, scores_round, selection_from
        self.promoted: list[list[int]] = []
        self.summary = Summary()
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

    # --- the plan ---------------------------------------------------------------------------------------------------

    def make_plan(self) -> Plan:
        """Checks the settings against the data and the adapters at hand, and repairs what a kill left half-renamed."""
        references = [name for name in REFERENCES if getattr(self.module.references, name)]
        sets = self.datamodule.sets
        given = Given(sets, references, self.scores_from is not None, self.selection_from is not None)
        plan = make_plan(self.steps, self.epochs, self.reference_epochs, given, self.rounds)
        if any(step.round for step in plan.steps):
            check_rounds(self.rounds, self._promoted_count, self.promote_again, len(sets["custom"].rows))
            if self.stop_early and ("harmful_val" not in sets or not self.trainer.limit_val_batches):
                raise ConfigError("loop.stop_early: needs held-out harmful rows: give data.harmful_val or data.holdout")
        self._check_given()
        if self.trainer.is_global_zero:
            restore_directory(self.run_dir / "selection")
            for directory in (self.run_dir, self.run_dir / "adapters", self.run_dir / "promoted"):
                sweep(directory)
        self.trainer.strategy.barrier("directories restored")
        return plan

    def _check_given(self) -> None:
        """Looks at the scores or the selection that are given before anything is trained."""
        if self.scores_from:
            TokenScores(self._store, self.scores_round).check(self.datamodule.sets["custom"].hashes())
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
        return weights

    def identity(self) -> dict[str, str]:
        """What the optimizer steps depend on, beside the base and the shape of the adapters."""
        rounds = f"{self.promote} by {self.promotion}, again={self.promote_again}, {self.refit}"
        return {
            "way of promoting rows": f"{rounds}, early={self.stop_early}" if self.rounds else "none",
            "loop.selection": f"{type(self.selection).__name__} {settings_of(self.selection)}",
            "loop.scores_from": f"{self.scores_from}, round {self.scores_round}",
            "trainer.gradient_clip_val": f"{self.trainer.gradient_clip_val} {self.trainer.gradient_clip_algorithm}",
            "seed_everything": str(global_seed()),
            **self.module.identity(),
            **self.datamodule.identity(),
        }

    def state(self) -> dict[str, Any]:
        """The promoted rows, what the target is trained with, and everything for the summary."""
        self._count_time()
        return {
            "promoted": [list(rows) for rows in self.promoted],
            "selected": self._selected,
            "summary": self.summary.state(),
            "metrics": self._metrics.lines if self._metrics else 0,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the state back."""
        self.promoted = state["promoted"]
        self.summary.load_state(state["summary"])
        self._lines = state["metrics"]
        self._selected = state["selected"]

    def begin(self) -> None:
        """Prints what is going to happen, and measures the base."""
        self.summary.start(self.trainer, self.plan.names)
        if self._metrics:
            self._metrics.forget_from(self.trainer.global_step, self._lines)
        if not self.summary.held_out:
            self.evaluate("base")
            self.summary.held_out["base"] = dict(self.module.held_out)
        else:
            say(f"Resumed: {self.trainer.global_step} optimizer steps are done; it goes on with {self.place}")
        self._stage_started = time.monotonic()

    def end(self, complete: bool) -> None:
        """Writes the summary."""
        if not complete:
            say("The run was cut short by the Trainer's limits: no target adapter and no summary yet.")
        elif self.trainer.is_global_zero:
            self.summary.finish(self.trainer, self.run_dir)

    # --- stages -----------------------------------------------------------------------------------------------------

    def arm(self, stage: Stage) -> None:
        """Hands the stage its rows: those of its set, promoted ones, token weights."""
        self._weights = None
        if stage.weighted:
            self._weights = self._load_selection()
            self._selected = self._weights.digest()
            self.summary.selection = self._weights.report
        weights = self._weights.weights if self._weights is not None else None
        promoted = {row_id for rows in self.promoted[: stage.round] for row_id in rows}
        self.datamodule.begin_stage(stage.set, stage.epochs, weights, promoted)
        self.module.stage_name = stage.name

    def begin_stage(self, stage: Stage) -> None:
        """Sets the slot to where the stage starts from."""
        bank = self.module.bank
        if stage.round and degraded_column(stage.round - 1) not in self.summary.held_out:
            self._measure_given(degraded_column(stage.round - 1))
        if stage.round and self.refit == "continue":
            bank.copy("degraded", SLOT)
        else:
            bank.reset()
        self.module.stage_name = stage.name
        self._stage_started = time.monotonic()
        self.summary.stages[stage.name] = {
            "set": stage.set,
            "epochs": stage.epochs,
            "steps": self.module.stage_steps,
            "rows": len(self.datamodule.stage_rows),
            "promoted": len(self.datamodule.stage_rows) - len(self.datamodule.sets[stage.set].rows),
            "seconds": 0.0,
        }

    def _measure_given(self, name: str) -> None:
        """Held-out losses of a degraded adapter that was not trained here, for the first refit to be compared with."""
        with self.module.using("degraded"):
            self.evaluate(name)
        self.summary.held_out[name] = dict(self.module.held_out)
        self.summary.of_round(0)["harmful_loss"] = self.module.held_out.get("harmful_loss")
        self.module.held_out_step = -1  # they are not the slot's

    def end_stage(self, stage: Stage) -> None:
        """Files the adapter, its time, and the held-out losses after it."""
        module = self.module
        if module.held_out_step != self.trainer.global_step:
            self.evaluate(stage.name)
        self._count_time()
        self.summary.held_out[stage.name] = dict(module.held_out)
        if stage.round:
            self._judge_refit(stage)
        if stage.adapter in REFERENCES and not self.is_left_out(stage):
            module.bank.copy(SLOT, stage.adapter)
        weights = self._weights.flat() if self._weights is not None else None
        card = model_card(stage.name, stage.adapter, module.bank.base_path, self.summary, weights)
        module.bank.save(SLOT, self.run_dir / "adapters" / stage.name, card, self.trainer.is_global_zero)
        self.trainer.strategy.barrier("adapter saved")

    def _judge_refit(self, stage: Stage) -> None:
        """Ends the rounds at the last one whose refit lowered the held-out harmful loss, where that is wanted."""
        names = (degraded_column(stage.round - 1), stage.name)
        before, now = (self.summary.held_out[name].get("harmful_loss") for name in names)
        self.summary.of_round(stage.round)["harmful_loss"] = now
        if self.stop_early and before is not None and now is not None and now >= before:
            self.last_round = stage.round - 1
            say(
                f"round {stage.round}: the held-out harmful loss did not fall ({before:.3f} to {now:.3f}), so the"
                f" rounds end and the scores of round {self.last_round} are used"
            )

    def _count_time(self) -> None:
        now = time.monotonic()
        if self.stage is not None and self.stage.name in self.summary.stages:
            self.summary.stages[self.stage.name]["seconds"] += now - self._stage_started
        self._stage_started = now

    # --- actions ----------------------------------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        """Scores the custom set, promotes rows of it, or selects from its scores."""
        started = time.monotonic()
        if action.kind == "score":
            self._score(action.round)
        elif action.kind == "promote":
            self._promote(action.round)
        else:
            self.select()
        self.summary.stages[action.name] = {"seconds": time.monotonic() - started}

    def _score(self, round: int) -> None:
        # the utility adapter never changes, so its losses are taken once
        columns = {degraded_column(round): "degraded"} if round else {name: name for name in REFERENCES}
        self.datamodule.score(self.trainer, columns, self._store, round, self._stop_if_told)
        scores = TokenScores(self._store)
        scores.check(self.datamodule.sets["custom"].hashes())
        self.summary.fingerprints = scores.fingerprints
        if self.rounds and self.trainer.is_global_zero:
            facts = self.summary.of_round(round)
            facts.update(compare_rounds(self.selection, self._store, round))
            if not round:
                facts["harmful_loss"] = self.summary.held_out.get("degraded", {}).get("harmful_loss")
            self.summary.say_round(round)
            numbers = {name: value for name, value in facts.items() if isinstance(value, (int, float))}
            numbers = {f"rounds/{name}": value for name, value in numbers.items() if name != "round"}
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers, self.trainer.global_step)

    def _stop_if_told(self) -> None:
        if self.saver:
            self.saver.stop_if_told(self.trainer)

    def _promote(self, round: int) -> None:
        before = {row_id for rows in self.promoted for row_id in rows}
        chosen: list[int] = []
        if self.trainer.is_global_zero:
            scores, taken = TokenScores(self._store, round - 1), () if self.promote_again else before
            chosen = promote(scores, self._promoted_count, self.promotion, taken, [global_seed(), round])
        chosen = self.trainer.strategy.broadcast(chosen)
        if self.stop_early and before >= set(chosen):
            self.last_round = round - 1
            say(f"round {round}: no new row would be promoted, so the rounds end")
            return
        self.promoted = [*self.promoted, chosen]
        if self.trainer.is_global_zero:
            facts = describe_promoted(scores, chosen, round, self.run_dir / "promoted" / f"round-{round}.json")
            self.summary.of_round(round).update(facts)

    def select(self) -> None:
        """Selects from the scores that are there; needs no model."""
        path = self.run_dir / "selection"
        if self.trainer.is_global_zero:
            self.selection.select(TokenScores(self._store, self.scores_round)).save(path)
        self.trainer.strategy.barrier("selection written")
        selected = TokenWeights.load(path)
        self._selected, self.summary.selection = selected.digest(), selected.report
        self.summary.say_selected()

    @property
    def _promoted_count(self) -> int:
        return promoted_count(self.promote, len(self.datamodule.sets["harmful"].rows))

    @property
    def _metrics(self) -> MetricsCsv | None:
        return next((logger for logger in self.trainer.loggers if isinstance(logger, MetricsCsv)), None)

    @property
    def _store(self) -> Path:
        return Path(self.scores_from) if self.scores_from else self.run_dir / "scores"

    @property
    def _selection_path(self) -> Path:
        return Path(self.selection_from) if self.selection_from else self.run_dir / "selection"
