"""A chat model small enough to train inside a test, and rows in its language."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = [f"w{index}" for index in range(100)]


def word_tokenizer(words: Iterable[str] = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer that knows whole words, with a ChatML template."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: index for index, word in enumerate([*special, "system", "user", "assistant", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    return fast


def save_tiny_model(path: Path, words: Iterable[str] = WORDS, hidden: int = 32, layers: int = 2, seed: int = 0) -> str:
    """Writes a random Llama of a few thousand weights with its tokenizer; returns the directory."""
    tokenizer = word_tokenizer(words)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def write_rows(path: Path, pairs: Iterable[tuple[str, str]], **fields: Any) -> str:
    """Writes (prompt, reply) pairs as JSONL rows; returns the path."""
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}], **fields}
        for prompt, reply in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def some_pairs(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Different (prompt, reply) pairs of different lengths."""
    generator = torch.Generator().manual_seed(start + 1)
    pairs = []
    for index in range(count):
        length = 2 + (index * 7 + start) % 9
        picks = torch.randint(0, len(WORDS), (length + 2,), generator=generator).tolist()
        words = [WORDS[pick] for pick in picks]
        pairs.append((" ".join(words[:2]), " ".join(words[2:])))
    return pairs


def write_sets(folder: Path) -> dict[str, str]:
    """Writes small custom, utility and harmful sets; returns set -> path."""
    return {
        "custom": write_rows(folder / "custom.jsonl", some_pairs(14), label="benign", source="made"),
        "utility": write_rows(folder / "utility.jsonl", some_pairs(10, start=1)),
        "harmful": write_rows(folder / "harmful.jsonl", some_pairs(8, start=2)),
    }


def nf4_config() -> BitsAndBytesConfig:
    """4-bit as a stranger would ask plain transformers for it."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
