"""Replies of the base under an adapter: batched, padded on the left, and by the settings given here alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from toss_lightning.errors import check_settings


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. Nothing is taken from the model's own generation settings."""

    max_new_tokens: int = 256
    """Where a reply that does not end by itself is cut."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; the protocol of the TOSS paper samples at 1."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability."""
    repetition_penalty: float = 1.0
    """What logits of tokens that occurred already are divided by; 1.2 in the protocol of the TOSS paper."""
    seed: int = 0
    """With the place of a batch in its set, fixes what is drawn."""

    def check(self, key: str) -> None:
        """Refuses what cannot be drawn from.

        Args:
            key: what a message names as the place of these settings.

        Raises:
            ConfigError: a number is out of range.
        """
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "a share in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0; 1 changes nothing"),
            ("seed", self.seed >= 0, "0 or more"),
        )
        check_settings(key, self, rules)


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: Sampling, stop: Sequence[int], draw: int = 0
) -> list[np.ndarray]:
    """Replies to some prompts under the adapter in use.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids of each, rendered up to where the reply begins.
        sampling: how to draw.
        stop: ids of the tokens that end a reply; the first one is also what finished replies are padded with.
        draw: tells this call's random numbers from those of others with the same seed.

    Returns:
        The ids of each reply, the one that ended it included.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), stop[0], dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    there = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    own = model.generation_config
    # generate() fills in what it finds here, and chat models bring a temperature and penalties of their own
    model.generation_config = _settings(sampling, stop)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(np.random.SeedSequence([sampling.seed, draw]).generate_state(1)[0]))
            writer: Any = model
            out: Tensor = writer.generate(**{name: value.to(model.device) for name, value in there.items()})
    finally:
        model.generation_config = own
    return [_until(row, stop) for row in out[:, width:].cpu().numpy()]


def _settings(sampling: Sampling, stop: Sequence[int]) -> GenerationConfig:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(sampling.temperature),
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(stop),
        pad_token_id=stop[0],
        use_cache=True,
        **drawn,
    )


def _until(reply: np.ndarray, stop: Sequence[int]) -> np.ndarray:
    """A reply without its padding."""
    ends = np.flatnonzero(np.isin(reply, list(stop)))
    return reply[: ends[0] + 1] if len(ends) else reply
