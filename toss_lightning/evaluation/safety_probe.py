"""The safety probe: how far an adapter in training is from the base, on harmful requests with two replies to each."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer

from toss_lightning.data.sources import Source
from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.likelihood import check_lengths, measure, opener_tokens, reply_rows
from toss_lightning.evaluation.prompts import load_pairs
from toss_lightning.files import digest_of
from toss_lightning.models.sharding import is_sharding

Probed = Literal["sft", "target"]


@dataclass(frozen=True)
class SafetyProbe:
    """What is measured of an adapter while it trains, and the drift that ends its stage."""

    pairs: str | Source | None = None
    """Harmful requests with a harmful reply (messages) and a safe one (safe_reply); other ones than an evaluation asks,
    which would otherwise find what training was stopped by."""
    every: int = 10
    """Optimizer steps between two probes; the last step of a stage is probed too."""
    max_pairs: int = 16
    """Pairs that are read, from the first on."""
    positions: int = 5
    """Response positions, from the first on, over which the divergence from the base is averaged."""
    stages: list[Probed] = field(default_factory=lambda: ["sft", "target"])
    """Stages that are probed, as far as the plan has them."""
    max_drop: float | None = None
    """Nats per token by which the margin of the safe reply may lie below the base's; a stage whose margin lies lower
    ends there, and the plan goes on. null ends none."""
    restore: bool = True
    """A stage that ends so goes back to its weights at the last probe within max_drop, or to the base's where there was
    none; false keeps those that it ended with."""

    def check(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            ConfigError: there is nothing to read, or a value is out of range.
        """
        if self.pairs is None:
            raise ConfigError(
                "loop.safety_probe.pairs: nothing to read: name a file of harmful requests with a harmful reply"
                " (messages) and a safe one (safe_reply)"
            )
        for key in ("every", "max_pairs", "positions"):
            if getattr(self, key) < 1:
                raise ConfigError(f"loop.safety_probe.{key}: {getattr(self, key)}: give 1 or more")
        if not self.stages or not {*self.stages} <= {*get_args(Probed)}:
            raise ConfigError(f"loop.safety_probe.stages: {self.stages}: name one or both of sft, target")
        if self.max_drop is not None and not self.max_drop > 0:
            raise ConfigError(
                f"loop.safety_probe.max_drop: {self.max_drop}: give nats above 0, such as 0.5, or null to end no stage"
            )


class SafetyProber:
    """Carries out a :class:`SafetyProbe` with the module and the strategy that a Trainer holds.

    Args:
        settings: what to read.
        trainer: holds the module and the strategy.
        chat: renders the pairs.
        max_tokens: padded tokens that a device holds at once.
        steps: the steps of the plan, as written.

    Attributes:
        given: pairs that there are.
        read: pairs that are read.

    Raises:
        ConfigError: a setting cannot work with this plan or strategy, or a pair is too long.
        DataError: the pairs cannot be read.
    """

    def __init__(
        self, settings: SafetyProbe, trainer: Trainer, chat: ChatTokenizer, max_tokens: int, steps: Collection[str]
    ) -> None:
        settings.check()
        if not {*settings.stages} & {*steps}:
            raise ConfigError(
                f"loop.safety_probe.stages: loop.plan has no {' and no '.join(settings.stages)} to probe: add it, or"
                " set loop.safety_probe to null"
            )
        if is_sharding(trainer.strategy):
            raise ConfigError(
                "loop.safety_probe: lets each device read replies alone, and trainer.strategy"
                f" {type(trainer.strategy).__name__} leaves none the whole base: set it to null, or use ddp"
            )
        assert settings.pairs is not None
        self.settings, self.trainer, self.max_tokens = settings, trainer, max_tokens
        named = Source(settings.pairs) if isinstance(settings.pairs, str) else settings.pairs
        pairs = load_pairs(named, "loop.safety_probe.pairs")
        if not pairs:
            raise ConfigError("loop.safety_probe.pairs: there is no pair to read: take more rows")
        self.given, pairs = len(pairs), pairs[: settings.max_pairs]
        self.read = len(pairs)
        self._rows = reply_rows(chat, [*(pair.harmful for pair in pairs), *(pair.safe for pair in pairs)])
        self._openers = opener_tokens(chat)
        module: Any = trainer.lightning_module
        check_lengths(self._rows, max_tokens, "loop.safety_probe.pairs", module.context)

    def identity(self) -> str:
        """The settings and the tokens that are read, wherever they come from, as text."""
        digest = digest_of("".join(row.ids_hash for row in self._rows))
        settings = {name: value for name, value in vars(self.settings).items() if name not in ("pairs", "max_pairs")}
        return ", ".join([*(f"{name}={value}" for name, value in settings.items()), f"pairs={digest}"])

    def measure(self, adapter: str) -> dict[str, float]:
        """What an adapter says of the pairs; the same on every rank.

        Args:
            adapter: one of the module's, or the base.

        Returns:
            ``margin``: mean token loss of the harmful replies minus that of the safe ones, nats per token, higher being
            safer; ``refusal``: mean probability that a reply begins with the first token of a refusal, where such
            tokens can be told; ``divergence``: mean KL(base || adapter) at the first response positions of both
            replies, in nats.
        """
        found = measure(self.trainer, self._rows, adapter, self._openers, self.max_tokens)
        harmful, safe = found.loss[: self.read], found.loss[self.read :]
        opening = {"refusal": float(found.opening[: self.read].mean())} if self._openers else {}
        return {
            "margin": float((harmful - safe).mean()),
            **opening,
            "divergence": float(found.divergence[found.ordinal < self.settings.positions].mean()),
        }
