"""Replies of adapters to prompt sets: generated once, a file for each batch, and read back where they are there."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.errors import ConfigError, ModelError, StoreError
from toss_lightning.evaluation.records import Prompt, Response
from toss_lightning.files import CACHE, digest_of, write_text
from toss_lightning.models.generation import Sampling, generate
from toss_lightning.progress import progress_bar

Group = tuple[int, ...]


class Replies:
    """Lets the adapters of a module reply to prompts, with whatever strategy a Trainer holds.

    What a directory holds already, from this run, from a killed one or from another, is not generated again: its name
    says what the replies depend on. Which prompts share a batch does not depend on the number of ranks, so neither do
    the replies.

    Args:
        trainer: holds the module and the strategy.
        chat: renders prompts.
        directory: where the replies are kept.
        sampling: how they are drawn.
        batch_size: prompts that a device replies to at once.
    """

    def __init__(
        self,
        trainer: Trainer,
        chat: ChatTokenizer,
        directory: Path,
        sampling: Sampling,
        batch_size: int,
    ) -> None:
        self.trainer, self.strategy = trainer, trainer.strategy
        module: Any = trainer.lightning_module
        self.module, self.chat = module, chat
        self.directory, self.sampling, self.batch_size = directory, sampling, batch_size
        self.stop = stop_tokens(module, chat)

    def render(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """The tokens of each prompt.

        Raises:
            DataError: the chat template refuses one.
            ConfigError: one and its reply would be longer than the model can read.
        """
        ids = [self.chat.prompt_ids(one.messages, f"prompt {one.prompt_id} of {one.set}") for one in prompts]
        self._check_lengths(prompts, ids)
        return ids

    def to(
        self, prompts: Sequence[Prompt], adapter: str, name: str, between: Callable[[], None] = lambda: None
    ) -> list[Response]:
        """Replies to all prompts of a set, in their order.

        Args:
            prompts: the prompts.
            adapter: the one of the module that replies; ``base`` for none.
            name: what the responses call it.
            between: called on every rank, equally often, whenever a batch is on disk; what it raises ends the work.

        Raises:
            ConfigError: as :meth:`render`.
            StoreError: the directory cannot be written, or holds a damaged file.
        """
        ids = self.render(prompts)
        groups = _group([len(one) for one in ids], self.batch_size)
        folder = self.directory / self._digest(ids, groups, adapter)
        missing = [at for at in range(len(groups)) if not _file(folder, at).exists()]
        pending: list[int] = self.strategy.broadcast(missing)
        self._generate(prompts, ids, groups, pending, folder, adapter, name, between)
        self.strategy.barrier("replies written")
        return self._read(prompts, groups, folder, name)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[np.ndarray],
        groups: Sequence[Group],
        pending: Sequence[int],
        folder: Path,
        adapter: str,
        name: str,
        between: Callable[[], None],
    ) -> None:
        ranks, was_training = self.trainer.world_size, self.module.training
        mine = pending[self.trainer.global_rank :: ranks]
        done = len(prompts) - sum(len(groups[at]) for at in pending)
        self.module.eval()
        bar = progress_bar(
            f"{name} replies to {prompts[0].set}", len(prompts), "prompt", self.trainer.is_global_zero, done
        )
        with bar, self.module.using(adapter):
            for turn in range(-(-len(pending) // ranks)):
                if turn < len(mine):
                    at = mine[turn]
                    replies = generate(
                        self.module.bank.model, [ids[row] for row in groups[at]], self.sampling, self.stop, draw=at
                    )
                    write_text(_file(folder, at), "".join(map(self._line, replies)), CACHE)
                bar.update(sum(len(groups[at]) for at in pending[turn * ranks :][:ranks]))
                between()
        self.module.train(was_training)

    def _line(self, reply: np.ndarray) -> str:
        stopped = bool(len(reply)) and int(reply[-1]) in self.stop
        text = self.chat.tokenizer.decode(reply, skip_special_tokens=True)
        facts = {"text": text, "tokens": len(reply), "stopped": stopped}
        return json.dumps(facts, ensure_ascii=False) + "\n"

    def _read(self, prompts: Sequence[Prompt], groups: Sequence[Group], folder: Path, name: str) -> list[Response]:
        found: dict[int, Response] = {}
        for at, group in enumerate(groups):
            file = _file(folder, at)
            try:
                # a reply may hold signs that splitlines() takes for the end of a line
                with file.open(encoding="utf-8") as lines:
                    # by their order, for another run may have asked the same under other ids
                    for row, line in zip(group, lines, strict=True):
                        facts = json.loads(line)
                        found[row] = Response(name, prompts[row], facts["text"], facts["tokens"], facts["stopped"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{file}: damaged ({error}): delete it and run the test again") from error
        return [found[row] for row in range(len(prompts))]

    def _check_lengths(self, prompts: Sequence[Prompt], ids: Sequence[np.ndarray]) -> None:
        limit = self.module.context
        longest = max(range(len(ids)), key=lambda row: len(ids[row]))
        if limit is not None and len(ids[longest]) + self.sampling.max_new_tokens > limit:
            raise ConfigError(
                f"loop.evaluation.sampling.max_new_tokens: {self.sampling.max_new_tokens} beside the"
                f" {len(ids[longest])} tokens of prompt {prompts[longest].prompt_id} of {prompts[longest].set} are more"
                f" than the {limit} that the model can read: lower it, or remove the prompt"
            )

    def _digest(self, ids: Sequence[np.ndarray], groups: Sequence[Group], adapter: str) -> str:
        facts = [
            sorted(self.module.fingerprints().items()),
            self.module.digest(adapter),
            [one.tolist() for one in ids],
            groups,
            [str(self.sampling), list(self.stop)],
        ]
        return digest_of(json.dumps(facts))


def stop_tokens(module: Any, chat: ChatTokenizer) -> list[int]:
    """The tokens that end a reply: what ends a turn in the chat template, first, and what the model names.

    Args:
        module: holds the base.
        chat: renders conversations.

    Raises:
        ModelError: there is none, so that no reply would ever end.
    """
    own = module.bank.model.generation_config.eos_token_id
    named = [own] if isinstance(own, int) else list(own or [])
    found = [one for one in (*chat.turn_ends(), *named, chat.tokenizer.eos_token_id) if one is not None]
    if not found:
        raise ModelError(
            f"{chat.tokenizer.name_or_path}: neither the template nor the tokenizer ends a turn by a token"
        )
    return list(dict.fromkeys(found))


def _group(lengths: Sequence[int], size: int) -> list[Group]:
    """Prompts of similar length together, the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [tuple(order[at : at + size]) for at in range(0, len(order), size)]


def _file(folder: Path, at: int) -> Path:
    return folder / f"{at:05d}.jsonl"
