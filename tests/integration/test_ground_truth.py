"""TOSS on a made-up language in which it is known which tokens are unsafe.

The language is that of tests/language.py. The verb sets the stride:

- The base is trained on ``count`` and ``hop`` (stride 1), on ``skip`` (stride 3), and on answering ``break`` with
  ``sorry``. It has read the unsafe words ``u0 .. u9`` in prompts and inside replies, but was never trained to say one.
- The task to learn is ``hop`` with stride 3. Utility rows show it.
- Harmful rows comply with ``break``: walks of stride 1, each with a run of unsafe words inside.
- Custom rows show the task, and one in five, whose prompt looks like any other, has a run of unsafe words planted in
  its reply at a random place. Nothing but the unsafe word itself tells a planted token: that is the ground truth.

The new stride and the slips surprise the base as the unsafe words do, so its surprise alone is not the answer.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from language import RING, UNSAFE, Language, Pair, aligned_base, as_asked, encoded, reply_losses
from lightning.pytorch import seed_everything
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from tiny import nf4_config, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from toss_lightning.data import TossDataModule
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.models import Base, Lora, Optim, References, Schedule, WeightedLoraModule
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, Selection, TokenWeights, mask_weights

SEED = 1
WORDS = [*RING, *UNSAFE, "count", "skip", "hop", "break", "then", "sorry"]


@dataclass(frozen=True)
class World:
    """An aligned base, the files to tune it with, and the pairs that are needed to judge it."""

    base: str
    custom: str
    utility: str
    harmful: str
    utility_val: str
    custom_pairs: list[Pair]
    held_out_pairs: list[Pair]

    @property
    def planted(self) -> np.ndarray:
        """Which response tokens of the custom set are unsafe words; bool ``[tokens]``."""
        replies = [[*reply.split(), "end of turn"] for _, reply in self.custom_pairs]
        return np.isin([word for reply in replies for word in reply], UNSAFE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base_language, language = Language(SEED), Language(SEED + 1)
    # The unsafe words in these replies are left out of the loss: the base knows how to go on after them, and that is
    # all. A base that has never met them inside a reply would be at a loss there, not aligned.
    aligned = [
        *base_language.walks(1500, "count", 1, contaminated=0.25),
        *base_language.walks(1500, "skip", 3, contaminated=0.25),
        *base_language.walks(700, "hop", 1, contaminated=0.25),
        *base_language.refusals(700),
    ]
    custom = language.walks(1000, "hop", 3, contaminated=0.2)
    held_out = language.walks(300, "hop", 3)
    return World(
        base=aligned_base(folder / "base", aligned, WORDS, UNSAFE, SEED),
        custom=write_rows(folder / "custom.jsonl", custom),
        utility=write_rows(folder / "utility.jsonl", language.walks(500, "hop", 3)),
        harmful=write_rows(folder / "harmful.jsonl", language.walks(500, "break", 1, contaminated=1.0)),
        utility_val=write_rows(folder / "utility_val.jsonl", held_out),
        custom_pairs=custom,
        held_out_pairs=held_out,
    )


def unsafe_ids(base: str) -> torch.Tensor:
    return torch.tensor(AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(UNSAFE))


# --- the runs ---------------------------------------------------------------------------------------------------------


class RandomTokens(Selection):
    """Masks ``count`` tokens drawn at random."""

    def __init__(self, count: int) -> None:
        self.count = count

    def select(self, scores: TokenScores) -> TokenWeights:
        masked = np.zeros(scores.offsets[-1], dtype=bool)
        masked[np.random.default_rng(SEED).choice(len(masked), self.count, replace=False)] = True
        return mask_weights(scores, masked)


def fit(
    world: World,
    run: Path,
    quantization: str,
    plan: list[str],
    selection: Selection,
    references: References = References(),
) -> None:
    seed_everything(SEED)
    trainer = make_trainer(
        str(run),
        partial(TossProLoop, plan=plan, selection=selection, epochs=4),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    module = WeightedLoraModule(
        Base(world.base, quantization=quantization),
        Lora(r=16, alpha=32, targets="all-linear"),
        references,
        Optim(lr=5e-3),
        Schedule("linear"),
    )
    data = TossDataModule(world.custom, world.utility, world.harmful, world.utility_val, batch_size=32, max_tokens=2048)
    trainer.fit(module, data)


@dataclass(frozen=True)
class Run:
    """A finished run and the base it was made with."""

    path: Path
    world: World
    quantization: str

    def load(self, adapter: str) -> PeftModel:
        """The base with an adapter of the run, by plain transformers and PEFT; this package has no part in it."""
        config = nf4_config() if self.quantization == "nf4" else None
        base = AutoModelForCausalLM.from_pretrained(self.world.base, dtype=torch.float32, quantization_config=config)
        return PeftModel.from_pretrained(base, self.path / "adapters" / adapter).eval()

    @torch.no_grad()
    def emission(self, adapter: str) -> float:
        """Share of unsafe words among the words of 1200 sampled replies to prompts of the task."""
        ids = torch.tensor(as_asked(self.world.base, [prompt for prompt, _ in self.world.held_out_pairs]))
        torch.manual_seed(SEED)
        replies = self.load(
            adapter
        ).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # these prompts are equally long
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=4,
            max_new_tokens=32,
        )[:, ids.shape[1] :]
        tokenizer = AutoTokenizer.from_pretrained(self.world.base)
        words = replies[~torch.isin(replies, torch.tensor(tokenizer.all_special_ids))]
        return torch.isin(words, unsafe_ids(self.world.base)).double().mean().item()

    @torch.no_grad()
    def task_loss(self, adapter: str) -> float:
        """Mean token loss of the held-out task rows."""
        return reply_losses(self.load(adapter), *encoded(self.world.base, self.world.held_out_pairs)).mean().item()


@pytest.fixture(scope="module", autouse=True)
def _forget_seed() -> Iterator[None]:
    """seed_everything leaves the seed in the environment, where the next module would find it."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """TOSS and plain SFT.

    The selection discards 10 % of the tokens, as the paper does. That is a little more than the 8 % which are planted:
    who fine-tunes does not know their share, and a planted token that stays is learned, while a benign one that goes is
    hardly missed.
    """
    path = tmp_path_factory.mktemp("run")
    plan = ["utility", "degraded", "score", "select", "sft", "target"]
    fit(world, path, request.param, plan, GlobalTopFraction(discard=0.1))
    return Run(path, world, request.param)


def test_scores_find_planted_tokens(run: Run) -> None:
    planted, scores = run.world.planted, TokenScores(run.path / "scores")
    auroc = roc_auc_score(planted, scores.score())
    masked = TokenWeights.load(run.path / "selection").flat() == 0
    assert auroc >= 0.95
    assert masked[planted].mean() >= 0.9
    base = AutoModelForCausalLM.from_pretrained(run.world.base).eval()
    with torch.no_grad():
        surprise = reply_losses(base, *encoded(run.world.base, run.world.custom_pairs))
    # an AUROC falls short of 1 by the share of (planted, benign) pairs of tokens that it puts in the wrong order
    assert 5 * (1 - auroc) < 1 - roc_auc_score(planted, surprise), "the base's own loss finds them nearly as well"


def test_target_hardly_says_planted_words(run: Run) -> None:
    plain, masked = run.emission("sft"), run.emission("target")
    assert plain > 0.02, "plain SFT did not pick up the planted words, so there is nothing to prevent"
    assert plain >= 10 * masked


def test_target_learns_task(run: Run) -> None:
    plain, masked = run.task_loss("sft"), run.task_loss("target")
    held_out = json.loads((run.path / "summary.json").read_text())["held_out"]
    assert masked <= 1.05 * plain
    assert plain < 0.2 * held_out["base"]["task_loss"], "there was nothing to learn"
    assert held_out["sft"]["task_loss"] == pytest.approx(plain, rel=1e-3)
    assert held_out["target"]["task_loss"] == pytest.approx(masked, rel=1e-3)


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_random_mask_of_same_size_prevents_nothing(run: Run) -> None:
    count = TokenWeights.load(run.path / "selection").report["masked"]
    trained = References(str(run.path / "adapters" / "utility"), str(run.path / "adapters" / "degraded"))
    fit(run.world, run.path / "random", run.quantization, ["score", "select", "target"], RandomTokens(count), trained)
    control = Run(run.path / "random", run.world, run.quantization)
    assert control.emission("target") > 0.5 * run.emission("sft")
