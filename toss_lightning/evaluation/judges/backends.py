"""What answers the questions of a judge in text: here a local model; an endpoint is one too."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from toss_lightning.errors import ConfigError, ModelError
from toss_lightning.models.base import Base, context_of, load_base, load_tokenizer

Turn = dict[str, Any]
"""A message of a chat: ``role`` and ``content``."""

Quantization = Literal["nf4", "int8", "none"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BREAK = "\u200b"
"""Parts the characters of a control token in a text; it has no width."""
Contrast = tuple[tuple[str, ...], tuple[str, ...]]
"""Two groups of words of which an answer begins with one; the forms of a word are a group."""


class Backend(ABC):
    """Something that answers chats."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables call it."""

    def check(self) -> None:  # noqa: B027
        """Refuses what would keep it from answering, as far as that can be told without asking."""

    @contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """Loads what it needs onto ``device`` and lets it go behind the block."""
        yield

    def estimate(self, chats: Sequence[list[Turn]]) -> str | None:
        """What answering them costs beyond time, in words; None where it costs nothing."""
        return None

    @abstractmethod
    def answer(self, chats: Sequence[list[Turn]]) -> list[str]:
        """One answer to each chat, in their order."""


def check_at_least(least: int, **numbers: int) -> None:
    """Refuses settings of a judge that are too low.

    Raises:
        ConfigError: one is; the message names it.
    """
    for name, value in numbers.items():
        if value < least:
            raise ConfigError(f"loop.evaluation.judges: {name}: {value}: give {least} or more")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a local model said, and how sure it was of the first word."""

    text: str
    chance: float | None = None
    """Probability of the first group of a contrast against the second, where the answer's first word stands."""


class LocalModel(Backend):
    """A local causal language model that answers greedily, a batch at a time.

    Args:
        model: a hub id, a directory or a .gguf file.
        quantization: as in ``model.base``.
        dtype: as in ``model.base``.
        batch_size: questions at once.
        max_new_tokens: how long an answer may be.

    Raises:
        ConfigError: a number is not positive.
    """

    def __init__(
        self,
        model: str,
        quantization: Quantization = "none",
        dtype: Dtype = "auto",
        batch_size: int = 8,
        max_new_tokens: int = 256,
    ) -> None:
        check_at_least(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
        self.model = model
        self.quantization = quantization
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self._loaded: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._control: list[str] = []

    @property
    def name(self) -> str:
        """The last part of the hub id or of the path."""
        return Path(self.model).name

    def check(self) -> None:
        """Refuses a model that is not to be had, as a gated one whose terms nobody accepted, or that takes no chat.

        Raises:
            ModelError: its tokenizer cannot be loaded, or has no chat template for one turn.
        """
        with self.tokenizing():
            self.render([{"role": "user", "content": "question"}], add_generation_prompt=True)

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Holds the tokenizer, which is little beside the model.

        Raises:
            ModelError: it cannot be loaded.
        """
        with self._told_of_a_judge():
            self._tokenizer = load_tokenizer(self._base)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._control = control_tokens(self._tokenizer)
        try:
            yield
        finally:
            self._tokenizer = None

    @contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """Holds model and tokenizer on ``device``.

        Raises:
            ModelError: they cannot be loaded.
        """
        with self.tokenizing():
            with self._told_of_a_judge():
                self._loaded = load_base(self._base, device).eval()
            own = self._loaded.generation_config
            ends = None if own is None else own.eos_token_id
            # generate() fills in what it finds here, and some models bring a temperature and penalties of their own
            self._loaded.generation_config = GenerationConfig(
                do_sample=False,
                use_cache=True,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            try:
                yield
            finally:
                self._loaded = None
                if device.type == "cuda":
                    torch.cuda.empty_cache()

    @property
    def _base(self) -> Base:
        return Base(path=self.model, quantization=self.quantization, dtype=self.dtype)

    @contextmanager
    def _told_of_a_judge(self) -> Iterator[None]:
        try:
            yield
        except ModelError as error:
            told = str(error).replace("model.base.path: ", "").replace("model.base.", "")
            raise ModelError(f"loop.evaluation.judges: {told}") from error

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, inside ``tokenizing`` or ``ready``."""
        if self._tokenizer is None:
            raise RuntimeError("the model of a judge is there inside ready() only")
        return self._tokenizer

    @property
    def loaded(self) -> PreTrainedModel:
        """The model itself, inside ``ready``."""
        if self._loaded is None:
            raise RuntimeError("the model of a judge is there inside ready() only")
        return self._loaded

    def answer(self, chats: Sequence[list[Turn]]) -> list[str]:
        """Greedy answers to chats in the model's own chat template.

        Raises:
            ModelError: the tokenizer has no chat template, or one that refuses these chats.
        """
        # a model that can think aloud would spend its tokens on that; other templates do not read this
        prompts = [self.render(chat, add_generation_prompt=True, enable_thinking=False) for chat in chats]
        return [answer.text for answer in self.complete(prompts)]

    def render(self, chat: list[Turn], **variables: Any) -> str:
        """A chat as the text that the model's own template makes of it; control tokens in it are the template's only.

        Raises:
            ModelError: there is no template, or it refuses the chat.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"loop.evaluation.judges: {self.model}: its tokenizer has no chat template: choose a model that has one"
            )
        shown = [{**turn, "content": self._disarmed(turn["content"])} for turn in chat]
        try:
            return str(self.tokenizer.apply_chat_template(shown, tokenize=False, **variables))
        except (TemplateError, TypeError) as error:
            raise ModelError(
                f"loop.evaluation.judges: {self.model}: its chat template refuses the judge's question ({error}):"
                " choose another model or template"
            ) from error

    def _disarmed(self, content: Any) -> Any:
        if isinstance(content, str):
            return self.disarm(content)
        return [{**part, "text": self.disarm(part["text"])} for part in content]

    def disarm(self, text: str) -> str:
        """A text whose control tokens are broken, for use in a prompt; one without any is returned as it is.

        A prompt is tokenised as a whole, where a control token is one whoever wrote it: a reply that holds the end of a
        turn and an answer after it would put that answer into the judge's mouth.
        """
        for token in self._control:
            text = text.replace(token, token[0] + BREAK + token[1:])
        return text

    @torch.no_grad()
    def complete(
        self, prompts: Sequence[str], contrast: Contrast | None = None, special_tokens: bool = False
    ) -> list[Answer]:
        """Continues prompts that are ready.

        A prompt that leaves no room for an answer in the model's context is not cut but gets an answer that says so.

        Args:
            prompts: text.
            contrast: words to weigh against each other, for :attr:`Answer.chance`.
            special_tokens: the tokenizer adds its own; a chat template has put them into the text already.

        Raises:
            ModelError: the tokenizer does not tell the words of the contrast apart.
        """
        groups = None if contrast is None else self._first_tokens(contrast)
        rows: list[list[int]] = (
            self.tokenizer(list(prompts), add_special_tokens=special_tokens)["input_ids"] if prompts else []
        )
        room = context_of(self.loaded)
        answers: list[Answer | None] = [None] * len(rows)
        fitting = []
        for index, row in enumerate(rows):
            if room is not None and len(row) + self.max_new_tokens > room:
                answers[index] = Answer(f"(not asked: {len(row)} tokens leave no room in the judge's {room})")
            else:
                fitting.append(index)
        # rows of like length together waste the least on padding
        fitting.sort(key=lambda index: len(rows[index]))
        for start in range(0, len(fitting), self.batch_size):
            picked = fitting[start : start + self.batch_size]
            for index, answer in zip(picked, self._continue([rows[index] for index in picked], groups), strict=True):
                answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _continue(self, rows: list[list[int]], groups: list[list[int]] | None) -> list[Answer]:
        tokenizer, model = self.tokenizer, self.loaded
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
        watch = _Watch(groups) if groups else None
        output: Any = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_processor=LogitsProcessorList([watch] if watch else []),
        )
        said = output[:, batch["input_ids"].shape[1] :].cpu()
        return [
            Answer(
                str(tokenizer.decode(ids, skip_special_tokens=True)),
                None if watch is None else watch.chance(row, self._first_word(ids)),
            )
            for row, ids in enumerate(said)
        ]

    def _first_word(self, ids: Tensor) -> int | None:
        """The step at which an answer begins; some models put blank lines before it."""
        for step, token in enumerate(ids.tolist()):
            if not self._blank(token):
                return step
        return None

    def _blank(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token], skip_special_tokens=True)).strip()

    def _first_tokens(self, contrast: Contrast) -> list[list[int]]:
        groups = []
        for words in contrast:
            ids = {self.tokenizer.encode(word, add_special_tokens=False)[0] for word in words}
            groups.append({token for token in ids if not self._blank(token)})
        ours, others = groups
        if not ours - others or not others - ours:
            raise ModelError(
                f"loop.evaluation.judges: {self.model}: its tokenizer does not tell {contrast[0][0]} from"
                f" {contrast[1][0]} at the first token: choose the template that belongs to the model"
            )
        return [sorted(ours - others), sorted(others - ours)]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer reads in a text as one token that is not text, such as the marks of a turn.

    Some tokenizers call the marks of their template ordinary; they are known by their form.
    """
    template = str(tokenizer.chat_template)
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content in template and token.content.startswith(("<", "[")) and token.content.endswith((">", "]")))
    ]
    # one character can neither be broken nor be a mark
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if len(token) > 1]


class _Watch(LogitsProcessor):
    """Keeps the logits of a few tokens at every step, and changes none."""

    def __init__(self, groups: list[list[int]]) -> None:
        self.groups = groups
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Notes the logits ``[B, 2]`` of the two groups."""
        self.steps.append(torch.stack([scores[:, ids].float().logsumexp(-1) for ids in self.groups], -1).cpu())
        return scores

    def chance(self, row: int, step: int | None) -> float | None:
        """Probability of the first group against the second."""
        return None if step is None else self.steps[step][row].softmax(-1)[0].item()
