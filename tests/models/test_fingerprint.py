"""Which base it is, told from its files and from the network in memory."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

from toss_lightning.models import Base
from toss_lightning.models.base import load_base
from toss_lightning.models.fingerprint import base_fingerprint, stored_digest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_64(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers of 64 columns or more, which 4-bit blocks need."""
    return save_tiny_model(tmp_path_factory.mktemp("model64"), hidden=64)


def test_the_fingerprint_knows_the_base_whatever_it_is_quantised_to(model_64: str, tmp_path: Path) -> None:
    loaded = [load_base(Base(model_64, quantization=kind), CPU) for kind in ("nf4", "int8", "none")]
    half = load_base(Base(model_64, quantization="none", dtype="bfloat16"), CPU)
    stored = stored_digest(Base(model_64))
    assert len({base_fingerprint(model, stored) for model in (*loaded, half)}) == 1
    other = Base(save_tiny_model(tmp_path, hidden=64, seed=1), quantization="none")
    assert base_fingerprint(load_base(other, CPU), stored_digest(other)) != base_fingerprint(half, stored)


def test_the_fingerprint_knows_what_a_configuration_changes_of_the_same_weights(model_64: str) -> None:
    model, stored = load_base(Base(model_64, quantization="none"), CPU), stored_digest(Base(model_64))
    before = base_fingerprint(model, stored)
    model.config.use_cache = not model.config.use_cache
    assert base_fingerprint(model, stored) == before
    model.config.rms_norm_eps *= 10
    changed = base_fingerprint(model, stored)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 77.0}
    assert len({before, changed, base_fingerprint(model, stored)}) == 3


def test_the_fingerprint_knows_a_base_that_differs_within_but_not_how_it_is_cut_into_files(
    model_64: str, tmp_path: Path
) -> None:
    model = load_base(Base(model_64, quantization="none"), CPU)
    model.save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-3
    model.save_pretrained(tmp_path / "merged")
    digests = [stored_digest(Base(str(path))) for path in (model_64, tmp_path / "cut", tmp_path / "merged")]
    assert digests[0] == digests[1] != digests[2]


def test_a_base_is_the_same_where_another_device_is_the_default(model_64: str) -> None:
    """As the GPU is while Lightning lets a module make its model."""
    with torch.device("meta"):
        there = stored_digest(Base(model_64))
    assert there == stored_digest(Base(model_64))


def test_weights_in_pickled_files_are_known_too(model_64: str, tmp_path: Path) -> None:
    weights = load_base(Base(model_64, quantization="none"), CPU).state_dict()
    for scale in (1.0, 2.0):
        changed = {name: value * scale for name, value in weights.items()}
        torch.save(changed | {"number": torch.tensor(3.0)}, tmp_path / "pytorch_model.bin")
        assert stored_digest(Base(str(tmp_path))) not in ("", stored_digest(Base(model_64)))
    (tmp_path / "pytorch_model.bin").unlink()
    assert stored_digest(Base(str(tmp_path))) == ""
