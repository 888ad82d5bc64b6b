"""Norms and inner products of the LoRA gradients of single rows, from one backward pass over a batch of them.

The gradient of row b's loss in a linear layer is ``sum_t d_bt x_bt^T``, x the layer's input and d the gradient of the
loss in its output, since no row's loss depends on another row's tokens. Both are at hand, layer by layer, while the sum
of the rows' losses is differentiated; only numbers per row are kept.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toss_lightning.errors import ConfigError, ModelError
from toss_lightning.gradients.base import Gradients

Measure = Callable[[str, Tensor, Tensor], None]


class RowGradients:
    """Measures inside a ``with`` block, in which a batch goes forward and then :meth:`backward`.

    Letters in shapes: B rows, T tokens, I inputs and O outputs of a layer.

    Args:
        net: a model with LoRA adapters.
        adapter: name of the adapter, the one that is active and trained.
        direction: parameter name, as in ``net.named_parameters()``, -> what gradients are multiplied with; None for
            norms alone.

    Raises:
        ConfigError: the adapter has weights other than those of linear layers, such as DoRA's magnitudes.
    """

    def __init__(self, net: nn.Module, adapter: str, direction: Gradients | None = None) -> None:
        ends = (f".lora_A.{adapter}", f".lora_B.{adapter}")
        modules = {name: module for name, module in net.named_modules() if name.endswith(ends)}
        self.layers = {f"{name}.weight": layer for name, layer in modules.items() if isinstance(layer, nn.Linear)}
        self.parameters = {name: value for name, value in net.named_parameters() if f".{adapter}." in f"{name}."}
        if others := sorted(set(self.parameters) - set(self.layers)):
            raise ConfigError(
                f"model.lora: {others[0]} is no plain LoRA on a linear layer, which the gradients of single rows need"
                " that model.correction asks for: set model.lora.dora: false, and name linear layers in targets"
            )
        self.direction = direction
        self._handles: list[RemovableHandle] = []
        self._squares = self._products = torch.zeros(0)
        self._seen: set[str] = set()

    def __enter__(self) -> "RowGradients":
        self._handles = [layer.register_forward_hook(self._tap(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Measures the gradient of each row's loss; the parameters' own ``.grad`` stays as it is.

        Args:
            losses: Shape ``[B]`` float32: a loss of each row of the batch that went forward, of its own tokens only.

        Returns:
            Norm of each row's gradient over all layers, and its inner product with the direction, 0 without one; both
            of shape ``[B]``, float32.

        Raises:
            ModelError: a layer mixes rows, or computes more than once.
        """
        self._squares, self._products = losses.detach().new_zeros((2, len(losses)))
        self._seen.clear()
        # not losses.backward(): that would add to .grad, and wake up what waits for it, such as DistributedDataParallel
        torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
        return self._squares.sqrt(), self._products

    def _tap(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tapped: Tensor = _Tap.apply(output, inputs[0], name, self._measure)
            return tapped

        return hook

    def _measure(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        """Adds one layer, of inputs ``[B, T, I]`` and gradients of the outputs ``[B, T, O]``."""
        if inputs.dim() != 3 or len(inputs) != len(self._squares) or name in self._seen:
            problem = "computes twice" if name in self._seen else f"takes {list(inputs.shape)}, which is not row by row"
            raise ModelError(
                f"{name.removesuffix('.weight')}: {problem}, so that gradients of single rows cannot be told apart:"
                " leave it out of model.lora.targets"
            )
        self._seen.add(name)
        gradients = torch.einsum("bto,bti->boi", outputs.float(), inputs.float())
        self._squares += gradients.square().sum((1, 2))
        if self.direction is not None:
            direction = self.direction[name].to(gradients.device, gradients.dtype)
            self._products += torch.einsum("boi,oi->b", gradients, direction)


class _Tap(torch.autograd.Function):
    """Hands an output on as it is, and shows the layer's input together with the gradient that comes back.

    The input is saved as autograd saves its own, so that gradient checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, name: str, measure: Measure) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.name, ctx.measure = name, measure
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.measure(ctx.name, ctx.saved_tensors[0], gradient)
        return gradient, None, None, None
