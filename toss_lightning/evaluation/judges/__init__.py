"""Judges of responses."""

from toss_lightning.evaluation.judges.backends import Backend, LocalModel
from toss_lightning.evaluation.judges.base import Judge
from toss_lightning.evaluation.judges.classifier import ClassifierJudge
from toss_lightning.evaluation.judges.endpoint import Endpoint
from toss_lightning.evaluation.judges.keyword import KeywordJudge
from toss_lightning.evaluation.judges.pairwise import PairwiseJudge
from toss_lightning.evaluation.judges.rubric import RubricJudge

__all__ = [
    "Backend",
    "ClassifierJudge",
    "Endpoint",
    "Judge",
    "KeywordJudge",
    "LocalModel",
    "PairwiseJudge",
    "RubricJudge",
]
