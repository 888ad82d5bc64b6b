"""Which Trainers a plan runs with."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from toss_lightning.errors import ConfigError


def check_trainer(trainer: Trainer) -> None:
    """Refuses a Trainer that would change optimizer steps, or that does not leave adapters whole.

    Raises:
        ConfigError: it does; the message says what to set.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches: leave it at 1: data.batch_size counts the rows of an optimizer step,"
            " and data.max_tokens cuts them into micro-batches"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        raise ConfigError(
            f"trainer.strategy: {type(trainer.strategy).__name__} would shard the base, which a 4-bit base does not"
            " survive: use auto or ddp, or for an unquantised base configs/trainer/fsdp2.yaml"
        )
    # the attribute has no public name; the default would scatter a checkpoint of megabytes over a directory
    if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.strategy._save_distributed_checkpoint:
        raise ConfigError("trainer.strategy: set save_distributed_checkpoint: false: a checkpoint is one file here")
