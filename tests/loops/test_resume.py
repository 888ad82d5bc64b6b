"""A run that was killed goes on where it was, and ends where it would have ended."""

import csv
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from runs import artifacts, tiny_fit
from safetensors.torch import load_file

from toss_lightning.data.scoring import Scoring
from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.evaluation import Evaluation
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.loops.checkpoints import newest
from toss_lightning.models import References
from toss_lightning.models.generation import Sampling
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, TokenWeights

RUN: dict[str, Any] = {
    "plan": ("utility", "degraded", "score", "select", "sft", "target"),
    "loop": {"rounds": 1, "promote": 2},
}
STEPS = 32
"""6 steps of utility, 4 of degraded, 6 of degraded-1, 8 of sft, 8 of target."""


def facts(run_dir: Path) -> dict[str, Any]:
    """The summary without what may differ: times."""
    summary = json.loads((run_dir / "summary.json").read_text())
    for stage in summary["stages"].values():
        stage.pop("seconds")
    return {name: summary[name] for name in ("method", "stages", "held_out", "rounds", "selection", "optimizer_steps")}


def metrics(run_dir: Path) -> list[tuple[str, ...]]:
    """The lines of metrics.csv without speeds."""
    with (run_dir / "metrics.csv").open() as file:
        lines = [
            {name: value for name, value in row.items() if value and name != "tokens_per_second"}
            for row in csv.DictReader(file)
        ]
    return sorted(tuple(f"{name}={line[name]}" for name in sorted(line)) for line in lines)


def resume(run_dir: Path) -> str:
    return str(newest(run_dir / "checkpoints"))


def asked(run_dir: Path) -> set[str]:
    """The prompt sets that a run's results speak of."""
    lines = (run_dir / "evaluation" / "responses.jsonl").read_text().splitlines()
    return {json.loads(line)["set"] for line in lines}


def test_a_run_that_is_past_its_test_answers_what_is_asked_now(tiny_model, tiny_sets, tmp_path, tiny_openers) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{at}", "label": "harmful"}) + "\n" for at in range(3)))

    def run(name: str, **more: Any) -> None:
        evaluation = Evaluation(prompts={name: str(prompts)}, sampling=Sampling(2))
        loop = {"evaluation": evaluation, "epochs": 1}
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["sft", "test"], loop=loop, **more)

    run("first")
    before = artifacts(tmp_path / "run")
    run("second", ckpt_path="last")
    assert asked(tmp_path / "run") == {"second"}
    assert artifacts(tmp_path / "run") == before


def test_a_new_run_in_an_old_directory_leaves_none_of_its_results(tiny_model, tiny_sets, tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["utility", "sft", "target"], loop={"epochs": 1})
    old = artifacts(run_dir)
    # nor does a run that is refused touch them
    with pytest.raises(ConfigError, match="utility"):
        tiny_fit(tiny_model, tiny_sets, run_dir, plan=["degraded", "score", "select", "target"], loop={"rounds": 1})
    assert artifacts(run_dir) == old
    capsys.readouterr()
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["target"], loop={"epochs": 1}, max_steps=2)
    # it was cut short before its target
    said = f"adapters/sft, adapters/target, summary.json of an earlier run were moved to {run_dir / 'earlier'}"
    assert said in capsys.readouterr().out
    assert {path.name for path in (run_dir / "adapters").iterdir()} == {"utility"}
    assert not (run_dir / "summary.json").exists()
    moved = artifacts(run_dir / "earlier")
    assert moved == {name: content for name, content in old.items() if name.startswith(("adapters/sft", "adapters/t"))}
    assert json.loads((run_dir / "earlier" / "summary.json").read_text())["stages"].keys() == {
        "utility",
        "sft",
        "target",
    }
    # who goes on moves nothing
    capsys.readouterr()
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["target"], loop={"epochs": 1}, ckpt_path="last")
    assert "earlier run" not in capsys.readouterr().out
    assert {path.name for path in (run_dir / "adapters").iterdir()} == {"utility", "target"}


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_sets, tmp_path_factory) -> Path:
    """An undisturbed run of TOSS-Pro with the control."""
    run_dir = tmp_path_factory.mktemp("finished")
    tiny_fit(tiny_model, tiny_sets, run_dir, **RUN)
    return run_dir


class Kill(Callback):
    """Ends the run at a place in it, as a kill does: nothing more is written.

    Args:
        step: before this optimizer step.
        action: before this action of the plan, or right behind it, before the checkpoint that follows.
        behind: see ``action``.
        adapter: while the adapter of this stage is saved.
    """

    def __init__(
        self, step: int | None = None, action: str | None = None, behind: bool = False, adapter: str | None = None
    ) -> None:
        self.step, self.action, self.behind, self.adapter = step, action, behind, adapter

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")

    def setup(self, trainer, module, stage):
        loop, module = trainer.fit_loop, trainer.lightning_module
        act = loop.act

        def dying(action):
            if action.name != self.action or self.behind:
                act(action)
            if action.name == self.action:
                raise RuntimeError("killed")

        loop.act = dying
        module.configure_model()
        save = module.bank.save

        def dying_save(adapter, path, *rest):
            if path.name == self.adapter:
                raise RuntimeError("killed")
            save(adapter, path, *rest)

        module.bank.save = dying_save


# within stages, and at their first and last steps
@pytest.mark.parametrize("step", [1, 5, 6, 10, 13, 16, 24, 25, 31])
def test_a_killed_run_resumes_at_the_same_step_and_ends_in_the_same_bytes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, step: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(step)], **RUN)
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=resume(tmp_path))
    assert trainer.global_step == STEPS
    assert artifacts(tmp_path) == artifacts(finished)
    assert facts(tmp_path) == facts(finished)
    assert metrics(tmp_path) == metrics(finished)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("action", ["score", "promote-1", "score-1", "select"])
def test_a_run_killed_between_stages_resumes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, action: str, behind: bool
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(action=action, behind=behind)], **RUN)
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=resume(tmp_path))
    assert artifacts(tmp_path) == artifacts(finished)
    assert facts(tmp_path) == facts(finished)
    assert metrics(tmp_path) == metrics(finished)


@pytest.mark.parametrize("adapter", ["utility", "degraded-1", "target"])
def test_a_run_killed_while_an_adapter_is_saved_resumes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, adapter: str
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(adapter=adapter)], **RUN)
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=resume(tmp_path))
    assert artifacts(tmp_path) == artifacts(finished)
    assert facts(tmp_path) == facts(finished)


def test_a_run_killed_twice_within_an_epoch_with_rare_checkpoints_resumes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    options = {**RUN, "checkpoint_every": 4}
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(7)], **options)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(23)], ckpt_path=resume(tmp_path), **options)
    tiny_fit(tiny_model, tiny_sets, tmp_path, ckpt_path=resume(tmp_path), **options)
    assert artifacts(tmp_path) == artifacts(finished)
    with (tmp_path / "metrics.csv").open() as file:
        steps = [int(line["step"]) for line in csv.DictReader(file) if line["loss"]]
    assert steps == list(range(STEPS)), "no step is logged twice, and none is lost"


def test_a_finished_run_has_nothing_left_to_do(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN)
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(STEPS)], **RUN, ckpt_path=resume(tmp_path))
    assert trainer.global_step == STEPS
    assert artifacts(tmp_path) == artifacts(finished)
    assert facts(tmp_path) == facts(finished)
    assert metrics(tmp_path) == metrics(finished)


def test_the_base_is_measured_once_also_where_scoring_comes_first(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    references = References(str(finished / "adapters/utility"), str(finished / "adapters/degraded"))
    options = {"plan": ("score", "select", "target"), "module": {"references": references}}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "killed", [Kill(action="select")], **options)
    tiny_fit(tiny_model, tiny_sets, tmp_path / "killed", **options, ckpt_path=resume(tmp_path / "killed"))
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


# behind the last and the first step of an epoch, and in the middle, in every stage
@pytest.mark.parametrize("step", [2, 3, 8, 14, 20, 30])
@pytest.mark.parametrize(("before", "after"), [(40, 20), (20, 40)])
def test_a_run_goes_on_with_other_micro_batches_and_ends_in_the_same_adapters(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, capsys, step: int, before: int, after: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(step)], **RUN, data={"max_tokens": before})
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, data={"max_tokens": after}, ckpt_path=resume(tmp_path))
    said = re.search(r"resumed with (\d+) micro-batches per step and process, not (\d+)", capsys.readouterr().out)
    assert said, "the number of micro-batches is another one, and that is said"
    assert (int(said[1]) > int(said[2])) == (after < before)
    assert trainer.global_step == STEPS
    assert facts(tmp_path)["stages"] == facts(finished)["stages"]
    for name in ("utility", "degraded", "degraded-1", "sft", "target"):
        ours, theirs = (
            load_file(run / "adapters" / name / "adapter_model.safetensors") for run in (tmp_path, finished)
        )
        for key, value in theirs.items():
            assert torch.linalg.norm(ours[key] - value) <= 1e-5 * torch.linalg.norm(value), (name, key)


class Enough(Callback):
    """Asks Lightning to stop behind the first micro-batch of an optimizer step, as ``max_time`` does behind any."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.global_step == self.step - (trainer.accumulate_grad_batches > 1):
            trainer.should_stop = True


# in the first and in the last epoch of a stage, at the end of an epoch and of a stage, and before the very last step
@pytest.mark.parametrize("step", [2, 3, 6, 15, 31])
@pytest.mark.parametrize("limit", ["max_steps", "max_time"])
def test_a_run_cut_by_a_limit_of_the_trainer_says_so_and_goes_on_where_it_was_cut(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, capsys, limit: str, step: int
) -> None:
    if limit == "max_steps":
        tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, checkpoint_every=1000, max_steps=step)
    else:
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Enough(step)], **RUN, checkpoint_every=1000)
    assert Path(resume(tmp_path)).name.startswith(f"{step:08d}")
    assert "cut short by the Trainer's limits" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=resume(tmp_path))
    assert trainer.global_step == STEPS
    assert artifacts(tmp_path) == artifacts(finished)
    assert facts(tmp_path) == facts(finished)


@pytest.mark.parametrize("step", [3, 10, 24])
def test_a_resumed_run_may_have_a_limit_that_it_does_not_reach(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, step: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(step)], **RUN)
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=resume(tmp_path), max_steps=1000)
    assert trainer.global_step == STEPS
    assert artifacts(tmp_path) == artifacts(finished)


def test_a_selection_of_other_data_is_refused_on_resume(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(13)])
    chosen = TokenWeights.load(tmp_path / "selection")
    TokenWeights(chosen.weights, chosen.hashes | {2: "other"}, chosen.report).save(tmp_path / "selection")
    with pytest.raises(StoreError, match="selection: row 2 has other tokens than the row that was selected from"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, ckpt_path=resume(tmp_path))


def test_another_selection_is_refused_on_resume(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(13)])
    chosen = TokenWeights.load(tmp_path / "selection")
    swapped = {row_id: 1 - weight for row_id, weight in chosen.weights.items()}
    TokenWeights(swapped, chosen.hashes, chosen.report).save(tmp_path / "selection")
    with pytest.raises(StoreError, match="selection: this is not the selection that the run was begun with"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, ckpt_path=resume(tmp_path))


def test_a_selection_that_changes_before_its_target_begins_is_refused_too(
    tiny_model, tiny_sets, tmp_path: Path
) -> None:
    plan = ["utility", "degraded", "score", "select", "sft", "target"]
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(12)], plan=plan)
    make_trainer(str(tmp_path), partial(TossProLoop, selection=GlobalTopFraction(0.3)), accelerator="cpu").select()
    with pytest.raises(StoreError, match="selection: this is not the selection that the run was begun with"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=plan, ckpt_path=resume(tmp_path))


def test_a_target_keeps_the_selection_that_it_was_trained_with(finished: Path) -> None:
    with pytest.raises(ConfigError, match="was trained with the selection there: write another one elsewhere"):
        make_trainer(str(finished), TossProLoop, accelerator="cpu").select()


def test_a_store_never_holds_columns_of_two_runs(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "scores", tmp_path / "scores")
    score = Scoring._column

    def killed_in_the_second(self, column, *rest):
        if column == "degraded":
            raise RuntimeError("killed")
        score(self, column, *rest)

    monkeypatch.setattr(Scoring, "_column", killed_in_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, seed=2)
    with pytest.raises(StoreError, match="no column loss_degraded here"):
        TokenScores(tmp_path / "scores").score()


def test_a_fit_takes_up_what_scoring_alone_has_done(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    plan = ["utility", "degraded", "score"]
    tiny_fit(tiny_model, tiny_sets, tmp_path, **{**RUN, "plan": plan})
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path="last")
    assert trainer.global_step == STEPS
    assert artifacts(tmp_path) == artifacts(finished)
