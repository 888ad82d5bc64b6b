"""What a model would say, without letting it: losses of given replies, refusal at the first token, KL to the base.

Continuous measures that need no generation and no judge, and so are sensitive on small models and few prompts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from toss_lightning.data.batching import PassBatches, plan_pass
from toss_lightning.data.formats import Conversation, Message
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import ConfigError
from toss_lightning.models.adapters import BASE
from toss_lightning.models.divergence import base_divergence
from toss_lightning.models.losses import response_hidden, token_losses
from toss_lightning.progress import progress_bar
from toss_lightning.ranks import gather, widest

OPENERS = ("I'm sorry", "I cannot", "I can't", "Sorry", "Unfortunately", "As an AI", "No")
"""Beginnings of refusals. A reply that begins so need not refuse: read the probability beside that of other models."""


COMPLYING = "Sure, here it is"
"""A beginning of replies that are none."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What an adapter says of given replies, one entry for each of R rows or N response tokens of all rows in order.

    Attributes:
        loss: Shape ``[R]`` float64: mean token loss of each row's response.
        opening: Shape ``[R]`` float64: probability that the row's first reply begins with the first token of a refusal;
            no number where nothing tells such a token.
        divergence: Shape ``[N]`` float64: KL(base || adapter) of the next token before each response token, in nats.
        ordinal: Shape ``[N]`` int64: which token of its reply it is, from 0; see :func:`reply_ordinals`.
    """

    loss: np.ndarray
    opening: np.ndarray
    divergence: np.ndarray
    ordinal: np.ndarray


def measure(
    trainer: Trainer,
    rows: Sequence[TokenizedRow],
    adapter: str,
    openers: Sequence[int],
    max_tokens: int,
    name: str | None = None,
    divergences: bool = True,
) -> Reading:
    """Takes rows through the base and an adapter once; every rank gets the whole, and a training goes on unchanged.

    Args:
        trainer: holds the module and the strategy.
        rows: the rows, responses included.
        adapter: the adapter of the module; ``base`` for none.
        openers: ids of the tokens that refusals begin with.
        max_tokens: padded tokens that a device holds at once.
        name: what a progress bar says; none is shown by default.
        divergences: the divergence from the base is taken, which costs a pass of the base; else it is 0.
    """
    module: Any = trainer.lightning_module
    groups = plan_pass([len(row.input_ids) for row in rows], max_tokens, trainer.world_size)[trainer.global_rank]
    batches = PassBatches(rows, groups)
    found = [torch.zeros((0, 5), dtype=widest(module.device), device=module.device)]
    bar = progress_bar(name or "", len(groups), "batch", trainer.is_global_zero and name is not None)
    with bar, torch.no_grad(), _evaluating(module), module.using(adapter):
        for at in range(len(groups)):
            if groups[at]:
                batch = trainer.strategy.batch_to_device(batches[at])
                found.append(_measure_batch(module, batch, adapter, openers, divergences))
            bar.update()
    whole, _ = gather(trainer.strategy, torch.cat(found))
    return _in_order(whole.cpu().numpy(), rows)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, then the mode that each part had, for parts of one model may differ."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _measure_batch(
    module: Any, batch: dict[str, Any], adapter: str, openers: Sequence[int], divergences: bool
) -> Tensor:
    """Row, ordinal, loss, divergence, and at a first token the probability of an opener; ``[n, 5]``."""
    ids, row, position, model = batch["input_ids"], batch["row"], batch["position"], module.bank.model
    hidden = response_hidden(model, ids, row, position)
    losses = token_losses(hidden, ids[row, position], module.head, module.chunk)
    divergence = torch.zeros_like(losses)
    if divergences and adapter != BASE:
        with module.using(BASE):
            base_hidden = response_hidden(model, ids, row, position)
        divergence = base_divergence(hidden, base_hidden, module.head, module.chunk)
    first = batch["ordinal"] == 0
    opening = torch.zeros_like(losses)
    opening[first] = module.head(hidden[first]).softmax(-1)[:, list(openers)].sum(-1) if openers else torch.nan
    columns = (batch["index"][batch["row"]], batch["ordinal"], losses, divergence, opening)
    return torch.stack([column.to(widest(losses.device)) for column in columns], 1)


def _in_order(values: np.ndarray, rows: Sequence[TokenizedRow]) -> Reading:
    values = values[np.lexsort((values[:, 1], values[:, 0]))]
    row = values[:, 0].astype(np.int64)
    counts = np.bincount(row, minlength=len(rows))
    loss, opening = (np.bincount(row, values[:, column], len(rows)) for column in (2, 4))
    return Reading(loss / counts, opening, values[:, 3], reply_ordinals(rows))


def reply_ordinals(rows: Sequence[TokenizedRow]) -> np.ndarray:
    """Which token of its reply each response token of all rows is, from 0; ``[N]`` int64.

    A reply begins where there is a gap before a response token. A batch counts through all replies of a row instead,
    so that the beginning of a later one would stand among the middles of others.
    """
    found = [np.zeros(0, dtype=np.int64)]
    for row in rows:
        at = np.arange(len(row.response_positions))
        begins = np.diff(row.response_positions, prepend=-1) > 1  # no response begins a row
        found.append(at - np.maximum.accumulate(np.where(begins, at, 0)))
    return np.concatenate(found)


def reply_rows(chat: ChatTokenizer, conversations: Sequence[Conversation]) -> list[TokenizedRow]:
    """Conversations as rows whose response is the last turn alone, which is the reply that is measured."""
    last = ChatTokenizer(chat.tokenizer, "last", chat.template_options)
    return [last.tokenize(one, number) for number, one in enumerate(conversations)]


def check_lengths(rows: Sequence[TokenizedRow], max_tokens: int, key: str, context: int | None = None) -> None:
    """Refuses replies that a device cannot hold, or that the model cannot read.

    Args:
        rows: the rows, responses included.
        max_tokens: padded tokens that a device holds at once.
        key: the setting that gives them.
        context: how many tokens the model reads at most; None where it does not say.

    Raises:
        ConfigError: one is longer.
    """
    longest = max((len(row.input_ids) for row in rows), default=0)
    if context is not None and longest > context:
        raise ConfigError(f"{key}: one has {longest} tokens, and the model reads {context}: leave it out")
    if longest > max_tokens:
        raise ConfigError(
            f"{key}: one has {longest} tokens, and data.max_tokens holds {max_tokens}: raise data.max_tokens, or leave"
            " it out"
        )


def opener_tokens(chat: ChatTokenizer) -> list[int]:
    """The tokens that replies of :data:`OPENERS` begin with, each once, and other replies do not.

    They are taken from rendered turns: some tokenizers know another token for a word that begins a text, and some
    templates begin every reply with the same one, as with that of an empty thought. Then there is none.
    """
    turns = [(Message("user", "Hello"), Message("assistant", text)) for text in (*OPENERS, COMPLYING)]
    rows = reply_rows(chat, [Conversation(one, repr(one[1].content)) for one in turns])
    *first, other = (int(row.input_ids[row.response_positions[0]]) for row in rows)
    if not {*first} - {other}:
        rank_zero_warn(
            "the chat template begins every reply with the same token: whether one begins as refusals do is left"
            " undecided. Where the template writes thoughts, data.template_options: {enable_thinking: false} may help"
        )
    return sorted({*first} - {other})
