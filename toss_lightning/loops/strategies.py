"""Which Trainers a plan runs with."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)

from toss_lightning.errors import ConfigError


def check_trainer(trainer: Trainer) -> None:
    """Refuses a Trainer that would change optimizer steps, or that does not leave adapters whole.

    Raises:
        ConfigError: it does; the message says what to set.
    """
    cut = "data.batch_size counts the rows of an optimizer step, and data.max_tokens cuts them into micro-batches"
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(f"trainer.accumulate_grad_batches: leave it at 1: {cut}")
    if isinstance(trainer.strategy, SingleDeviceXLAStrategy | XLAStrategy):
        raise ConfigError("trainer.strategy: 4-bit bases do not run on TPUs: use a GPU or a CPU")
    known = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not known or isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.strategy: {type(trainer.strategy).__name__} would shard the base, which a 4-bit base does not"
            " survive: use auto or ddp, or for an unquantised base configs/trainer/fsdp2.yaml"
        )
    if type(trainer.precision_plugin) is not Precision:
        name = type(trainer.precision_plugin).__name__
        raise ConfigError(f"trainer.plugins: {name}: adapters stay in float32: set model.base.dtype instead")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(one, GradientAccumulationScheduler) for one in callbacks):
        raise ConfigError(f"trainer.callbacks: leave GradientAccumulationScheduler out: {cut}")
    # the attribute has no public name; the default would scatter a checkpoint of megabytes over a directory
    if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.strategy._save_distributed_checkpoint:
        raise ConfigError("trainer.strategy: set save_distributed_checkpoint: false: a checkpoint is one file here")
