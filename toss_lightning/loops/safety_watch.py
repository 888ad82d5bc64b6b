"""The safety probe in a run: when it is taken, where its values go, and what ends a stage."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.errors import TrainingError
from toss_lightning.evaluation import SafetyProbe, SafetyProber
from toss_lightning.models.adapters import BASE, SLOT, AdapterBank
from toss_lightning.progress import say
from toss_lightning.report.summary import Summary


class SafetyWatch(Callback):
    """Probes the adapter every N optimizer steps, and ends a stage whose margin fell too far.

    Lightning calls callbacks that write checkpoints behind all others, so that the checkpoint of a step holds what its
    probe said.

    Args:
        settings: what to probe, and how far is too far.
    """

    def __init__(self, settings: SafetyProbe) -> None:
        self.settings = settings
        self._prober: SafetyProber | None = None
        self._within: dict[str, Tensor] = {}

    def prepare(self, trainer: Trainer, chat: ChatTokenizer, max_tokens: int, steps: tuple[str, ...]) -> None:
        """Reads the pairs, so that what is wrong with them is said before anything is trained.

        Args:
            trainer: holds the module and the strategy.
            chat: renders the pairs.
            max_tokens: padded tokens that a device holds at once.
            steps: the steps of the plan, as written.

        Raises:
            ConfigError: a setting cannot work.
            DataError: the pairs cannot be read.
        """
        self._prober = SafetyProber(self.settings, trainer, chat, max_tokens, steps)

    @property
    def prober(self) -> SafetyProber:
        """What was prepared."""
        assert self._prober is not None
        return self._prober

    def begin(self, trainer: Trainer, summary: Summary) -> None:
        """Measures the base, once in a run."""
        if summary.safety_probe:
            return
        base = self.prober.measure(BASE)
        self._check_margin(BASE, base)
        counts = {"pairs": self.prober.read, "pairs_given": self.prober.given, "max_drop": self.settings.max_drop}
        summary.safety_probe = {**counts, "base": base, "stages": {}}
        self._log(trainer, BASE, base)
        refusal = f", refusal's first token {base['refusal']:.2%}" if "refusal" in base else ""
        say(
            f"safety probe, base: margin of the safe reply {base['margin']:+.3f} nats{refusal}; {self.prober.read} of"
            f" {self.prober.given} pairs, every {self.settings.every} optimizer steps of"
            f" {' and '.join(self.settings.stages)}"
        )

    def _check_margin(self, of: str, values: Mapping[str, float]) -> None:
        """Stops a run with a limit whose margin is no finite number, which would never reach it.

        Raises:
            TrainingError: it is not finite.
        """
        if self.settings.max_drop is not None and not math.isfinite(values["margin"]):
            raise TrainingError(
                f"loop.safety_probe.max_drop: the margin of {of} is no finite number ({values['margin']}): set"
                " model.base.dtype to float32, or look at the rows of loop.safety_probe.pairs"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probes behind an optimizer step whose turn it is."""
        loop: Any = trainer.fit_loop
        name = loop.stage.name
        if (batch_idx + 1) % trainer.accumulate_grad_batches or name not in self.settings.stages:
            return
        step, steps = loop.step_in_stage, loop.module.stage_steps
        if step % self.settings.every and step != steps:
            return
        summary: Summary = loop.summary
        values, base = self.prober.measure(SLOT), summary.safety_probe["base"]
        self._check_margin(name, values)
        values |= {f"{key}_drift": values[key] - base[key] for key in ("margin", "refusal") if key in values}
        summary.safety_probe["stages"].setdefault(name, []).append({"step": step, **values})
        self._log(trainer, name, values)
        say(f"safety probe, {name} {step}/{steps}: {_words(values)}")
        too_far = self.settings.max_drop is not None and -values["margin_drift"] > self.settings.max_drop
        if trainer.strategy.reduce_boolean_decision(too_far, all=False):
            self._end(loop, step, steps, -values["margin_drift"])
        elif self.settings.max_drop is not None and self.settings.restore:
            self._within = {key: value.detach().clone() for key, value in loop.module.bank.parameters(SLOT)}
        if step == steps:
            self._within = {}

    def _end(self, loop: Any, step: int, steps: int, drop: float) -> None:
        """Ends the stage, and says so where nobody overlooks it."""
        summary, name = loop.summary, loop.stage.name
        reason = (
            f"stage {name} was stopped at step {step} of {steps}: the margin of the safe reply lay {drop:.3f} nats"
            f" below the base's, and loop.safety_probe.max_drop is {self.settings.max_drop:g}"
        )
        kept = step
        if self.settings.restore:
            probes = summary.safety_probe["stages"][name]
            kept = probes[-2]["step"] if len(probes) > 1 else 0
            self._restore(loop.module.bank)
            reason += f"; its weights are those of step {kept}" + ("" if kept else ", which are the base's")
        self._within = {}
        summary.stages[name] |= {"steps": step, "planned_steps": steps, "kept_step": kept}
        summary.stopped[name] = reason
        say(f"WARNING: {reason}")
        loop.end_stage_early()

    @torch.no_grad()
    def _restore(self, bank: AdapterBank) -> None:
        """Takes the slot back to the last probe within the limit; every stage that is probed begins with the base."""
        if not self._within:
            bank.reset()
            return
        for name, value in bank.parameters(SLOT):
            value.copy_(self._within[name])

    # --- what is kept -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Set, so that a checkpoint does not depend on the settings, which the run's identity compares."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """The weights to go back to."""
        return {"within": self._within}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self._within = state_dict["within"]

    def _log(self, trainer: Trainer, stage: str, values: Mapping[str, float]) -> None:
        named = {f"{stage}/probe_{key}": value for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, trainer.global_step)


def _words(values: Mapping[str, float]) -> str:
    """The values of a probe, each with its drift from the base."""
    refusal = ""
    if "refusal" in values:
        refusal = f", refusal {values['refusal']:.2%} ({100 * values['refusal_drift']:+.2f} points)"
    return (
        f"margin {values['margin']:+.3f} nats ({values['margin_drift']:+.3f}){refusal}, KL from the base"
        f" {values['divergence']:.4f}"
    )
