"""Evaluation: every adapter replies to every prompt once, and then any number of judges read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from toss_lightning.data.sources import Source
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.evaluation.benchmarks import Benchmarks, LmEval, TaskResult
from toss_lightning.evaluation.harness import Harness
from toss_lightning.evaluation.judges import Judge, KeywordJudge
from toss_lightning.evaluation.likelihood import Reading, check_lengths, reply_rows
from toss_lightning.evaluation.panel import JudgePanel
from toss_lightning.evaluation.prompts import Pair, PromptSet, load_pairs, load_prompts
from toss_lightning.evaluation.readings import Readings
from toss_lightning.evaluation.records import Prompt, Response, Verdict
from toss_lightning.evaluation.replies import Replies
from toss_lightning.evaluation.utility import utility_of
from toss_lightning.evaluation.win_rates import WinRates, Wins
from toss_lightning.files import cannot_write, digest_of, make_writable, user_path
from toss_lightning.models.adapters import BASE, SLOT
from toss_lightning.models.generation import Sampling
from toss_lightning.ranks import on_first_rank

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
    win_rate: WinRates | None = None
    """Who compares the replies of each adapter with those of plain fine-tuning, or of the base."""
    adapters: list[str] | None = None
    """base, names below the run's adapters, or paths of PEFT adapters, which are told by their paths; by default base,
    and sft and target as far as the plan makes them (with ``toss test``, as far as they are there)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn."""
    batch_size: int = 32
    """Prompts that a device replies to at once."""
    positions: int = 32
    """Response positions for which the divergence from the base is told; 0 leaves it out, and the passes that it
    costs."""
    task_loss: bool = True
    """The loss of each held-out row of the task (``data.utility_val``, or what ``data.holdout`` takes) is told, where
    there are any; false leaves it out, and the pass that it costs."""
    cache: str | None = None
    """Directory of replies, readings, verdicts and answers to tasks, to be shared by runs; that of the run by
    default."""

    @property
    def reads_the_task(self) -> bool:
        """Held-out rows of the task are read, where there are any."""
        return self.task_loss or (bool(self.positions) and self.pairs is not None)

    def check(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            ConfigError: nothing is asked, or a number is too low.
        """
        if not self.prompts and self.pairs is None and self.lm_eval is None:
            raise ConfigError("loop.evaluation: nothing to ask: name prompts, or pairs, or tasks of lm_eval")
        for key, least in (("batch_size", 1), ("positions", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"loop.evaluation.{key}: {getattr(self, key)}: give {least} or more")
        if self.adapters is not None and not self.adapters:
            raise ConfigError("loop.evaluation.adapters: none is named: name some, or leave the key out")
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
        benign: adapter -> what it says of the held-out replies of the task, where the divergence is taken.
        task: adapter -> mean token loss of each held-out row of the task; shape ``[R]`` float64, nats.
        task_rows: which rows these are.
        wins: which replies a judge prefers, where one compares.
        failed: judge that could not read everything -> why; it has no verdicts.
        benchmarks: what the adapters answered to tasks of lm_eval, if there are any.
    """

    prompts: list[Prompt]
    responses: dict[str, list[Response]]
    verdicts: dict[str, dict[str, list[Verdict]]]
    pairs: list[Pair]
    harmful: dict[str, Reading]
    safe: dict[str, Reading]
    benign: dict[str, Reading]
    task: dict[str, np.ndarray] = field(default_factory=dict)
    task_rows: str | None = None
    wins: Wins | None = None
    failed: dict[str, str] = field(default_factory=dict)
    benchmarks: Benchmarks | None = None


class Evaluator:
    """Carries out an :class:`Evaluation` with the module and the strategy that a Trainer holds.

    Prompts and questions are read, rendered and checked here, before anything is trained.

    Args:
        evaluation: what to do.
        trainer: holds the module and the strategy.
        chat: renders prompts.
        run_dir: where adapters lie and results go.
        max_tokens: padded tokens that a device holds at once, where replies are given and only read.

    Raises:
        ConfigError: a setting cannot work, or a prompt, a pair or a reply to a question is too long.
        DataError: a set cannot be read, or the chat template refuses a prompt.
        ModelError: the model of a judge is not to be had.
        StoreError: the cache cannot be written.
    """

    def __init__(
        self, evaluation: Evaluation, trainer: Trainer, chat: ChatTokenizer, run_dir: Path, max_tokens: int
    ) -> None:
        evaluation.check()
        self.evaluation, self.trainer, self.chat, self.run_dir = evaluation, trainer, chat, run_dir
        self.max_tokens = max_tokens
        sets = {name: PromptSet(spec) if isinstance(spec, str) else spec for name, spec in evaluation.prompts.items()}
        self.prompts = {name: load_prompts(name, spec) for name, spec in sets.items()}
        self.utility = {
            name: utility_of(spec.utility, spec.utility_value, f"loop.evaluation.prompts.{name}")
            for name, spec in sets.items()
            if spec.utility is not None
        }
        pairs = Source(evaluation.pairs) if isinstance(evaluation.pairs, str) else evaluation.pairs
        self.pairs = load_pairs(pairs, "loop.evaluation.pairs") if pairs is not None else []
        self.harness = Harness(evaluation.lm_eval, chat) if evaluation.lm_eval is not None else None
        self.judges = [KeywordJudge()] if evaluation.judges is None else list(evaluation.judges)
        self._panel = JudgePanel(self.judges, evaluation.win_rate, trainer, self.cache / "verdicts")
        on_first_rank(trainer, self._check_on_first_rank)
        if self.harness is not None:
            self.harness.prepare(trainer)
        settings = (self.cache / "replies", evaluation.sampling, evaluation.batch_size)
        self._replies = Replies(trainer, chat, *settings)
        for of_set in self.prompts.values():
            self._replies.render(of_set)
        self._rows = {
            "harmful": reply_rows(chat, [pair.harmful for pair in self.pairs]),
            "safe": reply_rows(chat, [pair.safe for pair in self.pairs]),
        }
        module: Any = trainer.lightning_module
        for of_kind in self._rows.values():
            check_lengths(of_kind, max_tokens, "loop.evaluation.pairs", module.context)
        self._readings = Readings(trainer, chat, self.cache / "likelihood", max_tokens)

    def _check_on_first_rank(self) -> None:
        self._panel.check([*self.prompts])
        if self.evaluation.cache:
            try:
                make_writable(self.cache)
            except OSError as error:
                said = cannot_write(self.cache, error, "choose another directory")
                raise StoreError(f"loop.evaluation.cache: {said}") from error

    @property
    def directory(self) -> Path:
        """Where results go."""
        return self.run_dir / "evaluation"

    @property
    def cache(self) -> Path:
        """Where replies, readings, verdicts and answers to tasks are kept."""
        return user_path(self.evaluation.cache) if self.evaluation.cache else self.directory

    def adapters(self, expected: Sequence[str] | None = None) -> dict[str, Path | None]:
        """What replies: a name -> where its adapter lies, None for the base alone.

        Args:
            expected: adapters that the run makes; None where it makes none, and those that are there are taken.

        Raises:
            ConfigError: one is not there.
            ModelError: one that is there does not fit the base.
        """
        own = self.run_dir / "adapters"
        module: Any = self.trainer.lightning_module
        wanted = self.evaluation.adapters
        if wanted is None:
            if expected is None and not any((own / name).is_dir() for name in ADAPTERS):
                raise ConfigError(
                    f"--run_dir: {self.run_dir}: neither a target nor sft is there: name the run, or what to test, as"
                    " with --loop.evaluation.adapters [base]"
                )
            there = [name for name in ADAPTERS if (own / name).is_dir()] if expected is None else expected
            wanted = [BASE, *(name for name in ADAPTERS if name in there)]
        found: dict[str, Path | None] = {}
        for name in wanted:
            path = own / name if "/" not in name else user_path(name)
            if name == BASE:
                found[BASE] = None
            elif name in (expected or ()):
                found[name] = path
            elif path.is_dir():
                module.bank.check(str(path))
                found[name] = path
            else:
                known = sorted({*(one.name for one in own.glob("*/")), *(expected or ())})
                raise ConfigError(
                    f"loop.evaluation.adapters: {name}: no adapter in {path}; there is {', '.join([BASE, *known])}"
                )
        if self.evaluation.win_rate is not None:
            self.evaluation.win_rate.opponent([*found])
        return found

    def find(
        self,
        benign: Sequence[TokenizedRow],
        expected: Sequence[str] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Findings:
        """Lets every adapter reply, and every judge read.

        Args:
            benign: held-out rows of the task, for its loss; and for the divergence from the base, as many as there are
                pairs.
            expected: adapters that the run has made; see :meth:`adapters`.
            between: called on every rank, equally often, whenever something is on disk.
        """
        module: Any = self.trainer.lightning_module
        prompts = [one for name in self.prompts for one in self.prompts[name]]
        responses: dict[str, list[Response]] = {}
        read: dict[str, dict[str, Reading]] = {"harmful": {}, "safe": {}, "benign": {}}
        answers: dict[str, dict[str, TaskResult]] = {}
        task: dict[str, np.ndarray] = {}
        positions, near = bool(self.evaluation.positions), len(self.pairs) if self.evaluation.positions else 0
        rows = {**self._rows, "benign": list(benign[:near])}
        others = benign[near:] if self.evaluation.task_loss else []
        for name, path in self.adapters(expected).items():
            if path is not None:
                module.bank.load(SLOT, str(path))
            inside = SLOT if path is not None else BASE
            responses[name] = [
                one for of_set in self.prompts.values() for one in self._replies.to(of_set, inside, name, between)
            ]
            for kind, of_kind in rows.items():
                if of_kind:
                    read[kind][name] = self._readings.of(of_kind, inside, f"{name} reads {kind} replies", positions)
                    between()
            if self.evaluation.task_loss and benign:
                task[name] = read["benign"][name].loss if near else np.zeros(0)
                if others:
                    of_others = self._readings.of(others, inside, f"{name} reads the task", False, openings=False)
                    task[name] = np.concatenate([task[name], of_others.loss])
                    between()
            if self.harness is not None:
                answers[name] = self.harness.answers(self.trainer, inside, name, self.cache / "lm_eval", between)
        module.bank.reset()
        benchmarks = self.harness.summed_up(answers) if self.harness is not None else None
        judged = self._panel.read(responses, between)
        which = digest_of(json.dumps([row.ids_hash for row in benign])) if task else None
        return Findings(
            prompts,
            responses,
            judged.verdicts,
            self.pairs,
            **read,
            task=task,
            task_rows=which,
            wins=judged.wins,
            failed=judged.failed,
            benchmarks=benchmarks,
        )
