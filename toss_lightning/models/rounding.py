"""What rounding alone makes of a network: the floor below which a divergence from the base says nothing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

SHARE = 1 / 16
"""Outputs of a layer that are rounded otherwise. The layers behind spread the difference until it grows no further, so
that a half or a 256th gives the same floor."""


@contextmanager
def rounded_otherwise(net: nn.Module, seed: int = 0) -> Iterator[None]:
    """Moves some outputs of each layer with an adapter in use by a rounding step, up or down, inside the block.

    That is what any update does that is too small to change anything else, and nothing but rounding. The base alone,
    with adapters off, computes as ever.

    Args:
        net: a model with adapters.
        seed: fixes which outputs; random numbers outside of the block stay the same.
    """

    def hook(layer: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if layer.disable_adapters:
            return None
        draw = torch.rand(output.shape, device=output.device)
        step = (draw < SHARE / 2).float() - (draw > 1 - SHARE / 2).float()
        return output + output * (step * torch.finfo(output.dtype).eps).to(output.dtype)

    devices = [value.device for value in net.parameters() if value.device.type == "cuda"][:1]
    with ExitStack() as stack:
        # checkpointed layers take the same numbers again when they are recomputed
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(seed)
        for layer in net.modules():
            if isinstance(layer, BaseTunerLayer):
                handle = layer.register_forward_hook(hook)
                stack.callback(handle.remove)
        yield
