from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from tiny import nf4_config, save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from toss_lightning.errors import ModelError
from toss_lightning.models import Base
from toss_lightning.models.base import base_fingerprint, compute_dtype, load_base, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_64(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers of 64 columns or more, which 4-bit blocks need."""
    return save_tiny_model(tmp_path_factory.mktemp("model64"), hidden=64)


def test_nf4_is_real_4bit_with_double_quantisation_and_float32_compute(model_64: str) -> None:
    model = load_base(Base(model_64, quantization="nf4"), CPU)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32
    assert not any(value.requires_grad for value in model.parameters())


def test_nf4_computes_in_the_dtype_it_says_also_where_the_cpu_offers_bfloat16(model_64: str) -> None:
    """Some CPUs make bitsandbytes repack weights for a bfloat16 kernel in evaluation mode; load_base forbids it."""
    model = load_base(Base(model_64, quantization="nf4"), CPU).eval()
    layer = model.model.layers[0].mlp.up_proj
    assert not layer.support_avx512bf16_for_cpu
    full = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ full.T.to(x.dtype), rtol=1e-5, atol=1e-5)


def test_no_quantisation_gives_the_weights_of_plain_transformers(tiny_model: str) -> None:
    ours = load_base(Base(tiny_model, quantization="none"), CPU).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_int8_loads(model_64: str) -> None:
    model = load_base(Base(model_64, quantization="int8"), CPU)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear8bitLt)


def test_the_fingerprint_knows_the_base_whatever_it_is_quantised_to(model_64: str, tmp_path: Path) -> None:
    loaded = [load_base(Base(model_64, quantization=kind), CPU) for kind in ("nf4", "int8", "none")]
    half = load_base(Base(model_64, quantization="none", dtype="bfloat16"), CPU)
    assert len({base_fingerprint(model) for model in (*loaded, half)}) == 1
    other = load_base(Base(save_tiny_model(tmp_path, hidden=64, seed=1), quantization="none"), CPU)
    assert base_fingerprint(other) != base_fingerprint(half)


def test_the_compute_dtype_goes_by_the_device_unless_it_is_named() -> None:
    assert compute_dtype(Base(), CPU) == torch.float32
    assert compute_dtype(Base(dtype="bfloat16"), CPU) == torch.bfloat16


def test_the_attention_implementation_is_passed_on(tiny_model: str) -> None:
    model = load_base(Base(tiny_model, quantization="none", attention="eager"), CPU)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./no/such/directory", "model.base.path: ./no/such/directory: no such directory"),
        ("no_such.gguf", "model.base.path: no_such.gguf: no such file"),
        ("bundled:nothing", "bundled:nothing does not exist; there is smollm2-135m-instruct"),
    ],
)
def test_a_base_that_is_not_there(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load_tokenizer(Base(path))
    assert "\n" not in str(error.value)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(Base(str(tmp_path), quantization="none"), CPU)


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_tokenizer(Base(str(tmp_path / "broken.gguf")))


def test_plain_transformers_quantises_to_the_same_weights(model_64: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        model_64, quantization_config=nf4_config(), dtype=torch.float32, device_map={"": "cpu"}
    )
    ours = load_base(Base(model_64), CPU)
    for name, value in plain.named_parameters():
        assert torch.equal(value, dict(ours.named_parameters())[name]), name


def test_a_base_that_is_stored_quantised_is_refused(model_64: str, tmp_path: Path) -> None:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = AutoModelForCausalLM.from_pretrained(model_64, quantization_config=stored, device_map={"": "cpu"})
    model.save_pretrained(tmp_path)
    for quantization in ("nf4", "none"):
        with pytest.raises(
            ModelError, match=r"its weights are stored quantised \(bitsandbytes\): give the original model"
        ):
            load_base(Base(str(tmp_path), quantization=quantization), CPU)


def test_a_path_may_begin_at_home(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(tiny_model).parent))
    assert load_tokenizer(Base(f"~/{Path(tiny_model).name}")).chat_template
