"""Tasks of lm-evaluation-harness over a file, and their scores by transformers and peft alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from tiny import WORDS, nf4_config
from transformers import AutoModelForCausalLM, AutoTokenizer

CHOICES, NEXT, WORD = "w_choices", "w_next", "w_word"
QUESTIONS = 24


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[pick] for pick in np.random.default_rng(seed).integers(len(WORDS), size=count))


def questions() -> list[dict[str, Any]]:
    """A prompt, choices of different lengths, which is right, and the next word, often as this model repeats it."""
    found = []
    for at in range(QUESTIONS):
        asked = words(at, 3 + at % 4)
        choices = [words(1000 + 10 * at + one, 1 + (at + one) % 3) for one in range(4)]
        said = asked.split()[-1] if at % 2 else words(2000 + at, 1)
        found.append({"asked": asked, "choices": choices, "right": at % 4, "said": said})
    return found


def write_tasks(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Tasks over a file, as a person would write them."""
    (folder / "questions.json").write_text(json.dumps(rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.json")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{asked}}",
        "metadata": {"version": 2.0},
    }
    choices = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    first = [{"function": "regex", "regex_pattern": r"(\S+)"}, {"function": "take_first"}]
    following = {
        "output_type": "generate_until",
        "doc_to_target": "said",
        "generation_kwargs": {"until": ["w99"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "first", "filter": first}],
    }
    word = {"output_type": "loglikelihood", "doc_to_target": " {{said}}", "metric_list": [{"metric": "perplexity"}]}
    for name, more in {CHOICES: choices, NEXT: following, WORD: word, "w_more": choices}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **more}))
    group = {"group": "w_all", "task": [CHOICES, "w_more"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "w_all.yaml").write_text(yaml.safe_dump(group))
    long = {**following, "generation_kwargs": {"until": ["w99"], "max_gen_toks": 500}}
    (folder / "w_long.yaml").write_text(yaml.safe_dump({"task": "w_long", **data, **long}))
    nowhere = {**data, "dataset_kwargs": {"data_files": {"test": "nowhere.json"}}}
    (folder / "w_nowhere.yaml").write_text(yaml.safe_dump({"task": "w_nowhere", **nowhere, **choices}))
    (folder / "w_code.yaml").write_text(yaml.safe_dump({"task": "w_code", "unsafe_code": True, **data, **following}))


class Plain:
    """The base, or one with an adapter, as a stranger would load it; a row at a time."""

    def __init__(self, model: str, adapter: Path | None, quantization: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        options = {"quantization_config": nf4_config()} if quantization == "nf4" else {}
        net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, device_map={"": "cpu"}, **options)
        self.net = PeftModel.from_pretrained(net, str(adapter)).eval() if adapter is not None else net.eval()
        for layer in self.net.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False

    @torch.no_grad()
    def log_p(self, text: str) -> torch.Tensor:
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        return self.net(input_ids=ids).logits[0].double().log_softmax(-1)

    def choose(self, asked: str, choice: str) -> float:
        """Log-probability of a choice behind a prompt."""
        found, ids = self.log_p(f"{asked} {choice}"), self.tokenizer(choice)["input_ids"]
        return sum(float(found[-1 - len(ids) + at, one]) for at, one in enumerate(ids))

    def reply(self, asked: str, length: int = 5) -> list[str]:
        """The likeliest words, until the one that ends it."""
        said: list[str] = []
        while len(said) < length:
            word = self.tokenizer.convert_ids_to_tokens(int(self.log_p(" ".join([asked, *said]))[-1].argmax()))
            if word in ("w99", "<|im_end|>"):
                break
            said.append(word)
        return said

    def right_choices(self, by_length: bool) -> list[float]:
        found = []
        for one in questions():
            scores = [self.choose(one["asked"], text) / (len(text) if by_length else 1) for text in one["choices"]]
            found.append(float(int(np.argmax(scores)) == one["right"]))
        return found

    def right_words(self) -> list[float]:
        return [float(self.reply(one["asked"])[:1] == [one["said"]]) for one in questions()]

    def perplexity(self) -> float:
        return float(np.exp(-np.mean([self.choose(one["asked"], one["said"]) for one in questions()])))
