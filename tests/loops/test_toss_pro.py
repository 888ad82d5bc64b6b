import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import tiny_fit
from tiny import save_tiny_model, some_pairs, write_rows
from transformers import AutoModelForCausalLM

from toss_lightning.data import TossDataModule
from toss_lightning.errors import ConfigError, ModelError, StoreError
from toss_lightning.models import Lora, References
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, PerRowTopFraction, TokenWeights

WITH_CONTROL = ("utility", "degraded", "score", "select", "sft", "target")


def artifacts(run_dir: Path) -> dict[str, bytes]:
    """Every byte that a run leaves for others."""
    files = [*run_dir.glob("adapters/*/*.safetensors"), *run_dir.glob("scores/*"), *run_dir.glob("selection/*")]
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_sets, tmp_path_factory) -> Path:
    """An undisturbed run of TOSS with the control."""
    run_dir = tmp_path_factory.mktemp("finished")
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=WITH_CONTROL)
    return run_dir


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    for name in ("target", "sft", "utility", "degraded"):
        names = {file.name for file in (finished / "adapters" / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert "DO NOT DEPLOY" in (finished / "adapters/degraded/README.md").read_text()
    assert list(finished.glob("tensorboard/events*"))
    assert not list(finished.glob("**/*.tmp")), "nothing temporary is left"


def test_the_summary_holds_counts_losses_times_versions_and_the_base(finished: Path, tiny_model: str) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["held_out"]) == {"base", "utility", "degraded", "sft", "target"}
    assert set(summary["held_out"]["base"]) == {"task_loss", "harmful_loss"}
    assert summary["held_out"]["target"]["task_loss"] != summary["held_out"]["base"]["task_loss"]
    assert summary["stages"]["target"]["steps"] == 2 * 4
    assert all(stage["seconds"] > 0 for stage in summary["stages"].values())
    assert {row["set"]: row["rows"] for row in summary["data"]} == {
        "custom": 14,
        "utility": 9,
        "harmful": 7,
        "utility_val": 1,
        "harmful_val": 1,
    }
    assert summary["selection"]["masked"] == int(0.1 * summary["selection"]["tokens"])
    assert summary["versions"]["lightning"].startswith("2.6")
    AutoModelForCausalLM.from_pretrained(summary["base_path"])


def test_metrics_csv_has_a_line_per_step_and_evaluation(finished: Path) -> None:
    with (finished / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    steps = [line for line in lines if line["loss"]]
    assert [int(line["step"]) for line in steps] == list(range(len(steps)))
    assert all(float(line[name]) > 0 for line in steps for name in ("loss", "lr", "grad_norm", "tokens_per_second"))
    kept = {line["stage"]: float(line["kept_share"]) for line in steps}
    assert kept["sft"] == kept["utility"] == 1.0
    assert min(float(line["kept_share"]) for line in steps if line["stage"] == "target") < 1.0
    assert lines[0]["stage"] == "base"
    assert lines[0]["task_loss"]
    assert {line["stage"] for line in lines if line["task_loss"]} == {"base", "utility", "degraded", "sft", "target"}


def test_checkpoints_hold_adapters_and_never_the_base(finished: Path) -> None:
    checkpoint = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["optimizer_states"]


class Kill(Callback):
    """Ends the run at a place in it, as a kill does: nothing more is written."""

    def __init__(self, step: int | None = None, action: str | None = None) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")

    def setup(self, trainer, pl_module, stage):
        if self.action == "score":
            trainer.datamodule.score = self._die
        if self.action == "select":
            trainer.fit_loop.selection.select = self._die
        if self.action == "save":
            pl_module.configure_model()
            pl_module.bank.save = self._die

    def _die(self, *args, **kwargs):
        raise RuntimeError("killed")


# 6 steps of utility, 4 of degraded, 8 of sft, 8 of target: within stages, and at their first and last steps
@pytest.mark.parametrize("step", [1, 3, 5, 6, 9, 10, 13, 18, 19, 25])
def test_a_killed_run_resumes_at_the_same_step_and_ends_in_the_same_bytes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, step: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(step)], plan=WITH_CONTROL)
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, plan=WITH_CONTROL, ckpt_path="last")
    assert trainer.global_step == 26
    assert artifacts(tmp_path) == artifacts(finished)


@pytest.mark.parametrize("action", ["score", "select", "save"])
def test_a_run_killed_between_stages_resumes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, action: str
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(action=action)], plan=WITH_CONTROL)
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=WITH_CONTROL, ckpt_path="last")
    assert artifacts(tmp_path) == artifacts(finished)


def test_a_run_killed_twice_within_an_epoch_with_rare_checkpoints_resumes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    options = {"plan": WITH_CONTROL, "checkpoint_every": 4}
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(7)], **options)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(23)], ckpt_path="last", **options)
    tiny_fit(tiny_model, tiny_sets, tmp_path, ckpt_path="last", **options)
    assert artifacts(tmp_path) == artifacts(finished)
    with (tmp_path / "metrics.csv").open() as file:
        steps = [int(line["step"]) for line in csv.DictReader(file) if line["loss"]]
    assert steps == list(range(26)), "no step is logged twice, and none is lost"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"plan": ("utility", "degraded", "target")}, "loop.plan"),
        ({"loop": {"reference_epochs": 3}}, "number of epochs"),
        ({"data": {"max_tokens": 400}}, "data.max_tokens"),
        ({"data": {"batch_size": 2}}, "data.batch_size"),
        ({"data": {"holdout": 0.3}}, "utility set"),
        ({"loop": {"selection": GlobalTopFraction(0.2)}}, "loop.selection"),
        ({"module": {"normalize": "kept"}}, "model.normalize"),
        ({"seed": 2}, "seed_everything"),
    ],
)
def test_a_checkpoint_of_other_optimizer_steps_is_refused(
    tiny_model, tiny_sets, finished: Path, tmp_path: Path, change: dict, part: str
) -> None:
    checkpoint = str(finished / "checkpoints/last.ckpt")
    with pytest.raises(StoreError, match=f"the checkpoint was made with another {part}"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, **{"plan": WITH_CONTROL, **change}, ckpt_path=checkpoint)


def test_a_selection_of_other_data_is_refused_on_resume(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(13)])
    chosen = TokenWeights.load(tmp_path / "selection")
    TokenWeights(chosen.weights, chosen.hashes | {2: "other"}, chosen.report).save(tmp_path / "selection")
    with pytest.raises(StoreError, match="selection: row 2 is not the one that was selected from"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, ckpt_path="last")


def test_given_references_are_used_and_their_stages_skipped(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    references = References(str(finished / "adapters/utility"), str(finished / "adapters/degraded"))
    sets = {"custom": tiny_sets["custom"]}
    tiny_fit(tiny_model, sets, tmp_path, module={"references": references})
    ours, theirs = artifacts(tmp_path), artifacts(finished)
    assert "adapters/utility/adapter_model.safetensors" not in ours
    for name in ("scores/scores-00000-of-00001.arrow", "selection/weights.arrow"):
        assert ours[name] == theirs[name]
    assert ours["adapters/target/adapter_model.safetensors"] == theirs["adapters/target/adapter_model.safetensors"]


def test_the_control_and_the_target_differ_by_the_mask_alone(tiny_model, tiny_sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=WITH_CONTROL, loop={"selection": PerRowTopFraction(discard=0.0)})
    files = artifacts(tmp_path)
    assert files["adapters/sft/adapter_model.safetensors"] == files["adapters/target/adapter_model.safetensors"]


def test_plain_fine_tuning_needs_no_references(tiny_model, tiny_sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, {"custom": tiny_sets["custom"]}, tmp_path, plan=["target"])
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["target"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["held_out"] == {"base": {}, "target": {}}


def test_references_and_scores_alone(tiny_model, tiny_sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["utility", "degraded", "score"])
    assert len(TokenScores(tmp_path / "scores").row_ids) == 14
    assert not (tmp_path / "selection").exists()


def test_scores_alone_from_given_references(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    references = References(str(finished / "adapters/utility"), str(finished / "adapters/degraded"))
    sets = {"custom": tiny_sets["custom"]}
    tiny_fit(tiny_model, sets, tmp_path, plan=["score", "select"], module={"references": references})
    assert (
        artifacts(tmp_path)["scores/scores-00000-of-00001.arrow"]
        == artifacts(finished)["scores/scores-00000-of-00001.arrow"]
    )
    assert (tmp_path / "summary.json").exists()


def test_a_second_run_uses_the_scores_or_says_what_differs(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = References(str(finished / "adapters/utility"), str(finished / "adapters/degraded"))
    sets = {"custom": tiny_sets["custom"]}

    def again(**change: object) -> str:
        tiny_fit(
            tiny_model, sets, tmp_path, plan=["score", "select"], **{"module": {"references": references}, **change}
        )
        return capsys.readouterr().out

    assert "used as it is" not in again()
    assert "was made from the same data, base and adapters: used as it is" in again()
    assert "used as it is" in again(loop={"selection": PerRowTopFraction(0.3)}), "a selection needs no new scores"
    assert "was made with another limits, tokens: scoring again" in again(data={"max_length": 17})
    swapped = References(str(finished / "adapters/degraded"), str(finished / "adapters/degraded"))
    out = again(module={"references": swapped}, data={"max_length": 17})
    assert "was made with another utility adapter: scoring again" in out
    assert not TokenScores(tmp_path / "scores").score().any()


def test_scores_do_not_depend_on_the_batches(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    references = References(str(finished / "adapters/utility"), str(finished / "adapters/degraded"))
    sets, module = {"custom": tiny_sets["custom"]}, {"references": references}
    tiny_fit(tiny_model, sets, tmp_path, plan=["score"], module=module, data={"max_tokens": 4000})
    ours, theirs = TokenScores(tmp_path / "scores"), TokenScores(finished / "scores")
    np.testing.assert_allclose(ours.flat("loss_utility"), theirs.flat("loss_utility"), atol=1e-5)


def test_a_reference_of_another_base_stops_the_run(tiny_sets, tmp_path: Path, finished: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="another base"):
        tiny_fit(
            other, tiny_sets, tmp_path / "run", module={"references": References(str(finished / "adapters/utility"))}
        )


def test_sets_that_overlap_are_a_warning_with_a_count(tiny_model, tmp_path: Path) -> None:
    sets = {
        "custom": write_rows(tmp_path / "custom.jsonl", some_pairs(6)),
        "utility": write_rows(tmp_path / "utility.jsonl", some_pairs(4)),
    }
    with pytest.warns(UserWarning, match="4 rows stand in both the custom and the utility set"):
        tiny_fit(tiny_model, sets, tmp_path / "run", plan=["target"], data={"holdout": 0.0})


def test_the_table_of_the_sets_comes_first(tiny_model, tiny_sets, tmp_path: Path, capsys) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=["target"], data={"max_length": 15})
    out = capsys.readouterr().out
    assert out.index("Data") < out.index("Plan: target") < out.index("after each stage")
    row = next(line for line in out.splitlines() if line.startswith("│ custom"))
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["custom", "10", "54", "4", "0", "15", "56%"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_epochs", 3),
        ("use_distributed_sampler", True),
        ("accumulate_grad_batches", 2),
        ("limit_train_batches", 3),
        ("fast_dev_run", True),
        ("precision", "bf16-true"),
    ],
)
def test_trainer_options_that_would_break_the_loop(tiny_model, tiny_sets, tmp_path, option: str, value) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{option}: leave it at"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, **{option: value})


def test_a_strategy_that_would_shard_the_base(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy: ModelParallelStrategy would shard the base"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, strategy=ModelParallelStrategy())


def test_one_reference_alone_needs_no_custom_set(tiny_model, tiny_sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, {"utility": tiny_sets["utility"]}, tmp_path, plan=["utility"])
    assert (tmp_path / "adapters/utility/adapter_model.safetensors").exists()


def test_the_selection_is_said_in_a_line(tiny_model, tiny_sets, tmp_path: Path, capsys) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("select:"))
    assert line.startswith("select: 9 of 94 response tokens masked (9.6%)")
    assert line.endswith("0 of 14 rows are masked in full")


def test_a_run_cut_by_max_steps_says_so_and_writes_no_summary(tiny_model, tiny_sets, tmp_path: Path, capsys) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, max_steps=3)
    assert "cut short by the Trainer's limits" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()


def test_settings_out_of_range() -> None:
    for setting, message in (({"holdout": 1.0}, "data.holdout"), ({"batch_size": 0}, "data.batch_size")):
        with pytest.raises(ConfigError, match=message):
            TossDataModule(**setting).setup("fit")


def test_lora_targets_are_shared_by_all_adapters(tiny_model, tiny_sets, tmp_path: Path) -> None:
    tiny_fit(
        tiny_model, tiny_sets, tmp_path, module={"lora": Lora(r=2, targets=["v_proj"])}, plan=["utility", "degraded"]
    )
    for name in ("utility", "degraded"):
        config = json.loads((tmp_path / "adapters" / name / "adapter_config.json").read_text())
        assert (config["r"], config["target_modules"]) == (2, ["v_proj"])
