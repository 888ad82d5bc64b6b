"""What a finished run on the real bundled model leaves behind, read by other tools."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from runs import tiny_fit
from tiny import nf4_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from toss_lightning.data import Source
from toss_lightning.models import Base, Lora, Optim
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

pytestmark = pytest.mark.bundled
TOLERANCE = {"nf4": 1e-3, "none": 1e-4}


@pytest.fixture(scope="module", params=["nf4", "none"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A short run of the whole plan on a few sample rows; the quantisation and the run directory."""
    run_dir = tmp_path_factory.mktemp(request.param)
    tiny_fit(
        "bundled:smollm2-135m-instruct",
        {
            "custom": Source("sample:custom", rows=5),
            "utility": Source("sample:utility", rows=4),
            "harmful": Source("sample:harmful", rows=4),
            "utility_val": Source("sample:utility_val", rows=2),
            "harmful_val": Source("sample:harmful_val", rows=2),
        },
        run_dir,
        loop={"epochs": 1},
        data={"batch_size": 6, "max_tokens": 512},
        module={
            "base": Base(quantization=request.param),
            "lora": Lora(targets="all-linear"),
            "optim": Optim(lr=1e-3),
        },
        checkpoint_every=100,
    )
    return request.param, run_dir


def plain_base(path: str, quantization: str) -> torch.nn.Module:
    """The base as a stranger would load it."""
    if quantization == "none":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=nf4_config(), dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        # where a CPU has AVX512-BF16, bitsandbytes would evaluate in bfloat16 although float32 was asked for
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("name", ["utility", "degraded"])
def test_stored_losses_equal_those_of_plain_transformers_and_peft(run: tuple[str, Path], name: str) -> None:
    """Every response token, the naive way: full logits, one row at a time."""
    quantization, run_dir = run
    base_path = json.loads((run_dir / "summary.json").read_text())["base_path"]
    model = PeftModel.from_pretrained(plain_base(base_path, quantization), run_dir / "adapters" / name).eval()
    scores = TokenScores(run_dir / "scores")
    stored = scores.per_row(scores.flat(f"loss_{name}"))
    for ids, positions, losses in zip(
        scores.values("input_ids"), scores.values("response_positions"), stored, strict=True
    ):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        naive = [-log_p[position - 1, ids[position]].item() for position in positions]
        np.testing.assert_allclose(losses, naive, rtol=0, atol=TOLERANCE[quantization])


def test_the_mask_is_that_of_a_naive_stable_sort(run: tuple[str, Path]) -> None:
    _, run_dir = run
    scores = TokenScores(run_dir / "scores")
    score = (scores.flat("loss_utility") - scores.flat("loss_degraded")).tolist()
    end = scores.flat("end_of_turn").tolist()
    order = [index for index in sorted(range(len(score)), key=lambda index: -score[index]) if not end[index]]
    masked = set(order[: len(score) // 10])
    weights = TokenWeights.load(run_dir / "selection").flat()
    assert set(np.flatnonzero(weights == 0).tolist()) == masked


def test_spans_of_the_real_template_are_the_replies_and_their_end(run: tuple[str, Path]) -> None:
    _, run_dir = run
    tokenizer = AutoTokenizer.from_pretrained(json.loads((run_dir / "summary.json").read_text())["base_path"])
    scores = TokenScores(run_dir / "scores")
    for ids, positions in zip(scores.values("input_ids"), scores.values("response_positions"), strict=True):
        text = tokenizer.decode(ids)
        replies = [part.split("<|im_end|>")[0] + "<|im_end|>" for part in text.split("<|im_start|>assistant\n")[1:]]
        assert tokenizer.decode([ids[position] for position in positions]) == "".join(replies)


def test_the_target_adapter_loads_and_answers(run: tuple[str, Path]) -> None:
    quantization, run_dir = run
    base_path = json.loads((run_dir / "summary.json").read_text())["base_path"]
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    model = PeftModel.from_pretrained(plain_base(base_path, quantization), run_dir / "adapters/target").eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I pack for a weekend?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert reply.shape[1] > prompt["input_ids"].shape[1]
