"""A base whose layers are sharded over two processes (FSDP2) ends where a whole one does.

The held-out sets hold one row each, and some steps fewer batches than there are processes: one of them then has nothing
to compute, and yet must take part in every forward and backward pass.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from ranks import assert_equal, by_lightning, one_run

from toss_lightning.errors import ConfigError
from toss_lightning.loops import TossProLoop
from toss_lightning.models import Base, Optim
from toss_lightning.models.sharding import check_sharding
from toss_lightning.scores import TokenScores


@pytest.fixture(scope="module")
def runs(tiny_model: str, tiny_sets: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run whole and sharded; sharded, killed in the middle of an epoch, and resumed sharded and whole."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, **options: Any) -> dict[str, Any]:
        options = {"devices": 2, "strategy": "fsdp2", "gradient_clip_val": 0.1, **options}
        return {"model": tiny_model, "sets": tiny_sets, "run_dir": str(folder / name), **options}

    whole = {"devices": 1, "strategy": "auto"}
    one_run(**run("whole", **whole))
    kill = {"step": 14}
    names = ("resumed", "then-whole")
    by_lightning([run("sharded"), *(run(name, kill=kill) for name in names), run("resumed", resume=True)], folder)
    one_run(**run("then-whole", resume=True, **whole))
    return folder


@pytest.mark.parametrize("name", ["sharded", "resumed", "then-whole"])
def test_scores_mask_and_adapters_are_those_of_a_whole_base(runs: Path, name: str) -> None:
    assert_equal(runs / "whole", runs / name, losses=1e-4, adapters=1e-3)


def test_embeddings_are_those_of_a_whole_base_also_where_a_process_has_no_row(runs: Path) -> None:
    for name, rows in (("utility_val", 1), ("custom", 14)):
        ours, theirs = (TokenScores(runs / one / "embedded").feature("embedding", name) for one in ("whole", "sharded"))
        assert len(ours) == rows
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def test_each_process_holds_half_of_every_layer(runs: Path) -> None:
    sizes = [json.loads((runs / "sharded" / f"sizes-{rank}.json").read_text()) for rank in range(2)]
    layers = [name for name in sizes[0] if ".layers." in name]
    assert any("base_layer" in name for name in layers)
    assert any("lora_B.slot" in name for name in layers)
    for name in layers:
        here, whole = sizes[0][name]
        assert 0 < here < whole
        assert here + sizes[1][name][0] == whole


def test_checkpoints_hold_whole_adapters_and_never_the_base(runs: Path) -> None:
    ours, theirs = (
        torch.load(next((runs / name / "checkpoints").glob("*-end.ckpt")), weights_only=True)["state_dict"]
        for name in ("sharded", "whole")
    )
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert all("lora_" in name for name in ours)


def strategy(tensor_parallel: int = 1) -> ModelParallelStrategy:
    """A strategy whose devices are spread already."""
    made = ModelParallelStrategy()
    made._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_refused(quantization: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.strategy: {quantization} weights cannot be sharded: .* ddp"):
        check_sharding(strategy(), Base(quantization=quantization), Optim())


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="set tensor_parallel_size: 1"):
        check_sharding(strategy(tensor_parallel=2), Base(quantization="none"), Optim())


def test_an_optimizer_that_knows_no_sharded_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.optim\.paged_8bit: its kernels know no sharded parameters"):
        check_sharding(strategy(), Base(quantization="none"), Optim(paged_8bit=True))


def test_fsdp1_is_refused() -> None:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, strategy=FSDPStrategy())
    with pytest.raises(ConfigError, match=r"FSDPStrategy would shard the base.*use auto or ddp, or .*fsdp2\.yaml"):
        TossProLoop(trainer)
