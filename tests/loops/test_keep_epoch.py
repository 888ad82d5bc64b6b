"""A reference may be what its best epoch left, not its last: that which does best on held-out rows of its kind."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from runs import Kill, artifacts, tiny_fit

from toss_lightning.errors import ConfigError
from toss_lightning.loops.checkpoints import newest
from toss_lightning.models import Optim, References, Schedule
from toss_lightning.report.summary import Summary
from toss_lightning.scores import TokenScores

EPOCHS = 4
LOSSES = {"utility": "task_loss", "degraded": "harmful_loss"}
# so fast that the degraded reference, too, soon knows its few rows by heart and others less well
MODULE = {"optim": Optim(lr=8e-2), "schedule": Schedule("constant", warmup=0)}
BEST: dict[str, Any] = {
    "plan": ("utility", "degraded"),
    "loop": {"reference_epochs": EPOCHS, "keep_epoch": "best"},
    "module": MODULE,
}


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def adapter(run_dir: Path, name: str) -> bytes:
    return (run_dir / "adapters" / name / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_sets, tmp_path_factory) -> Path:
    """References of which the best epochs were kept."""
    run_dir = tmp_path_factory.mktemp("best")
    tiny_fit(tiny_model, tiny_sets, run_dir, **BEST)
    return run_dir


def test_the_kept_epoch_is_the_best_of_runs_that_end_behind_each(
    finished: Path, tiny_model, tiny_sets, tmp_path: Path
) -> None:
    runs = [tmp_path / str(epochs) for epochs in range(1, EPOCHS + 1)]
    for epochs, run in enumerate(runs, 1):
        loop = {"reference_epochs": epochs}
        tiny_fit(tiny_model, tiny_sets, run, plan=("utility", "degraded"), loop=loop, module=MODULE)
    kept, held_out = summary_of(finished), [summary_of(run)["held_out"] for run in runs]
    for name, loss in LOSSES.items():
        losses = [one[name][loss] for one in held_out]
        best = losses.index(min(losses))
        assert [epoch[loss] for epoch in kept["epochs"][name]] == losses
        assert kept["held_out"][name] == held_out[best][name]
        assert adapter(finished, name) == adapter(runs[best], name)
    losses = [one["degraded"]["harmful_loss"] for one in held_out]
    assert min(losses) < losses[-1], "the last epoch is not the best one here, or this would show nothing"


def test_scores_are_those_of_the_kept_epochs(finished: Path, tiny_model, tiny_sets, tmp_path: Path) -> None:
    plan = ("utility", "degraded", "score")
    tiny_fit(tiny_model, tiny_sets, tmp_path / "best", **{**BEST, "plan": plan})
    given = {name: str(finished / "adapters" / name) for name in LOSSES}
    module = {**MODULE, "references": References(**given)}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "given", plan=("score",), module=module)
    ours, theirs = (artifacts(tmp_path / name) for name in ("best", "given"))
    assert {name: content for name, content in ours.items() if "loss_" in name} == {
        name: content for name, content in theirs.items() if "loss_" in name
    }


def test_the_run_and_the_cards_say_which_epoch_was_kept(tiny_model, tiny_sets, tmp_path: Path, capsys) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, **BEST)
    said, kept = capsys.readouterr().out, summary_of(tmp_path)
    for name, title in (("utility", "utility reference"), ("degraded", "degraded reference")):
        losses = [f"{epoch[LOSSES[name]]:.3f}" for epoch in kept["epochs"][name]]
        best = kept["epochs"][name].index(kept["held_out"][name]) + 1
        assert f"{title}: epoch {best} of {EPOCHS} is kept" in said
        assert f"on held-out rows behind each: {', '.join(losses)}" in said
        assert kept["stages"][name]["kept_epoch"] == best
        assert f"What epoch {best} left is kept." in (tmp_path / "adapters" / name / "README.md").read_text()


# 3 steps an epoch for the utility reference, 2 for the other: within an epoch, on the last step of one, behind a stage
@pytest.mark.parametrize("step", [1, 3, 4, 12, 13, 19])
@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_keeps_the_same_epochs(
    finished: Path, tiny_model, tiny_sets, tmp_path: Path, step: int, every: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(step)], **BEST, checkpoint_every=every)
    found = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    checkpoint = str(newest(tmp_path / "checkpoints")) if found else None
    tiny_fit(tiny_model, tiny_sets, tmp_path, **BEST, checkpoint_every=every, ckpt_path=checkpoint)
    assert summary_of(tmp_path)["epochs"] == summary_of(finished)["epochs"]
    for name in LOSSES:
        assert adapter(tmp_path, name) == adapter(finished, name)


@pytest.mark.parametrize("every", [1, 1000])
def test_epochs_are_judged_once_where_lightning_validates_too_and_where_it_does_not(
    finished: Path, tiny_model, tiny_sets, tmp_path: Path, every: int
) -> None:
    class Count(Callback):
        times = 0

        def on_validation_epoch_end(self, trainer, module):
            self.times += 1

    count = Count()
    tiny_fit(tiny_model, tiny_sets, tmp_path, [count], **BEST, check_val_every_n_epoch=every)
    assert count.times == 1 + 2 * EPOCHS, "the base, and each epoch of each reference"
    assert summary_of(tmp_path)["epochs"] == summary_of(finished)["epochs"]
    for name in LOSSES:
        assert adapter(tmp_path, name) == adapter(finished, name)


def test_each_refit_of_toss_pro_keeps_its_best_epoch(tiny_model, tiny_sets, tmp_path: Path) -> None:
    rounds = {"rounds": 1, "promote": 3}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "best", loop={**BEST["loop"], **rounds}, module=MODULE)
    kept = summary_of(tmp_path / "best")
    assert set(kept["epochs"]) == {"utility", "degraded", "degraded-1"}, "nothing tells which of the target is best"
    losses = [epoch["harmful_loss"] for epoch in kept["epochs"]["degraded-1"]]
    assert min(losses) < losses[-1], "the last epoch is not the best one here, or this would show nothing"
    assert kept["held_out"]["degraded-1"]["harmful_loss"] == kept["rounds"][1]["harmful_loss"] == min(losses)
    # a refit that ends behind that epoch, from the same references and so with the same rows promoted
    references = References(*(str(tmp_path / "best/adapters" / name) for name in LOSSES))
    loop = {**rounds, "reference_epochs": 1 + losses.index(min(losses))}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "ends", loop=loop, module={**MODULE, "references": references})
    assert adapter(tmp_path / "best", "degraded-1") == adapter(tmp_path / "ends", "degraded-1")
    ours, theirs = (TokenScores(tmp_path / run / "scores").flat("loss_degraded") for run in ("best", "ends"))
    np.testing.assert_array_equal(ours, theirs)


def test_one_epoch_is_its_own_best(tiny_model, tiny_sets, tmp_path: Path) -> None:
    for keep in ("best", "last"):
        loop = {"reference_epochs": 1, "keep_epoch": keep}
        tiny_fit(tiny_model, tiny_sets, tmp_path / keep, plan=("utility", "degraded"), loop=loop)
    for name in LOSSES:
        assert adapter(tmp_path / "best", name) == adapter(tmp_path / "last", name)


def test_an_epoch_whose_loss_is_no_number_is_never_the_best() -> None:
    summary = Summary(epochs={"degraded": [{"harmful_loss": loss} for loss in (math.nan, 2.0, 1.5, 1.5, math.nan)]})
    assert summary.best_epoch("degraded", "degraded") == 2


@pytest.mark.parametrize(("adapter", "lost"), [("utility", "utility_val"), ("degraded", "harmful_val")])
def test_the_best_epoch_needs_held_out_rows(tiny_model, tiny_sets, tmp_path: Path, adapter: str, lost: str) -> None:
    sets = {name: path for name, path in tiny_sets.items() if name not in ("utility_val", "harmful_val")}
    other = next(name for name in ("utility_val", "harmful_val") if name != lost)
    sets[other] = tiny_sets[{"utility_val": "utility", "harmful_val": "harmful"}[other]]
    told = rf"loop\.keep_epoch: held-out rows tell which epoch of the {adapter} reference is best: give data\.{lost}"
    with pytest.raises(ConfigError, match=told):
        tiny_fit(tiny_model, sets, tmp_path, **BEST, data={"holdout": 0.0})
    assert not (tmp_path / "adapters").exists(), "it is said before anything is trained"


@pytest.mark.parametrize("limit", [0, 1, 0.5])
def test_the_best_epoch_is_told_by_all_held_out_rows(tiny_model, tiny_sets, tmp_path: Path, limit: float) -> None:
    with pytest.raises(
        ConfigError, match=r"loop\.keep_epoch: .* by all held-out rows: leave out trainer\.limit_val_batches"
    ):
        tiny_fit(tiny_model, tiny_sets, tmp_path, **BEST, limit_val_batches=limit)


def test_a_run_without_references_to_train_needs_none(tiny_model, tiny_sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=("target",), loop={"keep_epoch": "best"})
    assert summary_of(tmp_path)["epochs"] == {}


def test_another_epoch_than_the_last_or_the_best_is_refused(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop\.keep_epoch: 'first' is not one of last, best"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, loop={"keep_epoch": "first"})
