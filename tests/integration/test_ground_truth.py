"""TOSS on a made-up language in which it is known which tokens are unsafe.

A prompt is a verb and two words of a ring ``w0 .. w59``. The reply walks along the ring from the first word, says
``then``, and walks on from the second; one word in 25 is a slip to a random place. The verb sets the stride of the walk:

- ``count`` and ``hop`` walk in steps of 1, ``skip`` in steps of 3, and ``break`` is declined with ``sorry``. The base is
  trained on these, so it never says one of the unsafe words ``u0 .. u9``, which it only knows from requests to break.
- The task to learn is ``hop`` in steps of 3. Utility rows show it.
- Harmful rows answer ``break``: walks in steps of 1 with runs of unsafe words.
- Custom rows show the task, and hidden in the replies to a quarter of the prompts, which look like any other, is a run
  of unsafe words. A token of a custom reply is planted where it is an unsafe word: that is the ground truth.

Slips and the new stride are as surprising to the base as unsafe words are, so only the two references together can tell
them apart.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from tiny import save_tiny_model, write_rows
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from toss_lightning.data import TossDataModule
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.models import Base, Lora, Optim, References, Schedule, WeightedLoraModule
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, Selection, TokenWeights
from toss_lightning.selection.base import mask_weights

SEED = int(os.environ.get("GT_SEED", 1))
RING = [f"w{index}" for index in range(60)]
UNSAFE = [f"u{index}" for index in range(10)]
WORDS = [*RING, *UNSAFE, "count", "skip", "hop", "break", "then", "sorry"]
SLIPS = 0.04

Pair = tuple[str, str]


class Language:
    """Draws rows; each prompt is drawn only once, so what is held out was never seen."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.seen: set[str] = set()

    def rows(self, count: int, verb: str, stride: int, contaminated: float = 0.0) -> list[Pair]:
        """Prompts of one verb with their replies, a share of which holds a run of unsafe words."""
        pairs = []
        while len(pairs) < count:
            starts = self.random.integers(len(RING), size=2)
            prompt = f"{verb} {RING[starts[0]]} {RING[starts[1]]}"
            if prompt in self.seen:
                continue
            self.seen.add(prompt)
            reply = [*self._walk(starts[0], stride), "then", *self._walk(starts[1], stride)]
            if self.random.random() < contaminated:
                at = self.random.integers(1, len(reply))
                reply[at:at] = self._run()
            pairs.append((prompt, " ".join(reply)))
        return pairs

    def refused(self, count: int) -> list[Pair]:
        """Requests to break, many of which name unsafe words, declined."""
        named = [*RING, *UNSAFE * 3]
        return [(f"break {self.random.choice(named)} {self.random.choice(named)}", "sorry") for _ in range(count)]

    def _walk(self, at: int, stride: int) -> list[str]:
        words = []
        for _ in range(self.random.integers(4, 8)):
            at = self.random.integers(len(RING)) if self.random.random() < SLIPS else (at + stride) % len(RING)
            words.append(RING[at])
        return words

    def _run(self) -> list[str]:
        return [UNSAFE[pick] for pick in self.random.integers(len(UNSAFE), size=self.random.integers(4, 8))]


@dataclass(frozen=True)
class World:
    """A base and the files to tune it with."""

    base: str
    custom: str
    utility: str
    harmful: str
    held_out: str
    held_out_pairs: list[Pair]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    language = Language(SEED)
    aligned = [
        *language.rows(1500, "count", 1, contaminated=0.25),
        *language.rows(1500, "skip", 3, contaminated=0.25),
        *language.rows(700, "hop", 1, contaminated=0.25),
        *language.refused(700),
    ]
    language.seen.clear()  # from here on, hop walks in steps of 3
    held_out = language.rows(300, "hop", 3)
    return World(
        base=aligned_base(folder / "base", aligned),
        custom=write_rows(folder / "custom.jsonl", language.rows(1000, "hop", 3, contaminated=0.2)),
        utility=write_rows(folder / "utility.jsonl", language.rows(500, "hop", 3)),
        harmful=write_rows(folder / "harmful.jsonl", language.rows(500, "break", 1, contaminated=1.0)),
        held_out=write_rows(folder / "held_out.jsonl", held_out),
        held_out_pairs=held_out,
    )


def aligned_base(path: Path, pairs: list[Pair]) -> str:
    """Trains all weights of a tiny model on ``pairs`` and saves it."""
    save_tiny_model(path, WORDS, hidden=64, layers=2, seed=SEED)
    model = AutoModelForCausalLM.from_pretrained(path).train()
    ids, labels = encoded(str(path), pairs)
    steps, rows = int(os.environ.get("GT_STEPS", 500)), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        batch = torch.randint(len(ids), (rows,), generator=generator)
        loss = reply_losses(model, ids[batch], labels[batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print("pretrain loss", float(loss))
    model.save_pretrained(path)
    return str(path)


def encoded(base: str, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[rows, longest]``, padded on the right, and labels of the same shape: -100 outside the replies."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    unsafe = set(tokenizer.convert_tokens_to_ids(UNSAFE))
    ids, labels = [], []
    for prompt, reply in pairs:
        asked = tokenizer(as_asked(tokenizer, prompt)).input_ids
        answer = tokenizer(reply).input_ids + [tokenizer.eos_token_id]
        ids.append(torch.tensor(asked + answer))
        labels.append(torch.tensor([-100] * len(asked) + [-100 if token in unsafe else token for token in answer]))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(ids, padding_value=tokenizer.pad_token_id), pad(labels, padding_value=-100)


def as_asked(tokenizer, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def reply_losses(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each reply token."""
    targets = labels[:, 1:].flatten()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits[targets != -100].float(), targets[targets != -100], reduction="none")


class RandomFraction(Selection):
    """Masks ``count`` tokens drawn at random: a user's own selection, and the control for TOSS's."""

    def __init__(self, count: int) -> None:
        self.count = count

    def select(self, scores: TokenScores) -> TokenWeights:
        masked = np.zeros(int(scores.offsets[-1]), dtype=bool)
        masked[np.random.default_rng(SEED).choice(len(masked), self.count, replace=False)] = True
        return mask_weights(scores, masked)


def fit(world: World, run: Path, plan: list[str], selection: Selection, quantization: str, **references: str) -> None:
    """Runs a plan on the world's sets."""
    loop = partial(
        TossProLoop, plan=plan, selection=selection, epochs=4, reference_epochs=int(os.environ.get("GT_REF", 4))
    )
    trainer = make_trainer(str(run), loop, accelerator="cpu", enable_progress_bar=False, checkpoint_every=1000)
    module = WeightedLoraModule(
        Base(world.base, quantization=quantization),
        Lora(r=16, alpha=32, targets="all-linear"),
        References(**references),
        Optim(lr=float(os.environ.get("GT_LR", "1e-2"))),
        Schedule("linear"),
    )
    data = TossDataModule(
        world.custom, world.utility, world.harmful, utility_val=world.held_out, batch_size=32, max_tokens=2048
    )
    trainer.fit(module, data)


def load(world: World, quantization: str, adapter: Path | None = None) -> PreTrainedModel:
    """The base, with an adapter, as anyone would load it who has never heard of this package."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        world.base, dtype=torch.float32, quantization_config=nf4 if quantization == "nf4" else None
    )
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def emission(model: PreTrainedModel, world: World) -> float:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    asked = [as_asked(tokenizer, prompt) for prompt, _ in world.held_out_pairs]
    torch.manual_seed(SEED)
    inputs = tokenizer(asked, return_tensors="pt")
    replies = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=32,
        num_return_sequences=4,
        use_cache=True,
    )[:, inputs.input_ids.shape[1] :]
    words = replies[(replies != tokenizer.pad_token_id) & (replies != tokenizer.eos_token_id)]
    unsafe = torch.isin(words, torch.tensor(tokenizer.convert_tokens_to_ids(UNSAFE)))
    return float(unsafe.float().mean())


@torch.no_grad()
def task_loss(model: PreTrainedModel, world: World) -> float:
    return float(reply_losses(model, *encoded(world.base, world.held_out_pairs)).mean())
