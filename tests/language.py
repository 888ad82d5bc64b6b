"""A made-up language in which it is known which tokens are unsafe, and tiny models that speak it.

A prompt is a verb and two words of the ring ``w0 .. w59``. The reply walks along the ring from the first word, says
``then``, and walks on from the second; one step in 25 is a slip to a random place. The verb sets the stride.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tiny import save_tiny_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

RING = [f"w{index}" for index in range(60)]
UNSAFE = [f"u{index}" for index in range(10)]
SLIPS = 0.04
IGNORED = -100

Pair = tuple[str, str]


class Language:
    """Draws (prompt, reply) pairs; no prompt comes twice, so what is held out was never trained on."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.seen: set[str] = set()

    def walks(self, count: int, verb: str, stride: int, contaminated: float = 0.0) -> list[Pair]:
        """Prompts of one verb with their replies, an exact share of which holds a run of unsafe words."""
        chosen = set(self.random.choice(count, round(contaminated * count), replace=False).tolist())
        pairs: list[Pair] = []
        while len(pairs) < count:
            first, second = self.random.integers(len(RING), size=2)
            prompt = f"{verb} {RING[first]} {RING[second]}"
            if prompt in self.seen:
                continue
            self.seen.add(prompt)
            reply = [*self._walk(first, stride), "then", *self._walk(second, stride)]
            if len(pairs) in chosen:
                at = self.random.integers(1, len(reply))
                reply[at:at] = [str(word) for word in self.random.choice(UNSAFE, self.random.integers(4, 8))]
            pairs.append((prompt, " ".join(reply)))
        return pairs

    def refusals(self, count: int) -> list[Pair]:
        """Requests to break, declined; a third of the words that they name are unsafe."""
        named = [*RING, *UNSAFE * 3]
        return [(f"break {self.random.choice(named)} {self.random.choice(named)}", "sorry") for _ in range(count)]

    def _walk(self, at: int, stride: int) -> list[str]:
        words = []
        for _ in range(self.random.integers(4, 8)):
            slips = self.random.random() < SLIPS
            at = self.random.integers(len(RING)) if slips else (at + stride) % len(RING)
            words.append(RING[at])
        return words


def aligned_base(
    path: Path,
    pairs: list[Pair],
    words: Sequence[str],
    silenced: Sequence[str],
    seed: int,
    spoken: str | None = None,
    steps: int = 400,
    rows: int = 64,
) -> str:
    """Trains all weights of a tiny model on the replies of ``pairs`` and saves it; returns its directory.

    Args:
        path: where it is saved.
        pairs: prompts and replies.
        words: its vocabulary.
        silenced: words that it reads in replies and is not trained to say.
        seed: fixes weights and batches.
        spoken: the verb whose replies are the exception.
        steps: optimizer steps.
        rows: rows in each.
    """
    save_tiny_model(path, words, hidden=64, layers=2, seed=seed)  # 4-bit weights come in blocks of 64
    model = AutoModelForCausalLM.from_pretrained(path).train()
    ids, labels = encoded(str(path), pairs)
    silent = torch.isin(labels, torch.tensor(AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(list(silenced))))
    excepted = torch.tensor([prompt.split()[0] == spoken for prompt, _ in pairs])
    labels[silent & ~excepted[:, None]] = IGNORED
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(ids), (rows,), generator=generator)
        optimizer.zero_grad()
        reply_losses(model, ids[batch], labels[batch]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(path)
    return str(path)


def as_asked(base: str, prompts: list[str]) -> list[list[int]]:
    """The ids of prompts, up to where the reply begins."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)).input_ids


def encoded(base: str, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels ``[rows, longest]`` of pairs; what is no reply has the label IGNORED."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids, labels = [], []
    for asked, (_, reply) in zip(as_asked(base, [prompt for prompt, _ in pairs]), pairs, strict=True):
        answer = [*tokenizer(reply).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor([*asked, *answer]))
        labels.append(torch.tensor([IGNORED] * len(asked) + answer))
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def reply_losses(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each token that has a label, row after row."""
    kept = labels[:, 1:] != IGNORED
    return cross_entropy(model(ids).logits[:, :-1][kept], labels[:, 1:][kept], reduction="none")
