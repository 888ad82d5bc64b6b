import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from toss_lightning.errors import ModelError
from toss_lightning.models import AdapterBank, Base, Lora
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.base import load_base

CPU = torch.device("cpu")
IDS = torch.arange(1, 9).unsqueeze(0)


def bank(path: str, lora: Lora = Lora(r=4), quantization: str = "none") -> AdapterBank:
    return AdapterBank(load_base(Base(path, quantization=quantization), CPU), lora, path, ("utility", "degraded"))


def shake(adapters: AdapterBank, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, value in adapters.parameters(SLOT):
        value.data += 0.1 * torch.randn(value.shape, generator=generator)


def test_only_the_slot_is_trainable_whatever_is_in_use(tiny_model: str) -> None:
    adapters = bank(tiny_model)
    for name in (SLOT, "utility", "degraded"):
        adapters.use(name)
        trainable = {key for key, value in adapters.net.named_parameters() if value.requires_grad}
        assert trainable == {key for key, _ in adapters.parameters(SLOT)}


def test_a_snapshot_keeps_its_weights_while_the_slot_goes_on(tiny_model: str) -> None:
    adapters = bank(tiny_model)
    shake(adapters)
    before = adapters.model(IDS).logits
    adapters.copy(SLOT, "utility")
    shake(adapters, seed=1)
    with adapters.using("utility"):
        torch.testing.assert_close(adapters.model(IDS).logits, before)
    assert not torch.allclose(adapters.model(IDS).logits, before)
    assert adapters.digest("utility") != adapters.digest(SLOT)


def test_the_same_weights_at_another_scale_are_another_adapter(tiny_model: str) -> None:
    shapes = (Lora(r=4), Lora(r=4), Lora(r=4, alpha=8), Lora(r=4, rslora=True))
    digests = []
    for lora in shapes:
        adapters = bank(tiny_model, lora)
        shake(adapters)
        digests.append(adapters.digest(SLOT))
    assert digests[0] == digests[1]
    assert len({*digests}) == 3


def test_the_start_is_the_same_whatever_device_a_model_is_made_on(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(Base(tiny_model, quantization="none"), CPU)
    # as Lightning has it while a module makes its model, with a device that draws other numbers: this one draws none,
    # and what looks at weights already there has no use for it
    monkeypatch.setattr("toss_lightning.models.adapters.base_fingerprint", lambda *_: "the base")
    with torch.device("meta"):
        elsewhere = AdapterBank(model, Lora(r=4), tiny_model, ("utility", "degraded"))
    here = dict(bank(tiny_model).parameters(SLOT))
    for name, value in elsewhere.parameters(SLOT):
        assert torch.equal(value, here[name])


def test_reset_takes_the_slot_back_to_the_base_and_to_the_same_start(tiny_model: str) -> None:
    adapters = bank(tiny_model)
    start = adapters.digest(SLOT)
    shake(adapters)
    adapters.reset()
    assert adapters.digest(SLOT) == start
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(adapters.model(IDS).logits, base(IDS).logits)


def test_a_saved_adapter_loads_with_plain_peft_and_comes_back_the_same(tiny_model: str, tmp_path: Path) -> None:
    adapters = bank(tiny_model)
    shake(adapters)
    adapters.save(SLOT, tmp_path / "utility", card="# a card")
    assert (tmp_path / "utility" / "README.md").read_text() == "# a card"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "utility").eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, adapters.model(IDS).logits)

    other = bank(tiny_model)
    other.load("degraded", str(tmp_path / "utility"))
    assert other.digest("degraded") == adapters.digest(SLOT)


def test_an_adapter_below_the_home_directory(
    tiny_model: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = bank(tiny_model)
    found.check("~/adapter")
    found.load("utility", "~/adapter")
    found.load("degraded", str(saved))
    assert found.digest("utility") == found.digest("degraded")


def test_weights_that_are_not_finite_are_not_saved(tiny_model: str, tmp_path: Path) -> None:
    adapters = bank(tiny_model)
    adapters.parameters(SLOT)[0][1].data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        adapters.save(SLOT, tmp_path / "bad", card="")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tiny_model: str, tmp_path: Path) -> Path:
    bank(tiny_model).save(SLOT, tmp_path / "adapter", card="")
    return tmp_path / "adapter"


def test_an_adapter_of_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"adapter: the adapter was trained on another base \(.*set model.base.path"):
        bank(other).load("utility", str(saved))


def test_a_foreign_adapter_is_recognised_by_the_name_of_its_base(tiny_model: str, saved: Path) -> None:
    (saved / "toss.json").unlink()
    bank(tiny_model).load("utility", str(saved))
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/else"}))
    with pytest.raises(ModelError, match="another base"):
        bank(tiny_model).load("utility", str(saved))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(r=8), r"the adapter has r 4, but model\.lora\.r is 8: set model\.lora\.r: 4"),
        (Lora(r=4, alpha=3), r"the adapter has alpha 16, but model\.lora\.alpha is 3"),
        (Lora(r=4, rslora=True), r"the adapter has rslora False"),
        (Lora(r=4, targets=["k_proj"]), r"the adapter sits on \['q_proj', 'v_proj'\], but model\.lora\.targets"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(tiny_model: str, saved: Path, lora: Lora, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        bank(tiny_model, lora).load("utility", str(saved))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "began with init_lora_weights pissa_niter_4, which changes the base too",
        ),
        ({"init_lora_weights": "olora"}, "save it as plain LoRA with PEFT's path_initial_model_for_weight_conversion"),
        ({"peft_type": "IA3"}, "the adapter is PeftType.IA3, which is not supported: give one of LoRA"),
        ({"peft_type": None}, "no PEFT adapter to be had"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    tiny_model: str, saved: Path, facts: dict[str, Any], message: str
) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | facts))
    with pytest.raises(ModelError, match=message) as error:
        bank(tiny_model).load("utility", str(saved))
    assert "\n" not in str(error.value)


def test_an_adapter_for_layers_of_other_sizes(saved: Path, tmp_path: Path) -> None:
    (saved / "toss.json").unlink()
    other = save_tiny_model(
        tmp_path
        / json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"].rpartition("/")[2],
        hidden=48,
    )
    with pytest.raises(ModelError, match="the adapter's weights have other sizes than the layers of") as error:
        bank(other).load("utility", str(saved))
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_there(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no PEFT adapter to be had"):
        bank(tiny_model).load("utility", str(tmp_path / "nothing"))


def test_an_adapter_that_is_missing_in_a_folder_that_is_here_is_not_looked_for_on_the_hub(
    tiny_model: str, somewhere: None
) -> None:
    Path("adapters/utility").mkdir(parents=True)
    with pytest.raises(ModelError) as error:
        bank(tiny_model).load("utility", "adapters/utilty")
    assert str(error.value) == (
        "adapters/utilty: no PEFT adapter to be had: no such directory (is it adapters/utility?); the hub's is"
        " hf://adapters/utilty"
    )


def test_an_adapter_whose_weights_are_missing(tiny_model: str, saved: Path) -> None:
    shutil.move(saved / "adapter_model.safetensors", saved / "elsewhere")
    with pytest.raises(ModelError, match="no PEFT adapter to be had"):
        bank(tiny_model).load("utility", str(saved))


def test_an_adapter_that_lacks_layers_or_is_damaged(tiny_model: str, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1." not in name}, file)
    with pytest.raises(ModelError, match=r"the adapter lacks 4 weights, such as .*layers\.1"):
        bank(tiny_model).load("utility", str(saved))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ModelError, match="no PEFT adapter to be had"):
        bank(tiny_model).load("utility", str(saved))


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\nsize 5\n", b"", b"junk", b"PK\3\4 cut", pickle.dumps({"a": print})],
    ids=["a pointer of git-lfs", "empty", "junk", "cut", "code"],
)
def test_an_adapter_in_a_pickled_file_that_is_damaged(tiny_model: str, saved: Path, content: bytes) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="adapter: no PEFT adapter to be had: ") as error:
        bank(tiny_model).load("utility", str(saved))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"ba', "[]", "{}"])
def test_an_adapter_that_does_not_name_its_base(tiny_model: str, saved: Path, content: str) -> None:
    (saved / "toss.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter/toss\.json: cannot be read: copy or train the adapter again"):
        bank(tiny_model).load("utility", str(saved))


def test_an_adapter_with_scales_of_its_own_per_layer(tiny_model: str, saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 160}}))
    with pytest.raises(ModelError, match="the adapter uses alpha_pattern"):
        bank(tiny_model).load("utility", str(saved))


def test_layers_that_text_never_reaches_get_no_adapter() -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**size, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={**size, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    adapters = AdapterBank(Gemma3ForConditionalGeneration(config), Lora(r=2), "gemma", ())
    names = [name for name, _ in adapters.parameters(SLOT)]
    assert names
    assert not [name for name in names if "vision" in name]


def test_targets_that_no_layer_has(tiny_model: str) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.targets: \['nothing'\]"):
        bank(tiny_model, Lora(targets=["nothing"]))
