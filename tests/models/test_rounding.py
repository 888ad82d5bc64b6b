"""What rounding makes of a divergence from the base, against the same network in float32."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny_fit
from tiny import WORDS, save_tiny_model, some_pairs, write_rows
from torch import Tensor

from toss_lightning.gradients import SPF, DualSelect, SafeGrad
from toss_lightning.gradients.safegrad import ROUNDING
from toss_lightning.loops.method import Method
from toss_lightning.models import AdapterBank, Base, Lora, Optim
from toss_lightning.models.adapters import BASE, SLOT
from toss_lightning.models.base import load_base, load_tokenizer
from toss_lightning.models.divergence import base_divergence
from toss_lightning.models.losses import OutputHead, response_hidden
from toss_lightning.models.rounding import rounded_otherwise
from toss_lightning.selection import Anchored, GlobalTopFraction

HALF = ("bfloat16", "float16")


class Network:
    """Six layers with weights so large that they do not only pass on what comes in."""

    def __init__(self, path: str, dtype: Any) -> None:
        model = load_base(Base(path, quantization="none", dtype=dtype), torch.device("cpu"))
        for value in model.parameters():
            value.data.mul_(4 if value.dim() == 2 else 1)
        self.head = OutputHead.of(model)
        self.bank = AdapterBank(model, Lora(r=4, targets="all-linear"), path, (), 1)

    def kl(self, update: float, noise: bool = False, seed: int = 0) -> tuple[float, Tensor]:
        """KL(base || adapter) on fixed rows and its gradient, the adapter being an update of a size."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, len(WORDS), (4, 20), generator=generator)
        row, position = torch.arange(4).repeat_interleave(12), torch.arange(8, 20).repeat(4)
        with torch.no_grad():
            for name, value in self.bank.parameters(SLOT):
                if "lora_B" in name:
                    value.copy_(update * torch.randn(value.shape, generator=generator))
            with self.bank.using(BASE):
                base = response_hidden(self.bank.model, ids, row, position)
        with rounded_otherwise(self.bank.net, seed) if noise else nullcontext():
            hidden = response_hidden(self.bank.model, ids, row, position)
        mean = base_divergence(hidden, base, self.head).mean()
        gradient = torch.autograd.grad(mean, [value for _, value in self.bank.parameters(SLOT)])
        return mean.item(), torch.cat([value.flatten().double() for value in gradient])


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Network]:
    """The same network in each precision."""
    path = save_tiny_model(tmp_path_factory.mktemp("deep"), hidden=64, layers=6)
    return {dtype: Network(path, dtype) for dtype in ("float32", *HALF)}


@pytest.mark.parametrize("dtype", HALF)
def test_an_update_too_small_to_matter_makes_the_measured_kl_and_gradient(networks: Any, dtype: str) -> None:
    exact, network = networks["float32"], networks[dtype]
    floor, noise = network.kl(0.0, noise=True)
    for update in (1e-6, 1e-5):
        true, direction = exact.kl(update)
        found, gradient = network.kl(update)
        assert abs(true) < 0.1 * floor, "the update itself makes no divergence to speak of"
        assert 0.01 * floor < abs(found) < 3 * floor
        cosine = float(gradient @ direction / gradient.norm() / direction.norm())
        assert abs(cosine) < 0.5, "nor has the gradient its direction"
        assert float(gradient.norm()) <= ROUNDING * float(noise.norm()), "and so it is left alone"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("update", [1e-4, 3e-4, 1e-3, 1e-2, 1e-1])
def test_a_gradient_above_the_floor_has_the_direction_of_float32(networks: Any, dtype: str, update: float) -> None:
    network = networks[dtype]
    floor = ROUNDING * float(network.kl(0.0, noise=True)[1].norm())
    direction, gradient = networks["float32"].kl(update)[1], network.kl(update)[1]
    if float(gradient.norm()) > floor:
        assert float(gradient @ direction / gradient.norm() / direction.norm()) > 0.8
    assert update < 1e-3 or float(gradient.norm()) > floor


def test_in_float32_the_floor_lies_far_lower(networks: Any) -> None:
    floor = ROUNDING * float(networks["float32"].kl(0.0, noise=True)[1].norm())
    assert float(networks["float32"].kl(0.0)[1].norm()) < floor < float(networks["float32"].kl(1e-6)[1].norm())


@pytest.mark.parametrize("dtype", HALF)
def test_only_an_adapter_in_use_is_rounded_otherwise_and_no_random_number_is_taken(networks: Any, dtype: str) -> None:
    bank = networks[dtype].bank
    ids, at = torch.arange(4, 24).unsqueeze(0), torch.arange(20)

    def hidden() -> Tensor:
        with torch.no_grad():
            return response_hidden(bank.model, ids, 0 * at, at)

    networks[dtype].kl(0.0)
    before, state = hidden(), torch.get_rng_state()
    with rounded_otherwise(bank.net):
        assert not torch.equal(hidden(), before)
        with bank.using(BASE):
            assert torch.equal(hidden(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(hidden(), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safegrad_leaves_rounding_alone_and_says_so(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path, dtype: Any, recwarn: pytest.WarningsRecorder
) -> None:
    sets = {**tiny_sets, "safety": write_rows(tmp_path / "safety.jsonl", some_pairs(7, start=5))}
    module = {
        "base": Base(tiny_model, quantization="none", dtype=dtype),
        "correction": SafeGrad(),
        "optim": Optim(lr=1e-6),
    }
    tiny_fit(tiny_model, sets, tmp_path / "run", plan=["target"], module=module)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    report = summary["correction"]
    assert summary["precision"] == f"none/{dtype}"
    assert report["below_rounding"] == (report["steps"] if dtype == "bfloat16" else 1)
    assert report["corrected"] == report["steps"] - report["below_rounding"]
    warned = [str(one.message) for one in recwarn if "divergences from the base" in str(one.message)]
    if dtype == "float32":
        assert not warned
    else:
        assert len(warned) == 1
        assert warned[0].startswith("model.correction: divergences from the base are taken in bfloat16, in which small")
        assert summary["idle"] == ["SafeGrad changed no step's gradient"]


@pytest.mark.bundled
def test_rounding_moves_the_bundled_model_in_bfloat16_alone() -> None:
    """By some 2e-3 nats, and by less than a thousandth of that in float32."""
    tokenizer: Any = load_tokenizer(Base())
    floors: dict[str, float] = {}
    text = (
        "I would rather not help with that, because it could hurt people. Is there something else that you would like?"
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    at = torch.arange(1, ids.shape[1])
    for dtype in ("float32", "bfloat16"):
        model = load_base(Base(quantization="none", dtype=dtype), torch.device("cpu"))
        bank, head = AdapterBank(model, Lora(r=4), "bundled", ()), OutputHead.of(model)
        with torch.no_grad():
            base = response_hidden(model, ids, 0 * at, at)
            with rounded_otherwise(bank.net):
                hidden = response_hidden(model, ids, 0 * at, at)
            floors[dtype] = base_divergence(hidden, base, head).mean().item()
    assert 1e-3 < floors["bfloat16"] < 4e-3
    assert abs(floors["float32"]) < 1e-3 * floors["bfloat16"]


def test_who_takes_divergences() -> None:
    anchored, correction = "loop.selection", "model.correction"
    assert Method(Anchored(), SafeGrad()).divergences(weighted=True) == [anchored, correction]
    assert Method(Anchored(), SafeGrad()).divergences(weighted=False) == [correction]
    assert Method(Anchored(), SPF()).divergences(weighted=True) == [anchored]
    assert Method(GlobalTopFraction(), DualSelect()).divergences(weighted=True) == []
