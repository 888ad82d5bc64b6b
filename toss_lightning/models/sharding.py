"""A base that is larger than a device: its decoder layers sharded over the ranks (FSDP2).

Embeddings, final norm and output head stay whole on each rank, because token losses go through the head without the
model's own forward pass.
"""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from toss_lightning.errors import ConfigError, ModelError
from toss_lightning.models.base import Base
from toss_lightning.models.optim import Optim


def is_sharding(strategy: Strategy) -> bool:
    """The strategy shards weights over ranks."""
    return isinstance(strategy, ModelParallelStrategy)


def check_sharding(strategy: Strategy, base: Base, optim: Optim) -> None:
    """Says why a base cannot be sharded as asked.

    Raises:
        ConfigError: the base is quantised, the optimizer knows no sharded parameters, or ranks would share rows.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if base.quantization != "none":
        raise ConfigError(
            f"trainer.strategy: {base.quantization} weights cannot be sharded: FSDP2 moves packed weights as if they"
            " were numbers and trains on garbage. Use trainer.strategy: ddp, where each device holds the quantised base"
            " whole, or model.base.quantization: none"
        )
    if optim.paged_8bit:
        raise ConfigError(
            "model.optim.paged_8bit: its kernels know no sharded parameters, as FSDP2 makes of the adapters: set it to"
            " false"
        )
    if strategy.device_mesh["tensor_parallel"].size() != 1:
        raise ConfigError(
            "trainer.strategy: tensor parallelism is not supported: set tensor_parallel_size: 1 and data_parallel_size"
            " to the number of devices"
        )


def shard_layers(model: PreTrainedModel, strategy: Strategy) -> None:
    """Shards each decoder layer, adapters included.

    Raises:
        ModelError: the model has no list of layers, or an adapter sits outside of them.
    """
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{model.config.name_or_path}: no list of decoder layers to shard: use trainer.strategy: ddp")
    assert isinstance(strategy, ModelParallelStrategy)
    mesh = strategy.device_mesh["data_parallel"]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # what is left stays whole; as their common root, the decoder lets a layer be gathered while another one computes
    fully_shard(decoder, mesh=mesh, ignored_params={value for value in decoder.parameters() if not _sharded(value)})
    for name, value in model.named_parameters():
        # nobody would average its gradients over the ranks
        if value.requires_grad and not _sharded(value):
            raise ModelError(
                f"model.lora.targets: {name} lies outside the decoder layers, which alone are sharded: leave it out, or"
                " use trainer.strategy: ddp"
            )


def _sharded(value: Tensor) -> bool:
    return isinstance(value, DTensor)
