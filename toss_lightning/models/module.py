"""The LightningModule: masked (weighted) LoRA fine-tuning of a frozen, usually 4-bit, base."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from toss_lightning.errors import ConfigError, TrainingError
from toss_lightning.identity import check_identity, settings_of
from toss_lightning.models.adapters import SLOT, AdapterBank, Lora
from toss_lightning.models.base import Base, compute_dtype, describe, load_base, load_tokenizer, resolve
from toss_lightning.models.losses import CHUNK, OutputHead, check_head, response_hidden, token_losses
from toss_lightning.models.sharding import check_sharding, is_sharding, shard_layers
from toss_lightning.progress import say
from toss_lightning.seeds import global_seed

REFERENCES = ("utility", "degraded")

Batch = dict[str, Any]


@dataclass(frozen=True)
class References:
    """Reference adapters that exist already; their stage is then skipped."""

    utility: str | None = None
    """PEFT directory or hub id of an adapter trained on the utility set."""
    degraded: str | None = None
    """PEFT directory or hub id of an adapter trained on the harmful set."""


@dataclass(frozen=True)
class Optim:
    """AdamW."""

    lr: float = 1e-5
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    paged_8bit: bool = False
    """8-bit optimizer state that moves to host memory when the GPU is full (bitsandbytes, GPU only)."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over one stage."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: stay, or fall to 0 by the end of the stage."""
    warmup: float = 0.03
    """Share of the stage's optimizer steps in which the rate rises from 0."""

    def factor(self, step: int, steps: int) -> float:
        """What the highest rate is multiplied by at ``step`` (from 0) of ``steps``."""
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
            self.shape
        ]


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
    ) -> None:
        # No save_hyperparameters(): a checkpoint would then override the configuration of the run that resumes it.
        super().__init__()
        self.base, self.lora, self.references = base, lora, references
        self.optim, self.schedule, self.normalize, self.chunk = optim, schedule, normalize, chunk
        self.strict_loading = False
        self.stage_name: str | None = None
        self.stage_steps: int | None = None
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
        check_sharding(strategy, self.base)
        if self.optim.paged_8bit and device.type != "cuda":
            raise ConfigError(f"model.optim.paged_8bit: needs a GPU, but this run is on {device}: set it to false")
        # a base that is to be sharded need not fit on the device that it is to compute on
        dtype: Any = str(compute_dtype(self.base, device)).removeprefix("torch.")
        model = load_base(replace(self.base, dtype=dtype), torch.device("cpu") if is_sharding(strategy) else device)
        self.head = OutputHead.of(model)
        check_head(model, self.head)
        say(describe(model, self.base, device))
        self.bank = AdapterBank(model, self.lora, resolve(self.base), REFERENCES, global_seed())
        for name in REFERENCES:
            if path := getattr(self.references, name):
                self.bank.load(name, path)
        if is_sharding(strategy):
            shard_layers(model, strategy)
        # from_pretrained gives a model in evaluation mode, and Lightning leaves the mode as it finds it
        self.net = self.bank.net.to(device).train()
        self.bank.remember_start()

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
        row, position = batch["row"], batch["position"]
        if which is not None:
            row, position = row[which], position[which]
        if not len(row):
            return self._idle(batch["input_ids"])
        hidden = response_hidden(self.bank.model, batch["input_ids"], row, position)
        return token_losses(hidden, batch["input_ids"][row, position], self.head, self.chunk)

    def _idle(self, input_ids: Tensor) -> Tensor:
        """No losses, with a graph to every weight of the slot, for other ranks wait for this one's gradients."""
        if is_sharding(self.trainer.strategy):
            # and for its part in each forward pass
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This micro-batch's part of the step's loss, times what Lightning and DDP will divide it by."""
        kept = batch["weight"] != 0
        weight, losses = batch["weight"][kept], self.losses(batch, kept)
        if self._step_started is None:
            self._step_started = time.monotonic()
        self._step_tokens += batch["input_ids"].numel()
        if not len(losses):
            return losses.sum()
        self._check_finite(losses, batch["row_id"][batch["row"][kept]])
        loss = (weight * losses / self._normalizer(batch, batch["row"][kept], weight)).sum()
        self._step_loss = self._step_loss + loss.detach()
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _normalizer(self, batch: Batch, row: Tensor, weight: Tensor) -> Tensor | float:
        if self.normalize == "all":
            return float(batch["step_tokens"])
        if self.normalize == "kept":
            return float(batch["step_weight"])
        per_row = weight.new_zeros(len(batch["row_id"])).index_add_(0, row, weight)
        return per_row[row] * batch["step_rows"]

    def _check_finite(self, losses: Tensor, row_ids: Tensor) -> None:
        finite = losses.detach().isfinite()
        if not finite.all():
            rows = ", ".join(str(row) for row in row_ids[~finite].unique().tolist())
            raise TrainingError(
                f"stage {self.stage_name}, step {self.trainer.global_step}: the loss is not finite on row {rows}:"
                " look at these rows, or lower model.optim.lr"
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
        """Logs the whole optimizer step: loss, kept share, gradient norm, speed, learning rate."""
        loss = self.trainer.strategy.reduce(torch.as_tensor(self._step_loss, device=self.device), reduce_op="sum")
        gradients = [value.grad for _, value in self.bank.parameters(SLOT) if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        seconds = time.monotonic() - (self._step_started or time.monotonic())
        self._log(loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=norm)
        self._log(tokens_per_second=self._step_tokens * self.trainer.world_size / max(seconds, 1e-9))
        self._step_loss, self._step_tokens, self._step_started = 0.0, 0, None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Logs the share of its tokens that the step trains on."""
        if batch["step_tokens"]:
            self._log(kept_share=batch["step_weight"] / batch["step_tokens"])

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
            exact = torch.float32 if self.device.type == "mps" else torch.float64
            both = torch.tensor(sums, dtype=exact, device=self.device)
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
        parameters = [value for _, value in self.bank.parameters(SLOT)]
        optim = self.optim
        optimizer: Optimizer
        if optim.paged_8bit:
            from bitsandbytes.optim import PagedAdamW8bit

            optimizer = PagedAdamW8bit(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
        else:
            optimizer = AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
        if (steps := self.stage_steps) is None:
            return optimizer
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
