"""What a run was computed on, and with which packages."""

import platform
from importlib.metadata import version

import torch

from toss_lightning import __version__

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets")


def device_name(device: torch.device) -> str:
    """Of a GPU its model, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_gpu_memory(device: torch.device) -> int | None:
    """MiB that this process has held of its GPU at once, cached blocks included; None where it computes elsewhere."""
    return torch.cuda.max_memory_reserved(device) // 2**20 if device.type == "cuda" else None


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it computes with."""
    # a checkout that runs without being installed has no metadata
    ours = {"python": platform.python_version(), "toss-lightning": __version__}
    return ours | {name: version(name) for name in PACKAGES}
