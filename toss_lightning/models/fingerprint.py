"""Which base it is: its files, and what a network in memory computes with them."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from toss_lightning.errors import ModelError
from toss_lightning.models.base import Base, output_head, reason, resolve

ROUNDED = (torch.float64, torch.float32, torch.float16)
COMPUTES = (
    *("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window"),
    *("layer_types", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "num_experts_per_tok"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "norm_topk_prob"),
)
"""Keys of a model's configuration that change what is computed from the same weights."""


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
