"""An oracle for losses, divergences and gradients: plain transformers and PEFT, single rows, full logits, autograd."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM


class Dense:
    """The tiny model with one adapter, without dropout.

    Args:
        path: the model's directory.
        rank: of the adapter, on all linear layers.
    """

    def __init__(self, path: str, rank: int = 4) -> None:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.net: Any = get_peft_model(base, config, adapter_name="slot").eval()
        self.weights = {name: value for name, value in self.net.named_parameters() if value.requires_grad}

    def at(self, weights: Mapping[str, Tensor]) -> "Dense":
        """The same with these weights."""
        assert weights.keys() == self.weights.keys()
        for name, value in self.weights.items():
            value.data.copy_(weights[name])
        return self

    def losses(self, row: Mapping[str, Any]) -> Tensor:
        """Token losses of a row's response."""
        log_p = self._log_p(row)
        return torch.stack([-log_p[at - 1, row["ids"][at]] for at in row["positions"]])

    def divergences(self, row: Mapping[str, Any], top: int | None = None) -> Tensor:
        """KL(base || adapter) at each of them, all tokens beside the base's ``top`` likeliest taken as one."""
        with torch.no_grad(), self.net.disable_adapter():
            base = self._log_p(row).exp()
        target, found = self._log_p(row).exp(), []
        for at in row["positions"]:
            p, q = base[at - 1], target[at - 1]
            if top is not None:
                order = p.argsort(descending=True)
                p, q = (torch.cat([one[order[:top]], one[order[top:]].sum().reshape(1)]) for one in (p, q))
            found.append((p * (p / q).log()).sum())
        return torch.stack(found)

    def gradient(self, value: Tensor) -> dict[str, Tensor]:
        """Of a scalar."""
        found = torch.autograd.grad(value, list(self.weights.values()))
        return dict(zip(self.weights, found, strict=True))

    def _log_p(self, row: Mapping[str, Any]) -> Tensor:
        log_p: Tensor = self.net(input_ids=row["ids"].unsqueeze(0)).logits[0].log_softmax(-1)
        return log_p


def vector(gradients: Mapping[str, Tensor]) -> Tensor:
    """All of it in one, float64."""
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 2e-4) -> None:
    """Gradients that differ by rounding alone."""
    assert found.keys() == wanted.keys()
    whole = float(vector(wanted).norm())
    assert whole > 0
    for name, value in wanted.items():
        distance = float((found[name] - value).norm())
        assert distance <= tolerance * max(float(value.norm()), 0.02 * whole), (name, distance, float(value.norm()))
