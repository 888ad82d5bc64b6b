"""Plans and the loop that runs them: the only room that touches the inside of Lightning."""

from toss_lightning.loops.toss_pro import TossProLoop
from toss_lightning.loops.trainer import make_trainer

__all__ = ["TossProLoop", "make_trainer"]
