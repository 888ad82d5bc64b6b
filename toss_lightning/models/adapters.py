"""The adapters on the base: one trainable slot, and frozen snapshots beside it.

Only the slot ever requires a gradient, so the set of trained parameters is the same in every stage: for the optimizer,
for a checkpoint, and for DistributedDataParallel, which is silently wrong about a parameter that starts to train after
it was wrapped.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from toss_lightning.errors import ModelError, check_settings
from toss_lightning.files import HUB_MARK, may_be_hub_id, new_directory, no_such_directory
from toss_lightning.models.base import reason
from toss_lightning.models.fingerprint import base_fingerprint

SLOT, BASE = "slot", "base"
"""The trainable adapter, and no adapter at all."""
UNSUPPORTED = ("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "bias", "use_qalora")
"""Settings of a foreign adapter that change what it computes and that the shared shape has no place for."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""How a foreign adapter may have begun without a change of the base that it is laid over."""
OTHER_SENSES = r".*(vision|audio|image|multi_modal|multimodal).*"
"""Layers of a multimodal model that text never reaches."""
FINGERPRINT_FILE = "toss.json"


@dataclass(frozen=True)
class Lora:
    """The shape that all adapters share."""

    r: int = 16
    """Rank."""
    alpha: int = 16
    """Updates are scaled by alpha / r, or alpha / sqrt(r) with rslora."""
    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the layers that get an adapter, or all-linear."""
    dropout: float = 0.0
    """Dropout on the adapters' input; above 0, a resumed run is no longer the same to the bit."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA)."""
    rslora: bool = False
    """Rank-stabilised scaling (rsLoRA)."""

    def check(self) -> None:
        """Refuses shapes of which no adapter can be.

        Raises:
            ConfigError: a number is out of range.
        """
        rules = (
            ("r", self.r >= 1, "1 or more"),
            ("alpha", self.alpha > 0, "a number above 0"),
            ("dropout", 0 <= self.dropout < 1, "a share in [0, 1)"),
        )
        check_settings("model.lora", self, rules)


class AdapterBank:
    """One base with the trainable slot and frozen snapshots.

    Args:
        model: the frozen base; LoRA layers are put into it in place.
        lora: the adapters' shape.
        base_path: what the saved adapters name as their base.
        snapshots: names of the frozen adapters to make room for.
        seed: fixes the slot's initial weights, to which every stage returns.
        stored: identifies the base's files, see :func:`toss_lightning.models.fingerprint.stored_digest`; empty for a
            base that was made in memory.

    Attributes:
        active: the adapter that the model computes with.

    Raises:
        ModelError: no layer has any of the target names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: Lora,
        base_path: str,
        snapshots: tuple[str, ...],
        seed: int = 0,
        stored: str = "",
    ) -> None:
        self.model, self.base_path = model, base_path
        self.fingerprint = base_fingerprint(model, stored)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            target_modules=lora.targets,
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            task_type="CAUSAL_LM",
            exclude_modules=OTHER_SENSES if model.config.get_text_config() is not model.config else None,
        )
        model.config.name_or_path = base_path
        # drawn on the CPU, whatever device Lightning lets a module make its model on: the same start on all hardware
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            try:
                self.net: PeftModel = get_peft_model(model, config, adapter_name=SLOT)
            except ValueError as error:
                raise ModelError(f"model.lora.targets: {lora.targets}: {str(error).splitlines()[0]}") from error
            for name in snapshots:
                self.net.add_adapter(name, config)
        placed: Any
        for placed in self.net.peft_config.values():
            # a set is written to disk in an order that differs from process to process
            if not isinstance(placed.target_modules, str):
                placed.target_modules = sorted(placed.target_modules)
        self.remember_start()
        self.use(SLOT)

    def parameters(self, adapter: str) -> list[tuple[str, torch.nn.Parameter]]:
        """The named parameters of one adapter."""
        return [(name, value) for name, value in self.net.named_parameters() if f".{adapter}." in f"{name}."]

    def remember_start(self) -> None:
        """Keeps the slot's weights for :meth:`reset`; once more where they were moved or sharded."""
        self._initial = {name: value.detach().clone() for name, value in self.parameters(SLOT)}

    def use(self, adapter: str) -> None:
        """Makes ``adapter`` the one that the model computes with. The slot alone keeps its gradients."""
        tuner: Any = self.net.base_model
        self.active = adapter
        if adapter == BASE:
            tuner.disable_adapter_layers()
            return
        tuner.enable_adapter_layers()
        self.net.set_adapter(adapter)
        for name, value in self.net.named_parameters():
            value.requires_grad_(f".{SLOT}." in f"{name}.")

    @contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Computes with ``adapter``, or with the :data:`BASE` alone, inside the block, then with what it did before."""
        before = self.active
        self.use(adapter)
        try:
            yield
        finally:
            self.use(before)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Computes without the adapters' dropout inside the block, as a look at the model does that trains nothing."""
        # not eval() on all of it: checkpointed layers would then keep their activations
        layers = [layer for layer in self.net.modules() if isinstance(layer, nn.Dropout) and layer.training]
        for layer in layers:
            layer.eval()
        try:
            yield
        finally:
            for layer in layers:
                layer.train()

    @torch.no_grad()
    def reset(self) -> None:
        """Takes the slot back to its initial weights, where it changes nothing about the base."""
        for name, value in self.parameters(SLOT):
            value.copy_(self._initial[name])

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Copies one adapter's weights into another."""
        values = dict(self.parameters(source))
        for name, value in self.parameters(target):
            value.copy_(values[name.replace(f".{target}", f".{source}")])

    def state(self, adapter: str) -> dict[str, Tensor]:
        """One adapter's weights under the names that PEFT gives them in a file."""
        weights = {name: _whole(value) for name, value in self.parameters(adapter)}
        state: dict[str, Tensor] = get_peft_model_state_dict(self.net, weights, adapter_name=adapter)
        return dict(sorted(state.items()))

    def digest(self, adapter: str) -> str:
        """Identifies an adapter's weights and what they are multiplied by."""
        if adapter == BASE:
            return BASE
        config: Any = self.net.peft_config[adapter]
        digest = hashlib.blake2b(f"{config.lora_alpha} {config.use_rslora} {config.use_dora}".encode(), digest_size=12)
        for name, value in self.state(adapter).items():
            digest.update(name.encode())
            digest.update(value.float().numpy().tobytes())
        return digest.hexdigest()

    def save(self, adapter: str, path: Path, card: str, write: bool = True, template: str | None = None) -> None:
        """Writes an adapter in PEFT's format, with a model card, so that ``PeftModel.from_pretrained`` loads it.

        Args:
            adapter: its name.
            path: the directory.
            card: the model card.
            write: only one rank does; the others take part where the weights lie on all of them.
            template: the chat template, where it is not the base's own.

        Raises:
            ModelError: a weight is not finite.
            StoreError: the directory cannot be written.
        """
        weights = {name: _whole(value) for name, value in self.parameters(adapter)}
        if not all(value.isfinite().all() for value in weights.values()):
            raise ModelError(f"{path}: the adapter holds weights that are not finite, so it is not saved")
        if not write:
            return
        with new_directory(path) as directory:
            self.net.save_pretrained(str(directory), selected_adapters=[adapter], state_dict=weights)
            for file in (directory / adapter).iterdir():
                file.rename(directory / file.name)
            (directory / adapter).rmdir()
            (directory / "README.md").write_text(card, encoding="utf-8")
            if template is not None:
                (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
            (directory / FINGERPRINT_FILE).write_text(json.dumps({"base": self.fingerprint}) + "\n", encoding="utf-8")

    def load(self, adapter: str, path: str) -> None:
        """Fills a snapshot from a PEFT directory or hub id.

        Raises:
            ModelError: nothing is there, or it was made for another base or has another shape.
        """
        path = os.path.expanduser(path)
        self.check(path)
        path = path.removeprefix(HUB_MARK)
        try:
            weights = load_peft_weights(path, device="cpu")
        except Exception as error:  # over damaged files safetensors and pickle raise errors of no common kind
            raise _not_to_be_had(path, reason(error)) from error
        if lost := sorted(set(self.state(adapter)) - set(weights)):
            raise ModelError(f"{path}: the adapter lacks {len(lost)} weights, such as {lost[0]}: train it again")
        try:
            outcome: Any = set_peft_model_state_dict(self.net, weights, adapter_name=adapter)
        except RuntimeError as error:  # of sizes; its message has a line for every layer
            raise ModelError(
                f"{path}: the adapter's weights have other sizes than the layers of {self.base_path}: train it on this"
                " base, or set model.base.path"
            ) from error
        if outcome.unexpected_keys:
            raise ModelError(
                f"{path}: the adapter has weights for layers that model.lora.targets does not name,"
                f" such as {outcome.unexpected_keys[0]}: give the same targets"
            )
        self.use(SLOT)

    def check(self, path: str) -> None:
        """Looks at what a PEFT directory or hub id says of itself, without its weights.

        Raises:
            ModelError: nothing is there, or it was made for another base or has another shape.
        """
        path = os.path.expanduser(path)
        if not path.startswith(HUB_MARK) and not Path(path).is_dir() and not may_be_hub_id(path):
            raise _not_to_be_had(path, no_such_directory(path))
        path = path.removeprefix(HUB_MARK)
        try:
            config = PeftConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _not_to_be_had(path, reason(error)) from error
        ours: Any = self.net.peft_config[SLOT]
        if config.peft_type != ours.peft_type:
            raise ModelError(f"{path}: the adapter is {config.peft_type}, which is not supported: give one of LoRA")
        start = getattr(config, "init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise ModelError(
                f"{path}: the adapter began with init_lora_weights {start}, which changes the base too: save it as"
                " plain LoRA with PEFT's path_initial_model_for_weight_conversion"
            )
        fingerprint = Path(path) / FINGERPRINT_FILE
        if fingerprint.is_file():
            other = _trained_on(fingerprint) != self.fingerprint
        else:
            other = Path(str(config.base_model_name_or_path)).name != Path(self.base_path).name
        if other:
            raise ModelError(
                f"{path}: the adapter was trained on another base ({config.base_model_name_or_path}), not on"
                f" {self.base_path}: train it on this base, or set model.base.path"
            )
        for key, setting in (("r", "r"), ("lora_alpha", "alpha"), ("use_dora", "dora"), ("use_rslora", "rslora")):
            theirs, wanted = getattr(config, key, None), getattr(ours, key)
            if theirs != wanted:
                raise ModelError(
                    f"{path}: the adapter has {setting} {theirs}, but model.lora.{setting} is {wanted}:"
                    f" set model.lora.{setting}: {theirs}, or train the adapter again"
                )
        for key in UNSUPPORTED:
            if (value := getattr(config, key, None)) not in (None, {}, [], "none", False):
                raise ModelError(f"{path}: the adapter uses {key} ({value}), which is not supported: train it again")
        theirs, wanted = config.target_modules, ours.target_modules
        if _names(theirs) != _names(wanted):
            raise ModelError(
                f"{path}: the adapter sits on {_names(theirs)}, but model.lora.targets is {_names(wanted)}: set it so"
            )


def _not_to_be_had(path: str, why: str) -> ModelError:
    return ModelError(f"{path}: no PEFT adapter to be had: {why}")


def _trained_on(fingerprint: Path) -> Any:
    """The base that the file beside an adapter names."""
    try:
        return json.loads(fingerprint.read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{fingerprint}: cannot be read: copy or train the adapter again") from error


def _whole(value: Tensor) -> Tensor:
    """All of a weight, gathered from the ranks where it is sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()


def _names(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else sorted(targets)
