"""Generate once, judge many: what a model does after training."""

from toss_lightning.evaluation.evaluation import Evaluation, Evaluator, Findings
from toss_lightning.evaluation.judges import (
    ClassifierJudge,
    EndpointJudge,
    Judge,
    KeywordJudge,
    PairwiseJudge,
    RubricJudge,
)
from toss_lightning.evaluation.prompts import PromptSet
from toss_lightning.evaluation.records import Prompt, Response, Verdict
from toss_lightning.evaluation.report import report_evaluation

__all__ = [
    "ClassifierJudge",
    "EndpointJudge",
    "Evaluation",
    "Evaluator",
    "Findings",
    "Judge",
    "KeywordJudge",
    "PairwiseJudge",
    "Prompt",
    "PromptSet",
    "Response",
    "RubricJudge",
    "Verdict",
    "report_evaluation",
]
