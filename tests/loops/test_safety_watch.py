"""The safety probe in a run: it changes nothing, ends a stage that drifts too far, and survives kills."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from probed import probes, write_taught
from runs import artifacts, tiny_fit
from safetensors.torch import load_file

from toss_lightning.errors import StoreError
from toss_lightning.evaluation import Evaluation, SafetyProbe
from toss_lightning.loops.checkpoints import newest
from toss_lightning.models import Lora, Optim
from toss_lightning.models.adapters import SLOT

pytestmark = pytest.mark.usefixtures("tiny_openers")
PLAN = ("sft", "target")
EPOCH, STEPS = 4, 8
"""Optimizer steps of an epoch, and of a stage."""


def fit(model: str, sets: dict[str, str], run_dir: Path, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A run of both stages whose steps are small enough for the margin to fall with each."""
    module = {"optim": Optim(lr=2e-3), **options.pop("module", {})}
    return tiny_fit(model, sets, run_dir, callbacks, module=module, **{"plan": PLAN, **options})


@pytest.fixture(scope="module")
def taught(tiny_sets, tmp_path_factory) -> tuple[dict[str, str], str]:
    """A custom set that takes the margin down step by step, with held-out rows, and the pairs."""
    sets, pairs = write_taught(tmp_path_factory.mktemp("taught"))
    return {**sets, "harmful": tiny_sets["harmful"], "utility": tiny_sets["utility"]}, pairs


class Steps(Callback):
    """Keeps the adapter's weights behind each optimizer step of a stage, by its number."""

    def __init__(self, stage: str = "target") -> None:
        self.stage, self.weights = stage, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.stage_name == self.stage and not (batch_idx + 1) % trainer.accumulate_grad_batches:
            weights = {name: value.detach().clone() for name, value in module.bank.parameters(SLOT)}
            self.weights[trainer.fit_loop.step_in_stage] = weights


@pytest.fixture(scope="module")
def plain(tiny_model, taught, tmp_path_factory) -> tuple[Path, dict[int, Any]]:
    """A run without a probe, and its weights behind each step of the target."""
    run_dir, steps = tmp_path_factory.mktemp("plain"), Steps()
    fit(tiny_model, taught[0], run_dir, [steps])
    return run_dir, steps.weights


@pytest.fixture(scope="module")
def probed(tiny_model, taught, tmp_path_factory) -> Path:
    """The same run, probed behind each step."""
    run_dir = tmp_path_factory.mktemp("probed")
    fit(tiny_model, taught[0], run_dir, loop={"safety_probe": SafetyProbe(taught[1], every=1)})
    return run_dir


@pytest.fixture(scope="module")
def drops(probed: Path) -> list[float]:
    """How far the margin lies below the base's behind each step; more from step to step."""
    found = [-one["margin_drift"] for one in probes(summary(probed), "target")]
    assert found == sorted(found)
    assert found[0] > 0
    return found


def summary(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


def facts(run_dir: Path) -> dict[str, Any]:
    """The summary without what may differ: times."""
    found = summary(run_dir)
    for stage in found["stages"].values():
        stage.pop("seconds")
    return {name: found[name] for name in ("stages", "held_out", "safety_probe", "stopped", "optimizer_steps")}


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv without speeds, sorted."""
    with (run_dir / "metrics.csv").open() as file:
        lines = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return sorted(({**line, "tokens_per_second": ""} for line in lines), key=str)


def _kind(line: dict[str, str]) -> str:
    return next(name for name in ("probe_margin", "loss", "task_loss") if name in line)


def weights(run_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapters" / stage / "adapter_model.safetensors")


def assert_weights(run_dir: Path, expected: dict[str, torch.Tensor], stage: str = "target") -> None:
    """The adapter that was filed has these weights, given under their names in the model."""
    filed = weights(run_dir, stage)
    assert len(filed) == len(expected)
    for name, value in expected.items():
        assert torch.equal(filed[name.replace(f".{SLOT}", "")], value), name


def stopping(pairs: str, drops: list[float], step: int, **other: Any) -> dict[str, Any]:
    """A probe behind each step that ends a stage with ``step``."""
    limit = (drops[step - 2] + drops[step - 1]) / 2 if step > 1 else drops[0] / 2
    return {"safety_probe": SafetyProbe(pairs, **{"every": 1, "max_drop": limit, **other})}


# --- it changes nothing -----------------------------------------------------------------------------------------------


def test_a_probed_run_ends_in_the_same_bytes(plain: tuple[Path, Any], probed: Path) -> None:
    assert artifacts(probed) == artifacts(plain[0])
    losses = [[line for line in metrics(run) if "loss" in line] for run in (plain[0], probed)]
    assert losses[0] == losses[1]


def test_dropout_random_numbers_and_modes_are_left_alone(tiny_model, taught, tmp_path: Path) -> None:
    class Looks(Callback):
        """Keeps what a probe might disturb, before each step."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            modes = [part.training for part in module.modules()]
            grads = [value.requires_grad for value in module.parameters()]
            self.seen.append((torch.get_rng_state().tolist(), modes, grads, module.bank.active))

    looks = []
    for name, loop in (("plain", {}), ("probed", {"safety_probe": SafetyProbe(taught[1], every=1)})):
        looks.append(Looks())
        lora = Lora(r=4, targets="all-linear", dropout=0.3)
        fit(tiny_model, taught[0], tmp_path / name, [looks[-1]], plan=["target"], loop=loop, module={"lora": lora})
    assert looks[0].seen == looks[1].seen
    assert artifacts(tmp_path / "plain") == artifacts(tmp_path / "probed")


# --- where its values go ----------------------------------------------------------------------------------------------


def test_values_go_to_the_loggers_and_the_summary(probed: Path) -> None:
    lines = [line for line in metrics(probed) if "probe_margin" in line]
    steps = [(line["stage"], int(line["step"])) for line in lines]
    assert sorted(steps) == [
        ("base", 0),
        *(("sft", at) for at in range(1, 9)),
        *(("target", at) for at in range(9, 17)),
    ]
    (third,) = [line for line in lines if (line["stage"], line["step"]) == ("sft", "3")]
    for key in ("margin", "margin_drift", "refusal", "refusal_drift", "divergence"):
        assert float(third[f"probe_{key}"]) == pytest.approx(probes(summary(probed), "sft")[2][key], rel=1e-6)
    assert summary(probed)["stopped"] == {}


# --- ending a stage ---------------------------------------------------------------------------------------------------


# the first step, within an epoch, at the end of one, in the last epoch, and the last step
@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])
def test_a_stage_that_drifts_too_far_ends_there(
    tiny_model, taught, drops, plain, tmp_path: Path, capsys, step: int
) -> None:
    loop = stopping(taught[1], drops, step, restore=False, stages=["target"])
    trainer = fit(tiny_model, taught[0], tmp_path, loop=loop)
    assert trainer.global_step == STEPS + step
    found = summary(tmp_path)
    stage = found["stages"]["target"]
    assert (stage["steps"], stage["planned_steps"], stage["kept_step"]) == (step, STEPS, step)
    reason = (
        f"stage target was stopped at step {step} of {STEPS}: the margin of the safe reply lay {drops[step - 1]:.3f}"
    )
    assert found["stopped"]["target"].startswith(reason)
    assert capsys.readouterr().out.count(f"WARNING: {reason}") == 2
    assert reason in (tmp_path / "adapters" / "target" / "README.md").read_text()
    assert found["held_out"].keys() == {"base", "sft", "target"}
    assert_weights(tmp_path, plain[1][step])


@pytest.mark.parametrize(("step", "every", "kept"), [(1, 1, 0), (3, 1, 2), (6, 2, 4), (8, 3, 6)])
def test_it_goes_back_to_its_last_probe_within_the_limit(
    tiny_model, taught, drops, plain, tmp_path: Path, step: int, every: int, kept: int
) -> None:
    loop = stopping(taught[1], drops, step, every=every, stages=["target"])
    fit(tiny_model, taught[0], tmp_path, loop=loop)
    assert summary(tmp_path)["stages"]["target"]["kept_step"] == kept
    if kept:
        assert_weights(tmp_path, plain[1][kept])
    else:
        assert not any(value.any() for name, value in weights(tmp_path, "target").items() if "lora_B" in name)
        assert summary(tmp_path)["held_out"]["target"] == summary(tmp_path)["held_out"]["base"]


def test_the_plan_goes_on_behind_it(tiny_model, taught, drops, plain, tmp_path: Path) -> None:
    loop = stopping(taught[1], drops, 3, stages=["sft"]) | {"evaluation": Evaluation(pairs=taught[1])}
    trainer = fit(tiny_model, taught[0], tmp_path, plan=[*PLAN, "test"], loop=loop)
    assert trainer.global_step == 3 + STEPS
    assert weights(tmp_path, "target").keys() == weights(plain[0], "target").keys()
    for name, value in weights(tmp_path, "target").items():
        assert torch.equal(value, weights(plain[0], "target")[name])
    assert json.loads((tmp_path / "evaluation/evaluation.json").read_text())["adapters"] == ["base", "sft", "target"]
    steps = [(line["stage"], int(line["step"])) for line in metrics(tmp_path) if "loss" in line]
    assert sorted(steps) == [("sft", at) for at in range(3)] + [("target", at) for at in range(3, 11)]


# --- kills ------------------------------------------------------------------------------------------------------------


class Kill(Callback):
    """Ends the run as a kill does.

    Args:
        probe: in this probe of the run, the base's being the first, before anything comes of it.
        saved: right behind the checkpoint of this optimizer step.
        filed: while the adapter of this stage is filed.
    """

    def __init__(self, probe: int = 0, saved: int = 0, filed: str = "") -> None:
        self.probe, self.saved, self.filed, self.count = probe, saved, filed, 0

    def setup(self, trainer, module, stage):
        module.configure_model()
        watch, saver = trainer.fit_loop.watch, trainer.fit_loop.saver
        prepare, save, file = watch.prepare, saver.save, module.bank.save

        def dying_prepare(*args):
            prepare(*args)
            measure = watch.prober.measure

            def dying_measure(adapter):
                self.count += 1
                if self.count == self.probe:
                    raise RuntimeError("killed")
                return measure(adapter)

            watch.prober.measure = dying_measure

        def dying_save(trainer):
            save(trainer)
            if trainer.global_step == self.saved:
                raise RuntimeError("killed")

        def dying_file(adapter, path, *rest):
            if path.name == self.filed:
                raise RuntimeError("killed")
            file(adapter, path, *rest)

        watch.prepare, saver.save, module.bank.save = dying_prepare, dying_save, dying_file


@pytest.fixture(scope="module")
def stopped(tiny_model, taught, drops, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run, both stages of which are stopped at their third step, and its loop's settings."""
    run_dir, loop = tmp_path_factory.mktemp("stopped"), stopping(taught[1], drops, 3)
    assert fit(tiny_model, taught[0], run_dir, loop=loop).global_step == 6
    return run_dir, loop


# the first stage is left where the second begins, the last one where the loop ends
@pytest.mark.parametrize(
    ("kill", "checkpoint_every"),
    [
        *(({"probe": number}, every) for number in (1, 3, 4, 7) for every in (1, 1000)),
        *(({"filed": stage}, every) for stage in PLAN for every in (1, 1000)),
        *(({"saved": step}, 1) for step in (2, 3, 5, 6)),
        *(({"saved": step}, 1000) for step in (3, 6)),
    ],
    ids=str,
)
def test_a_run_killed_around_the_end_of_a_stage_resumes(
    tiny_model, taught, stopped, tmp_path: Path, kill: dict[str, Any], checkpoint_every: int
) -> None:
    options = {"loop": stopped[1], "checkpoint_every": checkpoint_every}
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_model, taught[0], tmp_path, [Kill(**kill)], **options)
    trainer = fit(tiny_model, taught[0], tmp_path, **options, ckpt_path="auto")
    assert trainer.global_step == 6
    assert artifacts(tmp_path) == artifacts(stopped[0])
    assert facts(tmp_path) == facts(stopped[0])
    # Lightning logs the loss of a step behind the checkpoint of that step
    lost = ("loss", str(kill.get("saved", 0) - 1))
    ours, theirs = (
        [line for line in metrics(run) if (_kind(line), line["step"]) != lost] for run in (tmp_path, stopped[0])
    )
    assert ours == theirs


def test_a_finished_run_has_nothing_left_to_do(tiny_model, taught, stopped) -> None:
    before = artifacts(stopped[0])
    loop = stopped[1]
    trainer = fit(tiny_model, taught[0], stopped[0], [Kill(probe=1)], loop=loop, ckpt_path="last")
    assert trainer.global_step == 6
    assert artifacts(stopped[0]) == before


def test_probes_of_a_run_killed_between_them_are_neither_lost_nor_doubled(
    tiny_model, taught, probed, tmp_path: Path
) -> None:
    options = {"loop": {"safety_probe": SafetyProbe(taught[1], every=1)}, "checkpoint_every": 3}
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_model, taught[0], tmp_path, [Kill(probe=12)], **options)
    fit(tiny_model, taught[0], tmp_path, **options, ckpt_path="last")
    assert facts(tmp_path) == facts(probed)
    assert metrics(tmp_path) == metrics(probed)


def test_another_probe_is_refused_on_resume(tiny_model, taught, stopped) -> None:
    path = str(newest(stopped[0] / "checkpoints"))
    for loop in ({}, {"safety_probe": SafetyProbe(taught[1], every=1, max_drop=9.0)}):
        with pytest.raises(StoreError, match=r"the checkpoint was made with another loop\.safety_probe"):
            fit(tiny_model, taught[0], stopped[0], loop=loop, ckpt_path=path)
