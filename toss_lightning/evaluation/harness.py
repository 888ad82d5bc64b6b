"""Public benchmarks: tasks of lm-evaluation-harness, run on the model that is in memory."""

import copy
import difflib
import inspect
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import GenerationConfig

from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.errors import ConfigError, DataError
from toss_lightning.evaluation.benchmarks import Benchmarks, Group, LmEval, TaskResult
from toss_lightning.evaluation.harness_results import read_result, result_text
from toss_lightning.evaluation.replies import stop_tokens
from toss_lightning.files import CACHE, digest_of, user_path, write_text
from toss_lightning.progress import say
from toss_lightning.ranks import on_first_rank, patience

KEY = "loop.evaluation.lm_eval"
SEED, OTHER_SEED = 0, 1234
"""What lm_eval seeds Python's random numbers with, and all others; so are examples drawn."""
BOOTSTRAP = 1000
"""Draws for the standard error of a metric that is no mean over questions."""


class Harness:
    """Lets the adapters of a module answer tasks of lm-evaluation-harness.

    Tasks are found and their data read here, before anything is trained. What a directory of results holds already is
    not computed again: its name says what the answers depend on. Every task is one rank's, so that which questions
    share a batch, and with it every number, does not depend on how many ranks there are.

    Args:
        settings: which tasks, and how.
        chat: renders prompts.

    Attributes:
        tasks: name -> the task, as lm_eval has it.
        groups: those that were asked for and whose questions are counted together.

    Raises:
        ConfigError: lm_eval is not installed, or a task does not exist or cannot be run here.
        DataError: a task's data cannot be read.
    """

    def __init__(self, settings: LmEval, chat: ChatTokenizer) -> None:
        settings.check(KEY)
        if find_spec("lm_eval") is None:
            raise ConfigError(f'{KEY}: the package lm_eval is not installed: pip install --editable ".[lm_eval]"')
        from lm_eval import __version__

        self.settings, self.chat, self._version = settings, chat, str(__version__)
        self.tasks: dict[str, Any] = {}
        self.groups: dict[str, Group] = {}
        self._alone: list[str] = []
        with _seeded(torch.device("cpu")):
            manager = self._manager()
            for name in settings.tasks:
                self._load(manager, os.path.expanduser(name))  # of a file
        self._requests: dict[str, str] = {}

    def prepare(self, trainer: Trainer) -> None:
        """Puts every question into words, and makes sure that the model can read it and reply.

        Args:
            trainer: holds the module and the strategy.

        Raises:
            ConfigError: a task generates more tokens than the model can read; on every rank.
        """
        module: Any = trainer.lightning_module
        was_training = module.training
        model = self._language_model(module)
        with _seeded(model.device):
            self._requests = on_first_rank(trainer, partial(self._digests, model))
        module.train(was_training)

    def answers(
        self, trainer: Trainer, adapter: str, name: str, directory: Path, between: Callable[[], None] = lambda: None
    ) -> dict[str, TaskResult]:
        """What the metrics of every task say of an adapter; every rank gets the whole.

        What :meth:`prepare` does is done first, where it has not been.

        Args:
            trainer: holds the module and the strategy.
            adapter: the one of the module that answers; ``base`` for none.
            name: what people call it.
            directory: where results are kept.
            between: called on every rank, equally often, whenever a result is on disk; what it raises ends the work.

        Raises:
            ConfigError: see :meth:`prepare`.
            StoreError: the directory cannot be written, or holds a damaged file.
        """
        module: Any = trainer.lightning_module
        if not self._requests:
            self.prepare(trainer)
        strategy, was_training = trainer.strategy, module.training
        model = self._language_model(module)
        weights = [sorted(module.fingerprints().items()), module.digest(adapter), stop_tokens(module, self.chat)]
        # requests are texts, of which the tokenizer and the length that the model reads make what it is asked
        read_as = [digest_of(model.tokenizer.backend_tokenizer.to_str()), model.max_length]
        files = {
            task: directory / f"{task}-{digest_of(json.dumps([weights, read_as, digest]))}.json"
            for task, digest in self._requests.items()
        }
        pending: list[str] = strategy.broadcast([task for task, file in files.items() if not file.exists()])
        mine = pending[trainer.global_rank :: trainer.world_size]
        plain = _plain_generation(module, stop_tokens(module, self.chat))
        with module.using(adapter), plain, patience() as wait:
            for turn in range(math.ceil(len(pending) / trainer.world_size)):
                if turn < len(mine):
                    say(f"{name} answers {mine[turn]}")
                    write_text(files[mine[turn]], self._evaluate(model, mine[turn]), CACHE)
                wait()
                between()
        module.train(was_training)
        strategy.barrier("tasks answered")
        return {task: read_result(file) for task, file in files.items()}

    def summed_up(self, results: Mapping[str, Mapping[str, TaskResult]]) -> Benchmarks:
        """What :meth:`answers` found of each adapter, with what was asked."""
        return Benchmarks(
            self._version, tuple(self._alone), self.groups, {name: dict(of) for name, of in results.items()}
        )

    # --- tasks --------------------------------------------------------------------------------------------------------

    def _manager(self) -> Any:
        """Knows where each task is described."""
        from lm_eval.tasks import TaskManager

        own = self.settings.include_path
        if own is not None:
            own = str(user_path(own))
            manager = TaskManager(include_path=own, include_defaults=False)
            # to read the descriptions of all public tasks takes seconds
            if set(self.settings.tasks) <= set(manager.all_subtasks):
                return manager
        return TaskManager(include_path=own)

    def _load(self, manager: Any, name: str) -> None:
        """Adds a task, or those of a group or tag, with their data."""
        if name not in manager.task_index and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"near it are {', '.join(near)}" if near else "lm_eval ls tasks lists them"
            raise ConfigError(f"{KEY}.tasks: {name}: lm_eval knows no such task: {hint}; own ones need include_path")
        try:
            loaded = manager.load([name])
        except (OSError, ValueError, RuntimeError, ImportError, yaml.YAMLError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{KEY}.tasks: {name}: the task or its data cannot be read ({reason})") from error
        for task_name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows images"
                raise ConfigError(f"{KEY}.tasks: {task_name}: the task {what}, which is not supported: leave it out")
            # a task that fixes none is meant to have none, to lm_eval too
            if self.settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config("num_fewshot", self.settings.num_fewshot)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            self.tasks[task_name] = task
        group = loaded["groups"].get(name)
        counted = (group.aggregate_metric_list if group is not None else None) or []
        # a mean of means has no value for each question, so such a group is told task by task
        if counted and all(one.weight_by_size and one.aggregation == "mean" for one in counted):
            metrics = [(one.metric, tuple(one.filter_list) if one.filter_list else None) for one in counted]
            self.groups[name] = Group(tuple(loaded["tasks"]), tuple(metrics))
        else:
            self._alone += [one for one in loaded["tasks"] if one not in self._alone]

    # --- answers ------------------------------------------------------------------------------------------------------

    def _language_model(self, module: Any) -> Any:
        """The module's base and the adapter that it computes with, as lm_eval wants them; in evaluation mode then."""
        from lm_eval.models.huggingface import HFLM

        logger = logging.getLogger(HFLM.__module__)
        level = logger.level
        # it warns that the model is in memory already, which is what is wanted here
        logger.setLevel(logging.ERROR)
        try:
            return HFLM(
                pretrained=module.bank.model,
                # it gives a tokenizer without padding a token for it
                tokenizer=copy.deepcopy(self.chat.tokenizer),
                batch_size=self.settings.batch_size,
                chat_template_args=dict(self.chat.template_options),
            )
        finally:
            logger.setLevel(level)

    def _digests(self, model: Any) -> dict[str, str]:
        """For each task, what its numbers depend on beside the model: every request as it is put, and its metrics."""
        from lm_eval.models.utils import normalize_gen_kwargs

        found, chat = {}, self.settings.apply_chat_template
        for name, task in self.tasks.items():
            task.set_fewshot_seed(OTHER_SEED)
            task.build_all_requests(
                limit=self.settings.limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                chat_template=model.apply_chat_template if chat else None,
                tokenizer_name=model.tokenizer_name if chat else "",
            )
            for one in task.instances:
                if one.request_type == "generate_until":
                    length = normalize_gen_kwargs(one.args[1], model.max_gen_toks)["max_gen_toks"]
                    if length >= model.max_length:
                        raise ConfigError(
                            f"{KEY}.tasks: {name}: its max_gen_toks is {length}, but the model can read"
                            f" {model.max_length} tokens in all: leave the task out, or give it fewer"
                        )
            requests = [[one.request_type, one.args, one.doc] for one in task.instances]
            facts = [self._version, self.settings.batch_size, task.config.to_dict(keep_callable=True), requests]
            found[name] = digest_of(json.dumps(facts, default=_told))
        return found

    def _evaluate(self, model: Any, name: str) -> str:
        """The content of a task's file."""
        from lm_eval import evaluate

        task = self.tasks[name]
        # a pool of processes that is forked from one with a GPU may hang
        os.environ["DISABLE_MULTIPROC"] = "1"
        # every adapter sees the same examples
        task.set_fewshot_seed(OTHER_SEED)
        with _seeded(model.device):
            found = evaluate(
                lm=model,
                task_dict={"tasks": {name: task}, "groups": {}},
                limit=self.settings.limit,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=self.settings.apply_chat_template,
                fewshot_as_multiturn=True,
            )
        return result_text(task, name, found)


def _told(value: Any) -> Any:
    """What JSON has no form for; of code the file that it stands in, whose helpers it may call."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if not callable(value):
        return str(value)
    code = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    try:
        file = inspect.getsourcefile(code)
    except TypeError:  # built into Python
        file = None
    return [code.__qualname__, Path(file).read_text(encoding="utf-8") if file else code.__module__]


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Draws inside the block what lm_eval does when it is run alone, and leaves the random numbers of the run alone."""
    with isolate_rng(include_cuda=False), torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        yield


@contextmanager
def _plain_generation(module: Any, stop: Sequence[int]) -> Iterator[None]:
    """Generates by the task's settings alone inside the block, without those that chat models bring along."""
    model = module.bank.model
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=list(stop), pad_token_id=stop[0])
    try:
        yield
    finally:
        model.generation_config = own
