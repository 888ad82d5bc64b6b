"""TossProLoop: TOSS, with rounds in which the custom set's riskiest rows join the harmful set."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Trainer

from toss_lightning.errors import ConfigError, check_choice
from toss_lightning.evaluation import Evaluation, SafetyProbe
from toss_lightning.loops.plan import TOSS_PLAN, Action, Plan, Stage
from toss_lightning.loops.rounds import check_rounds, compare_rounds, describe_promoted, promoted_count
from toss_lightning.loops.toss import TossLoop
from toss_lightning.loops.toss_plan import KeepEpoch
from toss_lightning.models.adapters import SLOT
from toss_lightning.progress import say
from toss_lightning.ranks import on_first_rank
from toss_lightning.scores import TokenScores, degraded_column
from toss_lightning.seeds import global_seed
from toss_lightning.selection import Promotion, Selection, promote

Refit = Literal["from_scratch", "continue"]


class TossProLoop(TossLoop):
    """Runs a plan: the reference adapters, scoring, rounds of promotion, selection, and the target, in one fit.

    With the default plan, TOSS; with ``rounds``, TOSS-Pro (Algorithm 1 of arXiv 2603.01185). ``[target]`` alone is
    plain fine-tuning.

    Args:
        trainer: the Trainer whose ``fit_loop`` this becomes; filled in by the command line.
        plan: steps in order: ``utility``, ``degraded`` (train a reference adapter), ``score`` (token losses of the
            custom set, and whatever else the selection reads), ``select`` (token weights), ``sft`` (plain fine-tuning,
            as a control), ``target``, ``test`` (evaluation of the base, ``sft`` and ``target``); and ``seal``, which
            trains the selector that the selection ``Seal`` reads.
        selection: from scores to token weights.
        epochs: passes over the custom set in ``sft`` and ``target``.
        reference_epochs: passes over the utility and harmful sets; as ``epochs`` by default.
        keep_epoch: a reference is what its ``last`` epoch leaves, or its ``best`` one: that behind which its own
            held-out loss, on ``utility_val`` or on ``harmful_val``, is lowest; so with each refit (ours).
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
        evaluation: what the step ``test`` asks of the adapters, and who judges.
        safety_probe: what is measured of ``sft`` and ``target`` while they train, and the drift that ends them; not
            probed by default.

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
        keep_epoch: KeepEpoch = "last",
        rounds: int = 0,
        promote: int | float = 0.5,
        promotion: Promotion = "top_tokens",
        promote_again: bool = False,
        refit: Refit = "from_scratch",
        stop_early: bool = False,
        scores_from: str | None = None,
        scores_round: int | None = None,
        selection_from: str | None = None,
        evaluation: Evaluation | None = None,
        safety_probe: SafetyProbe | None = None,
    ) -> None:
        check_choice("loop.promotion", promotion, Promotion)
        check_choice("loop.refit", refit, Refit)
        super().__init__(
            trainer,
            plan=plan,
            selection=selection,
            epochs=epochs,
            reference_epochs=reference_epochs,
            keep_epoch=keep_epoch,
            scores_from=scores_from,
            scores_round=scores_round,
            selection_from=selection_from,
            evaluation=evaluation,
            safety_probe=safety_probe,
        )
        self.rounds, self.promote, self.promotion = rounds, promote, promotion
        self.promote_again, self.refit, self.stop_early = promote_again, refit, stop_early

    def make_plan(self) -> Plan:
        """Checks the settings of the rounds too."""
        plan, sets = super().make_plan(), self.datamodule.sets
        if any(step.round for step in plan.steps):
            check_rounds(self.rounds, self._promoted_count, self.promote_again, len(sets["custom"].rows))
            trained = {step.adapter for step in plan.steps if isinstance(step, Stage)}
            if "utility" not in trained and self.module.references.utility is None:
                raise ConfigError(
                    "loop.rounds: rows are promoted by token scores, which need a utility reference: put utility into"
                    " loop.plan, give model.references.utility, or set rounds to 0"
                )
            if self.stop_early and "harmful_val" not in sets:
                raise ConfigError("loop.stop_early: needs held-out harmful rows: give data.harmful_val or data.holdout")
            if self.stop_early:
                self._check_all_held_out("loop.stop_early: the last round")
        return plan

    def identity(self) -> dict[str, str]:
        """Adds how rows are promoted."""
        rounds = f"{self.promote} by {self.promotion}, again={self.promote_again}, {self.refit}"
        way = f"{rounds}, early={self.stop_early}" if self.rounds else "none"
        return {"way of promoting rows": way, **super().identity()}

    def state(self) -> dict[str, Any]:
        """Adds the promoted rows."""
        return {**super().state(), "promoted": [list(rows) for rows in self.promoted]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the state back."""
        super().load_state(state)
        self.promoted = state["promoted"]

    # --- stages -----------------------------------------------------------------------------------------------------

    def set_slot(self, stage: Stage) -> None:
        """A refit starts from the initial weights or from the last round's adapter."""
        if stage.round and degraded_column(stage.round - 1) not in self.summary.held_out:
            self._measure_given(degraded_column(stage.round - 1))
        if stage.round and self.refit == "continue":
            self.module.bank.copy("degraded", SLOT)
        else:
            super().set_slot(stage)

    def _measure_given(self, name: str) -> None:
        """Held-out losses of a degraded adapter that was not trained here, for the first refit to be compared with."""
        with self.module.using("degraded"):
            self.evaluate(name)
        self.summary.held_out[name] = dict(self.module.held_out)
        self.summary.of_round(0)["harmful_loss"] = self.module.held_out.get("harmful_loss")
        self.summary.judge_reference(name, "degraded")
        self.module.held_out_step = -1  # they are not the slot's

    def judge(self, stage: Stage) -> None:
        """Looks at whether a refit made the degraded adapter more degraded."""
        super().judge(stage)
        if stage.round:
            self._judge_refit(stage)

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

    # --- actions ----------------------------------------------------------------------------------------------------

    def do(self, action: Action) -> None:
        """Promotes rows too, and scores again with the degraded adapter of a round."""
        if action.kind == "promote":
            self._promote(action.round)
        elif action.kind == "score" and action.round:
            # the utility adapter never changes, so its losses are taken once
            self.score({degraded_column(action.round): "degraded"}, {}, action.round)
        else:
            super().do(action)

    def score(self, columns: Mapping[str, str], features: Mapping[str, Sequence[str]], round: int = 0) -> None:
        """Says besides how the mask moved."""
        super().score(columns, features, round)
        if not self.rounds:
            return
        moved = on_first_rank(self.trainer, lambda: compare_rounds(self.selection, self._store, round))
        if not self.trainer.is_global_zero:
            return
        facts = self.summary.of_round(round)
        facts.update(moved)
        if not round:
            facts["harmful_loss"] = self.summary.held_out.get("degraded", {}).get("harmful_loss")
        self.summary.say_round(round)
        numbers = {name: value for name, value in facts.items() if isinstance(value, (int, float))}
        numbers = {f"rounds/{name}": value for name, value in numbers.items() if name != "round"}
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, self.trainer.global_step)

    def _promote(self, round: int) -> None:
        before = {row_id for rows in self.promoted for row_id in rows}
        scores, taken = TokenScores(self._store, round - 1), () if self.promote_again else before
        seeds = [global_seed(), round]
        chosen = on_first_rank(
            self.trainer, lambda: promote(scores, self._promoted_count, self.promotion, taken, seeds)
        )
        if self.stop_early and before >= set(chosen):
            self.last_round = round - 1
            say(f"round {round}: no new row would be promoted, so the rounds end")
            return
        self.promoted = [*self.promoted, chosen]
        if self.trainer.is_global_zero:
            facts = describe_promoted(scores, chosen, round, self.run_dir / "promoted" / f"round-{round}.json")
            self.summary.of_round(round).update(facts)

    @property
    def _promoted_count(self) -> int:
        return promoted_count(self.promote, len(self.datamodule.sets["harmful"].rows))
