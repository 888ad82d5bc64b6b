"""Gradients of single rows, measured in one backward pass, against backward passes over one row at a time."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import nf4_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from toss_lightning.errors import ConfigError, ModelError
from toss_lightning.gradients import Gradients, RowGradients

LENGTHS = [9, 4, 12, 2]


def lora_model(path: str, quantised: bool = False, **config) -> PeftModel:
    """The tiny Llama with two adapters of random weights, so that no gradient is 0; ``slot`` is trained."""
    options = {"quantization_config": nf4_config()} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    settings = LoraConfig(**{"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
    net = get_peft_model(model, settings, adapter_name="slot")
    net.add_adapter("frozen", settings)
    net.set_adapter("slot")
    torch.manual_seed(0)
    for name, value in net.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.2)
    return net.train()


def trained(net: PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in net.named_parameters() if value.requires_grad}


def row_losses(net: PeftModel, rows: list[Tensor]) -> Tensor:
    """Mean loss of all tokens but the first of each row, padded on the right with token 0; ``[B]``."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    log_p = net(input_ids=padded, use_cache=False).logits[:, :-1].log_softmax(-1)
    losses = -log_p.gather(-1, padded[:, 1:, None]).squeeze(-1)
    return torch.stack([loss[: len(row) - 1].mean() for loss, row in zip(losses, rows, strict=True)])


def one_at_a_time(net: PeftModel, rows: list[Tensor]) -> list[Gradients]:
    parameters = trained(net)
    return [
        dict(zip(parameters, torch.autograd.grad(row_losses(net, [row])[0], parameters.values()), strict=True))
        for row in rows
    ]


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 100, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "nf4"])
def test_norms_and_products_equal_those_of_single_rows(tiny_model: str, rows: list[Tensor], kind: str) -> None:
    net = lora_model(tiny_model, quantised=kind == "nf4")
    if kind == "checkpointed":
        net.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    direction = {name: torch.randn_like(value) for name, value in trained(net).items()}
    with RowGradients(net, "slot", direction) as measure:
        norms, products = measure.backward(row_losses(net, rows))
    singles = one_at_a_time(net, rows)
    expected = [sum(value.double().square().sum() for value in single.values()) ** 0.5 for single in singles]
    torch.testing.assert_close(norms.double(), torch.stack(expected), rtol=1e-4, atol=0)
    expected = [sum((value * direction[name]).double().sum() for name, value in one.items()) for one in singles]
    torch.testing.assert_close(products.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert norms.unique().numel() == len(LENGTHS), "the test is about different rows"


def test_what_was_accumulated_before_stays_and_nothing_is_left_on_the_layers(
    tiny_model: str, rows: list[Tensor]
) -> None:
    net = lora_model(tiny_model)
    for value in trained(net).values():
        value.grad = torch.full_like(value, 7.0)
    with RowGradients(net, "slot") as measure:
        norms, products = measure.backward(row_losses(net, rows))
        again, _ = measure.backward(row_losses(net, rows[::-1]))
    torch.testing.assert_close(again, norms.flip(0))
    assert not products.any(), "no direction was given"
    assert all((value.grad == 7.0).all() for value in trained(net).values())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("config", "named"),
    [({"use_dora": True}, "lora_magnitude_vector"), ({"target_modules": ["embed_tokens"]}, "embed")],
)
def test_adapters_that_are_no_plain_lora_on_linear_layers_are_refused(
    tiny_model: str, config: dict, named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model.lora: .*{named}.* is no plain LoRA .*: set model.lora.dora: false"):
        RowGradients(lora_model(tiny_model, **config), "slot")


class Odd(nn.Module):
    """A layer with an adapter that computes twice, or on tokens of all rows in one line."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.lora_A, self.twice = nn.ModuleDict({"slot": nn.Linear(3, 3, bias=False)}), twice

    def forward(self, hidden: Tensor) -> Tensor:
        layer = self.lora_A["slot"]
        return layer(layer(hidden)) if self.twice else layer(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@pytest.mark.parametrize(("twice", "problem"), [(True, "computes twice"), (False, r"takes \[8, 3\], which is not row")])
def test_layers_in_which_rows_cannot_be_told_apart_are_refused(twice: bool, problem: str) -> None:
    net = nn.Sequential(Odd(twice))
    with (
        pytest.raises(ModelError, match=rf"^0.lora_A.slot: {problem}.*: leave it out of model.lora.targets$"),
        RowGradients(net, "slot") as measure,
    ):
        measure.backward(net(torch.ones(2, 4, 3)).sum((1, 2)))
