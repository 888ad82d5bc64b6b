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
from toss_lightning.evaluation.metrics import ExactMatch, LikelihoodMargin, PositionDivergence, ShareOf
from toss_lightning.evaluation.prompts import PromptSet
from toss_lightning.evaluation.records import Prompt, Response, Verdict
from toss_lightning.evaluation.report import report_evaluation
from toss_lightning.evaluation.safety_probe import SafetyProbe, SafetyProber
from toss_lightning.evaluation.win_rates import WinRates

__all__ = [
    "ClassifierJudge",
    "Evaluation",
    "Evaluator",
    "ExactMatch",
    "Findings",
    "Judge",
    "KeywordJudge",
    "LikelihoodMargin",
    "LmEval",
    "PairwiseJudge",
    "PositionDivergence",
    "Prompt",
    "PromptSet",
    "Response",
    "RubricJudge",
    "SafetyProbe",
    "SafetyProber",
    "ShareOf",
    "Verdict",
    "WinRates",
    "report_evaluation",
]
