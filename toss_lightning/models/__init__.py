"""One frozen base, named adapters, and the module that trains them."""

from toss_lightning.models.adapters import AdapterBank, Lora
from toss_lightning.models.base import Base
from toss_lightning.models.module import Optim, References, Schedule, WeightedLoraModule

__all__ = ["AdapterBank", "Base", "Lora", "Optim", "References", "Schedule", "WeightedLoraModule"]
