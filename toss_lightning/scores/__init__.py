"""What the reference adapters said about each response token."""

from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import ScoreWriter, TokenScores

__all__ = ["ScoreWriter", "TokenScores", "exact_top", "share_of"]
