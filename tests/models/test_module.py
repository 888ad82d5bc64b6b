from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from runs import tiny_fit
from tiny import some_pairs, write_rows
from transformers import AutoModelForCausalLM

from toss_lightning.data import TossDataModule
from toss_lightning.data.mixtures import SafeInstr
from toss_lightning.errors import ConfigError, StoreError, TrainingError
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.models import Base, Lora, Optim, Schedule, WeightedLoraModule
from toss_lightning.models.adapters import SLOT
from toss_lightning.selection import Selection
from toss_lightning.selection.weights import TokenWeights


class RandomWeights(Selection):
    """Soft random weights, some of them 0, and the first row masked in full."""

    def select(self, scores):
        generator = np.random.default_rng(0)
        weights = {row: generator.random(len(v)).astype(np.float32) for row, v in self._lengths(scores).items()}
        for index, weight in enumerate(weights.values()):
            weight[:: 2 + index % 3] = 0
        weights[min(weights)][:] = 0
        hashes = dict(zip(scores.row_ids.tolist(), scores.values("ids_hash"), strict=True))
        return TokenWeights(weights, hashes, {"tokens": 0, "masked": 0})

    def _lengths(self, scores):
        return dict(zip(scores.row_ids.tolist(), scores.per_row(scores.flat("loss_utility")), strict=True))


class FirstGradients(Callback):
    """Keeps the gradients and the parameters of the target's first optimizer step, before clipping."""

    def __init__(self):
        self.gradients, self.rows, self.state = None, [], None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.stage_name == "target" and self.gradients is None:
            self.rows += batch["row_id"].tolist()
            self.state = self.state or {name: value.detach().clone() for name, value in module.bank.parameters(SLOT)}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.stage_name == "target" and self.gradients is None:
            self.gradients = {name: value.grad.clone() for name, value in module.bank.parameters(SLOT)}


def make(tiny_model, tiny_sets, run_dir, callbacks=(), selection=None, plan=None, data=None, **options):
    seed_everything(1, verbose=False)
    datamodule = TossDataModule(**tiny_sets, **{"batch_size": 6, "max_tokens": 48, **(data or {})})
    settings = {"base": Base(tiny_model, quantization="none"), "lora": Lora(r=4, targets="all-linear"), **options}
    module = WeightedLoraModule(**{"optim": Optim(lr=1e-2), **settings})
    loop = partial(
        TossProLoop,
        plan=plan or ["utility", "degraded", "score", "select", "target"],
        selection=selection,
        epochs=1,
    )
    trainer = make_trainer(
        str(run_dir), loop, callbacks=list(callbacks), accelerator="cpu", devices=1, enable_progress_bar=False
    )
    return trainer, module, datamodule


@pytest.mark.parametrize("normalize", ["all", "kept", "row"])
def test_loss_and_gradients_equal_a_naive_implementation(tiny_model, tiny_sets, tmp_path: Path, normalize: str) -> None:
    """One optimizer step of several micro-batches against full logits of single rows, without padding or chunks."""
    first = FirstGradients()
    trainer, module, datamodule = make(
        tiny_model, tiny_sets, tmp_path, [first], RandomWeights(), normalize=normalize, chunk=3
    )
    trainer.fit(module, datamodule)
    assert trainer.accumulate_grad_batches > 1, "the test is about accumulation"

    weights = TokenWeights.load(tmp_path / "selection").weights
    for name, value in module.bank.parameters(SLOT):
        value.data.copy_(first.state[name])
        value.grad = None
    total, loss = {"tokens": 0, "weight": 0.0, "rows": 0}, 0.0
    rows = [row for row in datamodule.sets["custom"].rows if row.row_id in first.rows]
    assert len(rows) == 6
    for row in rows:
        weight = weights[row.row_id]
        total["tokens"] += len(weight)
        total["weight"] += float(weight.sum())
        total["rows"] += bool(weight.any())
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        log_p = module.bank.model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
        weight = torch.from_numpy(weights[row.row_id])
        losses = torch.stack([-log_p[position - 1, ids[position]] for position in row.response_positions])
        if normalize == "row":
            scale = weight.sum() * total["rows"] if weight.any() else 1.0
        else:
            scale = total["tokens"] if normalize == "all" else total["weight"]
        loss = loss + (weight * losses).sum() / scale
    loss.backward()
    for name, value in module.bank.parameters(SLOT):
        torch.testing.assert_close(first.gradients[name], value.grad, rtol=1e-5, atol=1e-7, msg=name)
    logged = [
        line.split(",")
        for line in (tmp_path / "metrics.csv").read_text().splitlines()
        if ",target," in line or line.startswith("step")
    ]
    steps = [dict(zip(logged[0], line, strict=True)) for line in logged[1:]]
    assert float(next(step["loss"] for step in steps if step["loss"])) == pytest.approx(loss.item(), rel=1e-5)


def test_a_step_without_a_kept_token_changes_nothing_and_is_not_nan(tiny_model, tiny_sets, tmp_path: Path) -> None:
    class OneRow(RandomWeights):
        def select(self, scores):
            chosen = super().select(scores)
            for row_id, weight in chosen.weights.items():
                weight[:] = row_id == 3
            return chosen

    class Steps(Callback):
        """Whether the target had met the row, and had learned anything, behind each micro-batch."""

        def __init__(self):
            self.rows, self.seen = set(), []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if module.stage_name == "target":
                self.rows |= set(batch["row_id"].tolist())
                learned = any(value.any() for name, value in module.bank.state(SLOT).items() if "lora_B" in name)
                self.seen.append((3 in self.rows, learned, (batch_idx + 1) % trainer.accumulate_grad_batches == 0))

    steps = Steps()
    trainer, module, datamodule = make(tiny_model, tiny_sets, tmp_path, [steps], OneRow(), normalize="kept")
    trainer.fit(module, datamodule)
    behind_steps = [(met, learned) for met, learned, is_last in steps.seen if is_last]
    assert behind_steps == [(False, False), (False, False), (True, True)]
    assert all(value.isfinite().all() for value in module.bank.state(SLOT).values())


def test_a_selection_that_keeps_no_token_is_refused_before_the_target(tiny_model, tiny_sets, tmp_path: Path) -> None:
    class Nothing(RandomWeights):
        def select(self, scores):
            chosen = super().select(scores)
            for weight in chosen.weights.values():
                weight[:] = 0
            return chosen

    trainer, module, datamodule = make(tiny_model, tiny_sets, tmp_path, selection=Nothing())
    with pytest.raises(StoreError, match=r"every token the weight 0, which leaves no token to train on: select again"):
        trainer.fit(module, datamodule)
    assert not (tmp_path / "adapters/target").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny_model, tiny_sets, tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if 3 in batch["row_id"].tolist():
                module.bank.model.get_output_embeddings().weight.data[int(batch["input_ids"][0, -1])] = torch.nan

    trainer, module, datamodule = make(tiny_model, tiny_sets, tmp_path, [Poison()], plan=["target"])
    with pytest.raises(TrainingError, match=r"step \d+: the loss is not finite on row .*3.* of data.custom: look"):
        trainer.fit(module, datamodule)


def test_rows_that_are_mixed_in_are_named_by_their_own_set(tiny_model, tiny_sets, tmp_path: Path) -> None:
    safety = write_rows(tmp_path / "safety.jsonl", some_pairs(4, start=9))
    trainer, module, datamodule = make(
        tiny_model, {**tiny_sets, "safety": safety, "mixture": SafeInstr()}, tmp_path, plan=["target"]
    )
    trainer.fit(module, datamodule)
    own = len(datamodule.sets["custom"].rows)
    assert datamodule.named([own + 1, 3, 2]) == "row 1 of data.safety and row 2, 3 of data.custom"
    assert datamodule.named(range(own)) == "row 0, 1, 2, 3, 4 and 9 others of data.custom"


def test_adapters_of_lora_variants_train_and_return_to_the_base(tiny_model, tiny_sets, tmp_path: Path) -> None:
    for name, lora in {"dora": Lora(r=2, dora=True), "rslora": Lora(r=2, rslora=True, dropout=0.1)}.items():
        trainer, module, datamodule = make(tiny_model, tiny_sets, tmp_path / name, lora=lora, plan=["target"])
        trainer.fit(module, datamodule)
        assert any(value.any() for key, value in module.bank.state(SLOT).items() if "lora_B" in key)
        module.bank.reset()
        module.eval()
        ids = torch.arange(1, 9).unsqueeze(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.testing.assert_close(module.bank.model(ids).logits, base(ids).logits)


def test_gradient_checkpointing_changes_memory_and_not_the_result(tiny_model, tiny_sets, tmp_path: Path) -> None:
    digests = []
    for checkpointing in (False, True):
        trainer, module, datamodule = make(
            tiny_model,
            tiny_sets,
            tmp_path / str(checkpointing),
            plan=["target"],
            base=Base(tiny_model, quantization="none", gradient_checkpointing=checkpointing),
        )
        trainer.fit(module, datamodule)
        digests.append(torch.cat([value.flatten() for value in module.bank.state(SLOT).values()]))
    torch.testing.assert_close(digests[0], digests[1])


def test_the_micro_batch_size_does_not_change_the_result(tiny_model, tiny_sets, tmp_path: Path) -> None:
    states = []
    for max_tokens in (20, 400):
        data = {"max_tokens": max_tokens}
        trainer, module, datamodule = make(
            tiny_model, tiny_sets, tmp_path / str(max_tokens), data=data, plan=["target"]
        )
        trainer.fit(module, datamodule)
        states.append(torch.cat([value.flatten() for value in module.bank.state(SLOT).values()]))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-6)


def test_8bit_optimizer_needs_a_gpu(tiny_model, tiny_sets, tmp_path: Path) -> None:
    trainer, module, datamodule = make(tiny_model, tiny_sets, tmp_path, optim=Optim(paged_8bit=True))
    with pytest.raises(ConfigError, match=r"model.optim.paged_8bit: needs a GPU"):
        trainer.fit(module, datamodule)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1, 1, *(0.5 * (1 + np.cos(np.pi * np.arange(1, 8) / 8)))]),
    ],
)
def test_schedules(shape: str, wanted: list[float]) -> None:
    schedule = Schedule(shape=shape, warmup=0.2)
    np.testing.assert_allclose([schedule.factor(step, 10) for step in range(10)], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": Lora(r=0)}, "model.lora.r: 0 cannot be used: give 1 or more"),
        ({"lora": Lora(alpha=0)}, "model.lora.alpha: 0 cannot be used: give a number above 0"),
        ({"lora": Lora(dropout=1.5)}, r"model.lora.dropout: 1.5 cannot be used: give a share in \[0, 1\)"),
        ({"optim": Optim(lr=-1.0)}, "model.optim.lr: -1.0 cannot be used: give 0 or more"),
        ({"optim": Optim(betas=(0.9, 1.0))}, r"model.optim.betas: \(0.9, 1.0\) cannot be used: give two numbers in"),
        ({"optim": Optim(weight_decay=-1.0)}, "model.optim.weight_decay: -1.0 cannot be used"),
        (
            {"schedule": Schedule(warmup=100)},
            "model.schedule.warmup: 100 cannot be used: give a share of a stage's",
        ),
        ({"chunk": 0}, "model.chunk: 0 tokens: give at least 1"),
    ],
)
def test_settings_that_cannot_work_are_told_before_a_base_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedLoraModule(**settings)


def test_float16_is_said_to_lose_small_gradients(tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> None:
    base = Base(tiny_model, quantization="none", dtype="float16")
    with pytest.warns(UserWarning, match=r"model\.base\.dtype: float16 has no room for small gradients"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target"], module={"base": base})
