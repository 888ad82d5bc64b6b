"""Token losses from hidden states: response positions only, in chunks, never a [B, T, V] tensor.

Letters in shapes: B rows, T tokens, N response tokens of all rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel

from toss_lightning.errors import ModelError
from toss_lightning.models.base import output_head

CHUNK = 512


@dataclass(frozen=True)
class OutputHead:
    """Hidden states ``[N, D]`` -> logits ``[N, V]`` as the model itself computes them, then in float32."""

    layer: nn.Module
    scale: float = 1.0
    """What logits are multiplied by (Cohere, Granite)."""
    softcap: float | None = None
    """Final logits are ``softcap * tanh(logits / softcap)`` (Gemma 2)."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """Reads the head of a causal language model off its configuration."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return cls(output_head(model), float(scale), getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[N, D]`` -> float32 logits ``[N, V]``."""
        logits: Tensor = self.layer(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_losses(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk: int = CHUNK) -> Tensor:
    """Token loss ``-log p(target)`` in natural log, float32, at each position.

    Logits exist for one chunk at a time. Where gradients are wanted each chunk is recomputed in the backward pass, so
    that memory stays at one chunk's logits there too.

    Args:
        hidden: Shape ``[N, D]``: last hidden state at the position *before* each target.
        targets: Shape ``[N]``: int64 token ids.
        head: hidden states ``[n, D]`` -> float32 logits ``[n, V]``.
        chunk: positions per chunk.

    Returns:
        Shape ``[N]``, float32.
    """
    if not len(targets):
        return hidden.new_zeros(0, dtype=torch.float32)

    def one_chunk(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(part), target, reduction="none")

    recompute = torch.is_grad_enabled() and hidden.requires_grad and len(targets) > chunk
    pieces = []
    for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        pieces.append(
            checkpoint(one_chunk, part, target, use_reentrant=False) if recompute else one_chunk(part, target)
        )
    return torch.cat(pieces)


def response_hidden(model: PreTrainedModel, input_ids: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Hidden states that predict the given tokens.

    Args:
        model: a causal language model, adapters injected.
        input_ids: Shape ``[B, T]``, padded on the right.
        row: Shape ``[N]``: row in the batch of each token.
        position: Shape ``[N]``: its index in that row, at least 1.

    Returns:
        Shape ``[N, D]``.
    """
    body = getattr(model, model.base_model_prefix, None) or model.get_decoder()
    hidden: Tensor = body(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[row, position - 1]


@torch.no_grad()
def check_head(model: PreTrainedModel, head: OutputHead) -> None:
    """Compares our path to the logits with the model's own on a few tokens.

    Raises:
        ModelError: they differ, so the model does something to its logits that :class:`OutputHead` does not know.
    """
    device = model.device
    input_ids = torch.arange(1, 9, device=device).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
    positions = torch.arange(1, 9, device=device)
    ours = head(response_hidden(model, input_ids, torch.zeros_like(positions), positions))
    logits = model(input_ids=input_ids, use_cache=False).logits[0]
    theirs, theirs_dtype = logits.float(), logits.dtype
    if not theirs.isfinite().all():
        dtype = str(theirs_dtype).removeprefix("torch.")
        raise ModelError(
            f"{model.config.name_or_path}: its logits are not finite in {dtype}, whose range some models leave: set"
            " model.base.dtype to bfloat16, or to float32"
        )
    error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-6)
    if not error < (1e-3 if theirs_dtype == torch.float32 else 2e-2):
        raise ModelError(
            f"{model.config.name_or_path}: its logits are not its output layer applied to its last hidden state"
            f" (relative difference {error:.2g}), so token losses would be wrong: this architecture is not supported"
        )
