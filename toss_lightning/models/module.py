"""The LightningModule: masked (weighted) LoRA fine-tuning of a frozen, usually 4-bit, base."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from toss_lightning.errors import ConfigError, TrainingError
from toss_lightning.gradients import Correction
from toss_lightning.identity import check_identity, identify, settings_of
from toss_lightning.models.adapters import BASE, SLOT, AdapterBank, Lora
from toss_lightning.models.base import Base, compute_dtype, context_of, describe, load_base, load_tokenizer, resolve
from toss_lightning.models.bilevel import Bilevel
from toss_lightning.models.divergence import base_divergence
from toss_lightning.models.fingerprint import stored_digest
from toss_lightning.models.losses import CHUNK, OutputHead, check_head, response_hidden, token_losses
from toss_lightning.models.objective import Batch, Objective
from toss_lightning.models.optim import Optim, Schedule, make_optimizer
from toss_lightning.models.probe import ModelProbe
from toss_lightning.models.sharding import check_sharding, is_sharding, shard_layers
from toss_lightning.progress import say
from toss_lightning.ranks import widest
from toss_lightning.seeds import global_seed

REFERENCES = ("utility", "degraded")


@dataclass(frozen=True)
class References:
    """Reference adapters that exist already; their stage is then skipped."""

    utility: str | None = None
    """PEFT directory or hub id of an adapter trained on the utility set."""
    degraded: str | None = None
    """PEFT directory or hub id of an adapter trained on the harmful set."""


class WeightedLoraModule(LightningModule):
    """Trains one LoRA adapter at a time on weighted token losses, and scores tokens with any of them.

    The loss of an optimizer step is ``sum_ij w_ij l_ij / Z`` over its response tokens j of rows i. TOSS writes weights
    of 0 for the riskiest tokens, which stay in the context of the others (Algorithm 1 of arXiv 2603.01185).

    Args:
        base: the frozen model.
        lora: the shape of its adapters.
        references: adapters that need no training.
        optim: optimizer.
        schedule: learning rate over a stage.
        normalize: Z, taken over the whole optimizer step, accumulation and ranks included: ``all`` response tokens,
            masked ones too (the paper's loss), the sum of the weights of the tokens ``kept``, or each ``row``'s own
            sum of weights times the number of rows that keep a token.
        chunk: response tokens whose logits are held at once.
        correction: what changes the gradient of the target's steps before they are taken.
        anchor_top: where a selection anchors tokens to the base, how many of the base's likeliest next tokens are told
            apart in ``KL(base || target)``, the others being one; all by default.
    """

    def __init__(
        self,
        base: Base = Base(),
        lora: Lora = Lora(),
        references: References = References(),
        optim: Optim = Optim(),
        schedule: Schedule = Schedule(),
        normalize: Literal["all", "kept", "row"] = "all",
        chunk: int = CHUNK,
        correction: Correction | None = None,
        anchor_top: int | None = None,
    ) -> None:
        # No save_hyperparameters(): a checkpoint would then override the configuration of the run that resumes it.
        super().__init__()
        self.base, self.lora, self.references = base, lora, references
        self.optim, self.schedule, self.normalize, self.chunk = optim, schedule, normalize, chunk
        for settings in (lora, optim, schedule):
            settings.check()
        if chunk < 1:
            raise ConfigError(f"model.chunk: {chunk} tokens: give at least 1")
        if anchor_top is not None and anchor_top < 1:
            raise ConfigError(f"model.anchor_top: {anchor_top} tokens: give at least 1, or null for all")
        self.correction, self.anchor_top = correction, anchor_top
        self.strict_loading = False
        self.stage_name: str | None = None
        self.stage_steps: int | None = None
        self.stage_epoch = 0
        self.objective: Objective | Bilevel = Objective(normalize)
        self.probe: ModelProbe | None = None
        self.bank: AdapterBank
        self.head: OutputHead
        self.held_out: dict[str, float] = {}
        self.held_out_step = -1
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._step_loss: Tensor | float = 0.0
        self._step_tokens = 0
        self._step_started: float | None = None
        self._gradients_seen = False
        self._sums: dict[str, tuple[float, int]] = {}

    # --- loading ------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Converts a GGUF base once per node, before the other ranks look for it."""
        resolve(self.base)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base)
        return self._tokenizer

    def configure_model(self) -> None:
        """Loads the base onto this rank's device and puts the adapters on it, once."""
        if hasattr(self, "net"):
            return
        strategy = self.trainer.strategy
        device = strategy.root_device
        check_sharding(strategy, self.base, self.optim)
        if self.optim.paged_8bit and device.type != "cuda":
            raise ConfigError(f"model.optim.paged_8bit: needs a GPU, but this run is on {device}: set it to false")
        # a base that is to be sharded need not fit on the device that it is to compute on
        dtype: Any = str(compute_dtype(self.base, device)).removeprefix("torch.")
        model = load_base(replace(self.base, dtype=dtype), torch.device("cpu") if is_sharding(strategy) else device)
        self.head = OutputHead.of(model)
        check_head(model, self.head)
        say(describe(model, self.base, device))
        if dtype == "float16":
            rank_zero_warn(
                "model.base.dtype: float16 has no room for small gradients, which are lost in large batches: bfloat16"
                " and float32 keep them"
            )
        path, stored = resolve(self.base), stored_digest(self.base)
        self.bank = AdapterBank(model, self.lora, path, REFERENCES, global_seed(), stored)
        for name in REFERENCES:
            if path := getattr(self.references, name):
                self.bank.load(name, path)
        if is_sharding(strategy):
            shard_layers(model, strategy)
        # from_pretrained gives a model in evaluation mode, and Lightning leaves the mode as it finds it
        self.net = self.bank.net.to(device).train()
        self.bank.remember_start()

    @property
    def context(self) -> int | None:
        """How many tokens the base reads at most, where its configuration says so."""
        return context_of(self.bank.model)

    def fingerprints(self) -> dict[str, str]:
        """What token losses depend on here, beside the adapter: the base and its precision."""
        dtype = str(compute_dtype(self.base, self.device)).removeprefix("torch.")
        return {"base": self.bank.fingerprint, "precision": f"{self.base.quantization}/{dtype}"}

    def digest(self, adapter: str) -> str:
        """Identifies the weights of an adapter."""
        return self.bank.digest(adapter)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Adapters only: the base is never part of a checkpoint."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "lora_" in name}

    def identity(self) -> dict[str, str]:
        """What the optimizer steps depend on here, beside the base and the shape of the adapters."""
        return {
            "model.normalize": self.normalize,
            "model.optim": settings_of(self.optim),
            "model.schedule": settings_of(self.schedule),
            "model.references": settings_of(self.references),
            "model.correction": identify(self.correction),
            "model.anchor_top": str(self.anchor_top),
            "precision": self.fingerprints()["precision"],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the adapters' weights belong to."""
        checkpoint["adapters_of"] = self._adapters_of()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the adapters of another base or of another shape, before they are put anywhere."""
        check_identity(checkpoint.get("adapters_of", {}), self._adapters_of())

    def _adapters_of(self) -> dict[str, str]:
        return {
            "model.base": f"{self.bank.fingerprint} {self.base.quantization}",
            "model.lora": settings_of(self.lora),
        }

    # --- losses -------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, which: Tensor | None = None) -> Tensor:
        """Token losses under the adapter in use.

        Args:
            batch: as :func:`toss_lightning.data.batching.collate` makes it.
            which: Shape ``[N]`` bool: the response tokens wanted; all by default.

        Returns:
            Shape ``[number wanted]``, float32.
        """
        which = torch.ones_like(batch["row"], dtype=torch.bool) if which is None else which
        if not which.any():
            return self._idle(batch["input_ids"])
        row, position = batch["row"][which], batch["position"][which]
        hidden = response_hidden(self.bank.model, batch["input_ids"], row, position)
        return token_losses(hidden, batch["input_ids"][row, position], self.head, self.chunk)

    def losses_and_divergence(
        self, batch: Batch, task: Tensor, anchored: Tensor, top: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token losses, and ``KL(base || adapter in use)`` of next tokens, from one pass through the adapter.

        Args:
            batch: as for :meth:`losses`.
            task: Shape ``[N]`` bool: where losses are wanted.
            anchored: Shape ``[N]`` bool: where divergences are.
            top: how many of the base's likeliest next tokens divergences tell apart; all by default.

        Returns:
            Shapes ``[number wanted]`` each, float32.
        """
        if not anchored.any():
            losses = self.losses(batch, task)
            return losses, losses.new_zeros(0)
        row, position, ids = batch["row"], batch["position"], batch["input_ids"]
        with torch.no_grad(), self.using(BASE):
            base_hidden = response_hidden(self.bank.model, ids, row[anchored], position[anchored])
        either = task | anchored
        hidden = response_hidden(self.bank.model, ids, row[either], position[either])
        targets = ids[row[task], position[task]]
        losses = token_losses(hidden[task[either]], targets, self.head, self.chunk)
        divergence = base_divergence(hidden[anchored[either]], base_hidden, self.head, self.chunk, top)
        return losses, divergence

    @torch.no_grad()
    def embeddings(self, batch: Batch) -> Tensor:
        """The last hidden state at each row's last token, under the adapter in use; ``[B, D]`` float32."""
        length = batch["length"]
        if not len(length):
            self._idle(batch["input_ids"])
            return torch.zeros((0, self.bank.model.config.get_text_config().hidden_size), device=self.device)
        row = torch.arange(len(length), device=length.device)
        return response_hidden(self.bank.model, batch["input_ids"], row, length).float()

    def _idle(self, input_ids: Tensor) -> Tensor:
        """No losses, with a graph to every weight of the slot, for other ranks wait for this one's gradients."""
        if is_sharding(self.trainer.strategy):
            # they wait for its part in each forward pass too
            if not input_ids.numel():
                input_ids = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
            at = torch.tensor([0], device=self.device)
            return response_hidden(self.bank.model, input_ids, at, at + 1).float().sum(1)[:0]
        return torch.stack([value.float().sum() for _, value in self.bank.parameters(SLOT)])[:0]

    @contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Computes with another adapter inside the block."""
        with self.bank.using(adapter):
            yield

    def begin_objective(
        self, objective: Objective | Bilevel, pool: Callable[[Sequence[int]], list[Batch]] | None, size: int = 0
    ) -> None:
        """Settles what the steps of a stage minimise, and what their gradients are corrected with.

        Args:
            objective: weighs the tokens of each micro-batch.
            pool: gives this rank's batches of rows of the reference set; None: no correction in this stage.
            size: rows of that set.
        """
        self.objective, self.probe = objective, None
        if pool is not None and self.correction is not None:
            self.probe = ModelProbe(self, pool, size)
            self.correction.begin_stage(self.probe, self.lora.r)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This micro-batch's part of the step's loss, times what Lightning and DDP will divide it by."""
        if self._step_started is None:
            self._step_started = time.monotonic()
            self._begin_step(batch)
        self._step_tokens += batch["input_ids"].numel()
        loss = self.objective.loss(self, batch)
        self._step_loss = self._step_loss + loss.detach().sum()
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _begin_step(self, batch: Batch) -> None:
        """Looks at the whole step before any of it is trained on, where a method asks for that."""
        self.objective.begin_step(self, batch.get("step", [batch]))
        if self.probe is not None and self.correction is not None:
            assert isinstance(self.objective, Objective)  # corrections act on the target alone
            self.probe.begin_step(self.objective.step_batches)
            factors = self.correction.begin_step(self.probe, self.stage_epoch)
            self.objective.scale_rows(self, factors)
        if batch["step_tokens"]:
            self._log(kept_share=self.objective.kept_weight(batch) / batch["step_tokens"])

    def check_finite(self, losses: Tensor, rows: Tensor) -> None:
        """Stops a run whose loss is no number.

        Args:
            losses: Shape ``[N]``.
            rows: Shape ``[N]``: the row of each, as its index in the stage.

        Raises:
            TrainingError: one is not; the message names the rows.
        """
        finite = losses.detach().isfinite()
        if not finite.all():
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            named = datamodule.named(rows[~finite].unique().tolist())
            raise TrainingError(
                f"stage {self.stage_name}, step {self.trainer.global_step}: the loss is not finite on {named}: look at"
                " these rows, or lower model.optim.lr"
            )

    def on_after_backward(self) -> None:
        """Stops a run whose adapter gets no gradient, as happens when checkpointing cuts the graph."""
        if self._gradients_seen or not self._step_loss:
            return
        missing = [name for name, value in self.bank.parameters(SLOT) if value.grad is None]
        if missing:
            raise TrainingError(f"no gradient reaches {len(missing)} adapter weights, such as {missing[0]}")
        self._gradients_seen = True

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Corrects the gradient, and logs the whole optimizer step: loss, gradient norm, speed, learning rate."""
        if self.probe is not None and self.correction is not None:
            gradients = {name: value.grad for name, value in self.bank.parameters(SLOT) if value.grad is not None}
            with torch.no_grad():
                self.correction.correct(gradients, self.probe)
        self.objective.end_step(self)
        loss = self.trainer.strategy.reduce(torch.as_tensor(self._step_loss, device=self.device), reduce_op="sum")
        norm = torch.nn.utils.get_total_norm(
            [value.grad for _, value in self.bank.parameters(SLOT) if value.grad is not None]
        )
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        seconds = time.monotonic() - (self._step_started or time.monotonic())
        self._log(loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        self._log(tokens_per_second=self._step_tokens * self.trainer.world_size / max(seconds, 1e-9))
        self._step_loss, self._step_tokens, self._step_started = 0.0, 0, None

    def _log(self, **values: Any) -> None:
        prefix = f"{self.stage_name}/" if self.stage_name else ""
        self.log_dict({prefix + name: value for name, value in values.items()}, batch_size=1)

    # --- evaluation and scoring -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forgets the sums of the last validation."""
        self._sums = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the sums of its set."""
        losses = self.losses(batch)
        total, count = self._sums.get(batch["set"], (0.0, 0))
        self._sums[batch["set"]] = (total + losses.cpu().double().sum().item(), count + len(losses))

    def on_validation_epoch_end(self) -> None:
        """Logs the mean token loss of each held-out set, exact over ranks."""
        means = {}
        for name, sums in self._sums.items():
            both = torch.tensor(sums, dtype=widest(self.device), device=self.device)
            total, count = self.trainer.strategy.reduce(both, reduce_op="sum").tolist()
            means[name] = total / count
        self._log(**means)
        self.held_out, self.held_out_step = means, self.trainer.global_step

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Token losses ``[N]`` of all response tokens of a batch under the adapter in use."""
        return self.losses(batch)

    # --- optimizer --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW on the slot, with a schedule over the steps of the current stage."""
        optimizer = make_optimizer(self.optim, [value for _, value in self.bank.parameters(SLOT)])
        if (steps := self.stage_steps) is None:
            return optimizer
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
