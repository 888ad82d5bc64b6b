"""Generate once, judge many: what a model does after training."""

from toss_lightning.evaluation.benchmarks import LmEval
from toss_lightning.evaluation.evaluation import Evaluation, Evaluator, Findings
from toss_lightning.evaluation.judges import (
    ClassifierJudge,
    Judge,
    KeywordJudge,
    PairwiseJudge,
    RubricJudge,
)
from toss_lightning.evaluation.prompts import PromptSet
from toss_lightning.evaluation.records import Prompt, Response, Verdict
from toss_lightning.evaluation.report import report_evaluation
from toss_lightning.evaluation.safety_probe import SafetyProbe, SafetyProber

__all__ = [
    "ClassifierJudge",
    "Evaluation",
    "Evaluator",
    "Findings",
    "Judge",
    "KeywordJudge",
    "LmEval",
    "PairwiseJudge",
    "Prompt",
    "PromptSet",
    "Response",
    "RubricJudge",
    "SafetyProbe",
    "SafetyProber",
    "Verdict",
    "report_evaluation",
]
