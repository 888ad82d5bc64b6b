"""Evaluation: every adapter replies to every prompt once, and then any number of judges read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from toss_lightning.data.sources import Source
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.benchmarks import Benchmarks, LmEval, TaskResult
from toss_lightning.evaluation.harness import Harness
from toss_lightning.evaluation.judges import Judge, KeywordJudge
from toss_lightning.evaluation.likelihood import Measured, measure, opener_tokens, reply_rows
from toss_lightning.evaluation.prompts import Pair, PromptSet, load_pairs, load_prompts
from toss_lightning.evaluation.records import Prompt, Response, Verdict
from toss_lightning.evaluation.replies import Replies
from toss_lightning.evaluation.verdicts import judge_responses
from toss_lightning.models.adapters import BASE, SLOT
from toss_lightning.models.generation import Sampling

ADAPTERS = ("sft", "target")
"""Adapters of a run that are evaluated beside the base where none is named."""


@dataclass(frozen=True)
class Evaluation:
    """What a model is asked after training, and who judges its replies."""

    prompts: dict[str, str | PromptSet] = field(default_factory=dict)
    """Name -> a file, hub dataset or sample of prompts, or one with options."""
    pairs: str | Source | None = None
    """Harmful requests with a harmful reply (messages) and a safe one (safe_reply): their losses are compared, and how
    far the target has moved from the base on both, and on as many held-out rows of the task."""
    lm_eval: LmEval | None = None
    """Public benchmarks: tasks of lm-evaluation-harness that every adapter answers."""
    judges: list[Judge] | None = None
    """Who reads the replies; KeywordJudge by default."""
    adapters: list[str] | None = None
    """base, names below the run's adapters, or paths of PEFT adapters; by default base, sft and target, as far as they
    are there."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn."""
    batch_size: int = 32
    """Prompts that a device replies to at once."""
    positions: int = 32
    """Response positions for which the divergence from the base is told."""
    cache: str | None = None
    """Directory of replies, verdicts and answers to tasks, to be shared by runs; that of the run by default."""

    def check(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            ConfigError: nothing is asked, or a number is too low.
        """
        if not self.prompts and self.pairs is None and self.lm_eval is None:
            raise ConfigError("loop.evaluation: nothing to ask: name prompts, or pairs, or tasks of lm_eval")
        for key in ("batch_size", "positions"):
            if getattr(self, key) < 1:
                raise ConfigError(f"loop.evaluation.{key}: {getattr(self, key)}: give 1 or more")
        self.sampling.check("loop.evaluation.sampling")


@dataclass(frozen=True)
class Findings:
    """What an evaluation found, before anything is counted.

    Attributes:
        prompts: every prompt, set after set.
        responses: adapter -> its response to each prompt.
        verdicts: judge -> adapter -> a verdict on each response.
        pairs: harmful requests with two replies.
        harmful: adapter -> what it says of the harmful replies of the pairs.
        safe: adapter -> what it says of their safe replies.
        benign: adapter -> what it says of the held-out replies of the task.
        benchmarks: what the adapters answered to tasks of lm_eval, if there are any.
    """

    prompts: list[Prompt]
    responses: dict[str, list[Response]]
    verdicts: dict[str, dict[str, list[Verdict]]]
    pairs: list[Pair]
    harmful: dict[str, Measured]
    safe: dict[str, Measured]
    benign: dict[str, Measured]
    benchmarks: Benchmarks | None = None


class Evaluator:
    """Carries out an :class:`Evaluation` with the module and the strategy that a Trainer holds.

    Prompts are read, rendered and checked here, before anything is trained.

    Args:
        evaluation: what to do.
        trainer: holds the module and the strategy.
        chat: renders prompts.
        run_dir: where adapters lie and results go.
        max_tokens: padded tokens that a device holds at once, where replies are given and only read.

    Raises:
        ConfigError: a setting cannot work, or an adapter is not there.
        DataError: a set cannot be read.
    """

    def __init__(
        self, evaluation: Evaluation, trainer: Trainer, chat: ChatTokenizer, run_dir: Path, max_tokens: int
    ) -> None:
        evaluation.check()
        self.evaluation, self.trainer, self.chat, self.run_dir = evaluation, trainer, chat, run_dir
        self.max_tokens = max_tokens
        sets = {name: PromptSet(spec) if isinstance(spec, str) else spec for name, spec in evaluation.prompts.items()}
        self.prompts = {name: load_prompts(name, spec) for name, spec in sets.items()}
        self.utility = {name: spec.utility for name, spec in sets.items() if spec.utility is not None}
        pairs = evaluation.pairs
        self.pairs = load_pairs(Source(pairs) if isinstance(pairs, str) else pairs) if pairs is not None else []
        self.harness = Harness(evaluation.lm_eval, chat) if evaluation.lm_eval is not None else None
        self.judges = [KeywordJudge()] if evaluation.judges is None else list(evaluation.judges)
        names = [judge.name for judge in self.judges]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"loop.evaluation.judges: {repeated[0]} stands twice: leave one out")

    @property
    def directory(self) -> Path:
        """Where results go."""
        return self.run_dir / "evaluation"

    @property
    def cache(self) -> Path:
        """Where replies, verdicts and answers to tasks are kept."""
        return Path(self.evaluation.cache).expanduser() if self.evaluation.cache else self.directory

    def adapters(self, expected: Sequence[str] = ()) -> dict[str, Path | None]:
        """What replies: a name -> where its adapter lies, None for the base alone.

        Args:
            expected: adapters that the run is about to make.

        Raises:
            ConfigError: one is not there.
        """
        own = self.run_dir / "adapters"
        wanted = self.evaluation.adapters
        if wanted is None:
            wanted = [BASE, *(name for name in ADAPTERS if name in expected or (own / name).is_dir())]
        found: dict[str, Path | None] = {}
        for name in wanted:
            path = own / name if "/" not in name else Path(name).expanduser()
            if name == BASE:
                found[BASE] = None
            elif path.is_dir() or name in expected:
                found[name if "/" not in name else path.name] = path
            else:
                there = sorted(one.name for one in own.glob("*/")) if own.is_dir() else []
                raise ConfigError(
                    f"loop.evaluation.adapters: {name}: no adapter in {path}; there is {', '.join([BASE, *there])}"
                )
        return found

    def find(self, benign: Sequence[TokenizedRow], between: Callable[[], None] = lambda: None) -> Findings:
        """Lets every adapter reply, and every judge read.

        Args:
            benign: held-out rows of the task, for the divergence from the base; as many as there are pairs are read.
            between: called on every rank, equally often, whenever something is on disk.
        """
        module: Any = self.trainer.lightning_module
        prompts = [one for name in self.prompts for one in self.prompts[name]]
        responses: dict[str, list[Response]] = {}
        read: dict[str, dict[str, Measured]] = {"harmful": {}, "safe": {}, "benign": {}}
        answers: dict[str, dict[str, TaskResult]] = {}
        rows = {
            "harmful": reply_rows(self.chat, [pair.harmful for pair in self.pairs]),
            "safe": reply_rows(self.chat, [pair.safe for pair in self.pairs]),
            "benign": list(benign[: len(self.pairs)]),
        }
        settings = (self.cache / "replies", self.evaluation.sampling, self.evaluation.batch_size, between)
        replies, openers = Replies(self.trainer, self.chat, *settings), opener_tokens(self.chat)
        for name, path in self.adapters().items():
            if path is not None:
                module.bank.load(SLOT, str(path))
            inside = SLOT if path is not None else BASE
            responses[name] = [one for of_set in self.prompts.values() for one in replies.to(of_set, inside, name)]
            for kind, of_kind in rows.items():
                if of_kind:
                    title = f"{name} reads {kind} replies"
                    read[kind][name] = measure(self.trainer, of_kind, inside, openers, self.max_tokens, title)
            if self.harness is not None:
                answers[name] = self.harness.answers(self.trainer, inside, name, self.cache / "lm_eval", between)
        module.bank.reset()
        benchmarks = self.harness.summed_up(answers) if self.harness is not None else None
        return Findings(prompts, responses, self._judge(responses), self.pairs, **read, benchmarks=benchmarks)

    def _judge(self, responses: Mapping[str, list[Response]]) -> dict[str, dict[str, list[Verdict]]]:
        """What each judge says; on the first rank, which alone needs to know."""
        found: dict[str, dict[str, list[Verdict]]] = {}
        judged = [one for of_adapter in responses.values() for one in of_adapter if one.prompt.label is not None]
        if self.trainer.is_global_zero and judged:
            device = self.trainer.strategy.root_device
            for judge in self.judges:
                verdicts = iter(judge_responses(judge, judged, self.cache / "verdicts", device))
                found[judge.name] = {
                    name: [Verdict() if one.prompt.label is None else next(verdicts) for one in of_adapter]
                    for name, of_adapter in responses.items()
                }
        self.trainer.strategy.barrier("responses judged")
        return found
