import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from toss_lightning.data.batching import collate
from toss_lightning.data.tokenize import TokenizedRow
from toss_lightning.errors import ModelError
from toss_lightning.models.losses import OutputHead, check_head, response_hidden, token_losses

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def row(row_id: int, length: int, prompt: int) -> TokenizedRow:
    generator = torch.Generator().manual_seed(row_id)
    ids = torch.randint(1, 61, (length,), generator=generator).numpy().astype("int32")
    positions = torch.arange(prompt, length).numpy().astype("int32")
    return TokenizedRow(row_id, ids, positions, positions == length - 1)


def naive_losses(model: torch.nn.Module, rows: list[TokenizedRow]) -> torch.Tensor:
    """Full logits, one row at a time, without padding."""
    losses = []
    for one in rows:
        ids = torch.from_numpy(one.input_ids).long()
        log_p = model(input_ids=ids.unsqueeze(0)).logits[0].float().log_softmax(-1)
        losses += [-log_p[position - 1, ids[position]] for position in one.response_positions]
    return torch.stack(losses)


def architecture(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gemma2-softcap":
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5, query_pre_attn_scalar=8))
    elif name == "cohere-scale":
        model = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
    else:
        model = GraniteForCausalLM(
            GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=7.0)
        )
    return model.eval()


@pytest.mark.parametrize("chunk", [1, 7, 20, 512])
def test_losses_of_padded_batches_equal_full_logits_of_single_rows(tiny_model: str, chunk: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rows = [row(1, 12, 3), row(2, 20, 18), row(3, 5, 1)]
    batch = collate(rows)
    hidden = response_hidden(model, batch["input_ids"], batch["row"], batch["position"])
    losses = token_losses(hidden, batch["input_ids"][batch["row"], batch["position"]], OutputHead.of(model), chunk)
    torch.testing.assert_close(losses, naive_losses(model, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2-softcap", "cohere-scale", "granite-scale"])
def test_heads_that_cap_or_scale_their_logits(name: str) -> None:
    model = architecture(name)
    rows = [row(1, 12, 3), row(2, 9, 4)]
    batch = collate(rows)
    head = OutputHead.of(model)
    check_head(model, head)
    hidden = response_hidden(model, batch["input_ids"], batch["row"], batch["position"])
    losses = token_losses(hidden, batch["input_ids"][batch["row"], batch["position"]], head)
    torch.testing.assert_close(losses, naive_losses(model, rows), rtol=1e-5, atol=1e-5)


def test_a_head_that_does_something_else_is_refused() -> None:
    model = architecture("gemma2-softcap")
    uncapped = OutputHead(model.get_output_embeddings())
    with pytest.raises(ModelError, match="not supported"):
        check_head(model, uncapped)


def test_a_model_that_leaves_the_range_of_its_dtype_is_no_unknown_architecture() -> None:
    model = architecture("granite-scale")
    model.model.norm.weight.data.fill_(6e4)
    model = model.half()
    with pytest.raises(ModelError, match=r"its logits are not finite in float16, .*: set model.base.dtype to bfloat16"):
        check_head(model, OutputHead.of(model))


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_gradients_equal_those_of_the_plain_operation(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 16, requires_grad=True)
    head = torch.nn.Linear(16, 50)
    targets, weight = torch.randint(0, 50, (20,)), torch.rand(20)
    plain = (F.cross_entropy(head(hidden), targets, reduction="none") * weight).sum()
    (wanted,) = torch.autograd.grad(plain, hidden)
    ours = (token_losses(hidden, targets, OutputHead(head), chunk) * weight).sum()
    (gradient,) = torch.autograd.grad(ours, hidden)
    torch.testing.assert_close(gradient, wanted)


def test_no_logits_outlive_their_chunk() -> None:
    """Training memory stays at one chunk: nothing of the size [N, V] is kept for the backward pass."""
    hidden = torch.randn(64, 8, requires_grad=True)
    head = torch.nn.Linear(8, 500)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        token_losses(hidden, torch.zeros(64, dtype=torch.long), OutputHead(head), chunk=16).sum()
    assert max(kept) < 16 * 500


def test_losses_are_float32_whatever_the_hidden_states_are() -> None:
    head = torch.nn.Linear(8, 11).to(torch.bfloat16)
    losses = token_losses(torch.randn(4, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long), OutputHead(head))
    assert losses.dtype == torch.float32


def test_no_tokens_no_losses() -> None:
    losses = token_losses(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), OutputHead(torch.nn.Linear(8, 11)))
    assert losses.shape == (0,)
