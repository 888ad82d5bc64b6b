import os
import shutil
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from tiny import nf4_config, save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from toss_lightning.errors import ModelError, StoreError
from toss_lightning.files import ABANDONED
from toss_lightning.models import AdapterBank, Base, Lora
from toss_lightning.models.adapters import BASE
from toss_lightning.models.base import _sample_hash, compute_dtype, load_base, load_tokenizer, resolve
from toss_lightning.models.divergence import base_divergence
from toss_lightning.models.fingerprint import stored_digest
from toss_lightning.models.losses import OutputHead, response_hidden, token_losses

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


def test_the_last_positions_reach_the_head_side_by_side(tiny_model: str) -> None:
    """As a slice of all positions a CPU would multiply them by a copy of the head's weights for each row."""
    model, seen = load_base(Base(tiny_model, quantization="none"), CPU), []
    model.lm_head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    ids = torch.arange(1, 13).reshape(3, 4)
    last = model(input_ids=ids, logits_to_keep=1).logits
    assert [(one.shape[:2], one.is_contiguous()) for one in seen] == [((3, 1), True)]
    torch.testing.assert_close(last[:, 0], model(input_ids=ids).logits[:, -1])


def test_no_quantisation_gives_the_weights_of_plain_transformers(tiny_model: str) -> None:
    ours = load_base(Base(tiny_model, quantization="none"), CPU).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_int8_loads(model_64: str) -> None:
    model = load_base(Base(model_64, quantization="int8"), CPU)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear8bitLt)


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
        ("~nosuchuser/llama", "model.base.path: ~nosuchuser/llama: no such directory"),
        ("~nosuchuser/llama.gguf", "model.base.path: ~nosuchuser/llama.gguf: no such file"),
        ("bundled:nothing", "bundled:nothing does not exist; there is smollm2-135m-instruct"),
    ],
)
def test_a_base_that_is_not_there(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load_tokenizer(Base(path))
    assert "\n" not in str(error.value)


def test_what_is_missing_in_a_folder_that_is_here_is_not_looked_for_on_the_hub(somewhere: None) -> None:
    Path("models/llama-1b").mkdir(parents=True)
    for load in (load_tokenizer, lambda base: load_base(base, CPU)):
        with pytest.raises(ModelError) as error:
            load(Base("models/llama1b"))
        assert str(error.value) == (
            "model.base.path: models/llama1b: no such directory (is it models/llama-1b?); the hub's is"
            " hf://models/llama1b"
        )


def test_the_hub_is_asked_for_a_base_that_is_said_to_be_there(somewhere: None) -> None:
    Path("models/llama-1b").mkdir(parents=True)
    assert resolve(Base("hf://models/llama-8b")) == "models/llama-8b"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2048\n"
FETCH = (
    "; a file may be damaged, or the pointer to one that git-lfs leaves: fetch it again; or code of the repository does"
    " not fit these libraries"
)


def damaged(model: str, folder: Path, name: str, content: bytes) -> Base:
    """A copy of a model with one file that is not as it was."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    return Base(str(folder), quantization="none")


@pytest.mark.parametrize("left", [POINTER, b"", 1000], ids=["a pointer of git-lfs", "empty", "cut"])
def test_weights_that_are_damaged(tiny_model: str, tmp_path: Path, left: bytes | int) -> None:
    content = (Path(tiny_model) / "model.safetensors").read_bytes()[:left] if isinstance(left, int) else left
    base = damaged(tiny_model, tmp_path, "model.safetensors", content)
    for load, wrong in (
        (lambda: load_base(base, CPU), "cannot be loaded"),
        (lambda: stored_digest(base), "cannot be read"),
    ):
        with pytest.raises(ModelError) as error:
            load()
        assert str(error.value).startswith(f"model.base.path: {tmp_path}: {wrong}: SafetensorError: ")
        assert str(error.value).endswith(FETCH)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "Weights only load failed"), (b"", "EOFError"), (b"junk", "unpack requires")]
)
def test_pickled_weights_that_are_damaged(tiny_model: str, tmp_path: Path, content: bytes, said: str) -> None:
    base = damaged(tiny_model, tmp_path, "pytorch_model.bin", content)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"cannot be loaded: .*{said}.*{FETCH}") as error:
        load_base(base, CPU)
    assert "weights_only" not in str(error.value), "torch advises to trust the file"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", POINTER, "Expecting value: line 1"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "Unknown"}}', "Exception: data did not match any"),
        ("tokenizer.json", b'{"version": "1.0"}', "KeyError: 'added_tokens'; a file may be damaged"),
        ("tokenizer_config.json", b"[]", "AttributeError: 'list' object has no"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "expected int, got str"),
    ],
)
def test_a_tokenizer_that_is_damaged(tiny_model: str, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    base = damaged(tiny_model, tmp_path, name, content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(base)
    assert str(error.value).startswith(f"model.base.path: {tmp_path}: no tokenizer to be had: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_code_of_a_repository_raises(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError("This modeling file requires einops\nRun pip install einops")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for source, load in ((AutoTokenizer, load_tokenizer), (AutoModelForCausalLM, lambda base: load_base(base, CPU))):
        monkeypatch.setattr(source, "from_pretrained", lacking)
        with pytest.raises(ModelError, match=r"requires einops$"):
            load(Base(tiny_model, quantization="none"))
        monkeypatch.setattr(source, "from_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(Base(tiny_model, quantization="none"))


def test_a_cache_that_cannot_be_written(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (AutoTokenizer, AutoModelForCausalLM):
        loaded = source.from_pretrained(tiny_model)
        monkeypatch.setattr(source, "from_pretrained", lambda *_, loaded=loaded, **__: loaded)
    (tmp_path / "tiny.gguf").write_bytes(b"a model")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("TOSS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StoreError, match=r"free some space or name another directory in TOSS_CACHE$"):
        load_tokenizer(Base(str(tmp_path / "tiny.gguf")))


@pytest.fixture
def gguf(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is read as the tiny model, and an empty cache."""
    for source in (AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(
            source, "from_pretrained", lambda *_, loaded=source.from_pretrained(tiny_model), **__: loaded
        )
    monkeypatch.setenv("TOSS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"a model")
    return tmp_path / "tiny.gguf"


def test_a_model_that_another_process_converts_meanwhile_stays_as_it_is(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Path(resolve(Base(str(gguf))))
    shutil.move(theirs, tmp_path / "theirs")
    read = AutoTokenizer.from_pretrained

    def while_they_end(*args: Any, **options: Any) -> Any:
        shutil.move(tmp_path / "theirs", theirs)
        return read(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", while_they_end)
    before = {path: path.stat() for path in (tmp_path / "theirs").iterdir()}
    assert resolve(Base(str(gguf))) == str(theirs)
    assert {path.name: path.stat().st_ino for path in theirs.iterdir()} == {
        path.name: stat.st_ino for path, stat in before.items()
    }
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]


def test_what_a_conversion_that_was_killed_left_behind_is_taken_away_by_a_later_one(gguf: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    left, young, foreign = (
        cache / name for name in (f".big-{'0f' * 6}.7.tmp", f".big-{'1e' * 6}.7.tmp", ".mine.7.tmp")
    )
    for path in (left, young, foreign):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"half")
    for path in (left, foreign):
        os.utime(path, (time.time() - ABANDONED - 60,) * 2)
    target = Path(resolve(Base(str(gguf))))
    assert {path.name for path in cache.iterdir()} == {target.name, young.name, foreign.name}


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(Base(str(tmp_path), quantization="none"), CPU)


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_tokenizer(Base(str(tmp_path / "broken.gguf")))


@pytest.mark.parametrize(
    ("at", "width"),
    [(200_000, 1), (50 * 2**20 - 9, 1), *((2**24 + part * 2**22 + 1, 2**22) for part in range(3))],
    ids=["in the header", "at the end", "a matrix", "another", "a third"],
)
def test_files_of_one_size_that_differ_anywhere_are_two(tmp_path: Path, at: int, width: int) -> None:
    one = bytearray(50 * 2**20)
    (tmp_path / "one").write_bytes(one)
    one[at : at + width] = b"\1" * width
    (tmp_path / "other").write_bytes(one)
    assert _sample_hash(tmp_path / "one") != _sample_hash(tmp_path / "other")


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


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.1}
RESTLESS = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, embd_pdrop=0.1, resid_pdrop=0.1)),
    "Phi": lambda: PhiForCausalLM(PhiConfig(**SMALL, embd_pdrop=0.1, resid_pdrop=0.1, attention_dropout=0.1)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.1)),
    "OPT": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.1, layerdrop=0.5)),
    "Mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2, router_jitter_noise=0.3)
    ),
}
"""Bases that draw random numbers in training mode: dropout of all kinds, layers left out, noise before a router."""


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", RESTLESS)
def test_a_base_in_training_mode_has_no_dropout_of_its_own(kind: str, attention: str, tmp_path: Path) -> None:
    """Its own dropout would make the target differ from it before the first step, and two looks from each other."""
    torch.manual_seed(0)
    restless = RESTLESS[kind]()
    restless.save_pretrained(tmp_path)
    settings = Base(str(tmp_path), quantization="none", attention=attention, gradient_checkpointing=True)
    model = load_base(settings, CPU)
    bank, head = AdapterBank(model, Lora(r=2, targets="all-linear"), str(tmp_path), ()), OutputHead.of(model)
    bank.net.train()
    ids, row = torch.arange(4, 20).reshape(2, 8), torch.tensor([0, 0, 1, 1])
    position = torch.tensor([3, 7, 5, 6])

    def hidden() -> torch.Tensor:
        return response_hidden(model, ids, row, position)

    with bank.using(BASE), torch.no_grad():
        base = hidden()
    one, other = (token_losses(hidden(), ids[row, position], head) for _ in range(2))
    assert torch.equal(one, other)
    assert not base_divergence(hidden(), base, head).any()
    assert all(layer.training for layer in model.modules()), "checkpointing looks at the mode"
    bank.net.eval()
    assert torch.equal(token_losses(hidden(), ids[row, position], head), one)


def test_dropout_of_adapters_stays_and_can_be_left_out(tiny_model: str) -> None:
    model = load_base(Base(tiny_model, quantization="none"), CPU)
    bank = AdapterBank(model, Lora(r=2, targets="all-linear", dropout=0.5), tiny_model, ())
    bank.net.train()
    for name, value in bank.parameters("slot"):
        if "lora_B" in name:
            value.data.fill_(0.1)
    ids, at = torch.arange(4, 20).unsqueeze(0), torch.arange(1, 16)

    def hidden() -> torch.Tensor:
        return response_hidden(model, ids, 0 * at, at)

    assert not torch.equal(hidden(), hidden())
    with bank.without_dropout():
        still = hidden()
        assert torch.equal(hidden(), still)
    assert not torch.equal(hidden(), hidden())
    bank.net.eval()
    assert torch.equal(hidden(), still)
    with bank.without_dropout():
        pass
    assert not any(layer.training for layer in bank.net.modules()), "the mode is the one from before"
