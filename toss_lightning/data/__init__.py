"""Rows in, batches out."""

from toss_lightning.data.datamodule import TossDataModule
from toss_lightning.data.mixtures import Mixture, SafeInstr
from toss_lightning.data.sources import Source

__all__ = ["Mixture", "SafeInstr", "Source", "TossDataModule"]
