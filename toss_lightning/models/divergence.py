"""How far the target is from the base at a position: KL(p_base || p_target), in chunks, never a [N, V] tensor.

Letters in shapes: N positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from toss_lightning.errors import ConfigError
from toss_lightning.models.losses import CHUNK


def base_divergence(
    hidden: Tensor,
    base_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk: int = CHUNK,
    top: int | None = None,
) -> Tensor:
    """``KL(p_base || p_target)`` of the next token at each position, in nats, float32.

    With ``top``, the divergence of coarser distributions: the base's ``top`` likeliest tokens at that position, and one
    bucket for all others. It is never more than the full divergence (log-sum inequality), grows with ``top``, and is
    the full one from ``top = V - 1`` on. Probabilities are not renormalised over the ``top`` tokens, so that moving
    probability away from all of them still counts.

    As in :func:`toss_lightning.models.losses.token_losses`, logits exist for one chunk at a time, and where gradients
    are wanted each chunk is recomputed in the backward pass. At equal hidden states it is exactly 0; near them rounding
    may leave it a little below 0.

    Args:
        hidden: Shape ``[N, D]``: the target's last hidden states.
        base_hidden: Shape ``[N, D]``: the base's at the same positions; no gradient reaches them.
        head: hidden states ``[n, D]`` -> float32 logits ``[n, V]``, the same for both.
        chunk: positions per chunk.
        top: tokens of the base that are told apart; all by default.

    Returns:
        Shape ``[N]``, float32.

    Raises:
        ConfigError: ``top`` is not at least 1, which would make the divergence 0 everywhere.
    """
    if top is not None and top < 1:
        raise ConfigError(f"top: {top} tokens tell no distributions apart: give 1 or more, or leave it out for all")
    if not len(hidden):
        return hidden.new_zeros(0, dtype=torch.float32)

    def one_chunk(part: Tensor, base_part: Tensor) -> Tensor:
        with torch.no_grad():
            base = head(base_part).log_softmax(-1)
        target = head(part).log_softmax(-1)
        if top is not None and top < base.shape[-1]:
            likeliest = base.topk(top).indices
            base, target = _coarse(base, likeliest), _coarse(target, likeliest)
        return (base.exp() * (base - target)).sum(-1)

    recompute = torch.is_grad_enabled() and hidden.requires_grad and len(hidden) > chunk
    pieces = []
    for part, base_part in zip(hidden.split(chunk), base_hidden.detach().split(chunk), strict=True):
        pieces.append(
            checkpoint(one_chunk, part, base_part, use_reentrant=False) if recompute else one_chunk(part, base_part)
        )
    return torch.cat(pieces)


def _coarse(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of ``tokens`` ``[n, k]`` and, last, of all others together; ``[n, k + 1]``."""
    # 1 minus the sum of the others would lose a small rest to rounding
    rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, tokens), rest], -1)
