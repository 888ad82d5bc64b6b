"""What the reference adapters said about each response token."""

from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores, degraded_column
from toss_lightning.scores.writer import ScoreWriter

__all__ = ["ScoreWriter", "TokenScores", "degraded_column", "exact_top", "share_of"]
