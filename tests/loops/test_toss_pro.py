import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from runs import Kill, artifacts, scored, tiny_fit
from tiny import save_tiny_model, some_pairs, write_rows
from transformers import AutoModelForCausalLM

from toss_lightning.data import TossDataModule
from toss_lightning.errors import ConfigError, ModelError, StoreError
from toss_lightning.loops import TossProLoop, make_trainer
from toss_lightning.loops.checkpoints import newest
from toss_lightning.models import Base, Lora, Optim, References, WeightedLoraModule
from toss_lightning.scores import TokenScores
from toss_lightning.selection import PerRowTopFraction, TokenWeights

WITH_CONTROL = ("utility", "degraded", "score", "select", "sft", "target")


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


def test_the_summary_holds_counts_losses_times_versions_the_device_and_the_base(
    finished: Path, tiny_model: str
) -> None:
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
    assert summary["device"] == "cpu"
    assert summary["peak_memory_mib"] > 0
    assert summary["peak_gpu_memory_mib"] is None
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


def test_given_references_are_used_and_their_stages_skipped(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    references = References(str(finished / "adapters/utility"), str(finished / "adapters/degraded"))
    sets = {"custom": tiny_sets["custom"]}
    tiny_fit(tiny_model, sets, tmp_path, module={"references": references})
    ours, theirs = artifacts(tmp_path), artifacts(finished)
    assert "adapters/utility/adapter_model.safetensors" not in ours
    assert scored(tmp_path) == scored(finished)
    for name in ("selection/weights.arrow", "adapters/target/adapter_model.safetensors"):
        assert ours[name] == theirs[name]


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
    assert scored(tmp_path) == scored(finished)
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
    with pytest.raises(StoreError, match=r"have the same score \(0\), .*: are both references the same adapter\?"):
        again(module={"references": swapped}, data={"max_length": 17})
    assert "was made with another utility adapter: scoring again" in capsys.readouterr().out
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
        ("min_epochs", 3),
        ("use_distributed_sampler", True),
        ("accumulate_grad_batches", 2),
        ("limit_train_batches", 3),
        ("limit_train_batches", 1),
        ("fast_dev_run", True),
        ("precision", "bf16-true"),
    ],
)
def test_trainer_options_that_would_break_the_loop(tiny_model, tiny_sets, tmp_path, option: str, value) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{option}: leave it at"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugins": [HalfPrecision("bf16-true")]}, r"trainer\.plugins: HalfPrecision: adapters stay in float32"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1})]}, "leave GradientAccumulationScheduler out"),
        ({"val_check_interval": "00:10:00"}, "00:10:00: processes would tell the time each for itself"),
    ],
)
def test_what_would_change_steps_by_another_door(tiny_model, tiny_sets, tmp_path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_fit(tiny_model, tiny_sets, tmp_path, **options)


class Fsdp(FSDPStrategy):
    """Lightning refuses the class itself on a CPU, before anything of ours is asked."""


def test_a_strategy_that_does_not_leave_adapters_whole(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy: Fsdp would shard the base"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, strategy=Fsdp())


def test_a_checkpoint_of_a_sharded_base_is_one_file_too(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy: set save_distributed_checkpoint: false"):
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


def test_references_alone(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    sets = {name: tiny_sets[name] for name in ("utility", "harmful")}
    tiny_fit(tiny_model, sets, tmp_path, plan=["utility", "degraded"])
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["degraded", "utility"]
    assert not (tmp_path / "scores").exists()
    for name in ("utility", "degraded"):
        weights = f"adapters/{name}/adapter_model.safetensors"
        assert (tmp_path / weights).read_bytes() == (finished / weights).read_bytes()


# --- a Trainer that scores or selects alone ---------------------------------------------------------------------------


def trainer_of(run_dir: Path, **loop: Any):
    seed_everything(1, verbose=False)
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    return make_trainer(str(run_dir), partial(TossProLoop, **loop), **options)


def parts_of(model: str, sets: dict[str, str]) -> tuple[WeightedLoraModule, TossDataModule]:
    base, lora = Base(model, quantization="none"), Lora(r=4, targets="all-linear")
    return WeightedLoraModule(base, lora, optim=Optim(lr=1e-2)), TossDataModule(**sets, batch_size=4, max_tokens=40)


def test_a_trainer_scores_alone_rounds_included_and_then_selects_without_a_model(
    tiny_model, tiny_sets, tmp_path: Path, pro: Path, capsys
) -> None:
    trainer = trainer_of(tmp_path, rounds=1, promote=4)
    trainer.score(*parts_of(tiny_model, tiny_sets))
    assert scored(tmp_path) == scored(pro)
    assert not (tmp_path / "selection").exists()
    assert not (tmp_path / "adapters/target").exists()
    for options, round in (({}, 1), ({"scores_round": 0}, 0)):
        trainer_of(tmp_path, selection=PerRowTopFraction(0.5), **options).select()
        by_hand = PerRowTopFraction(0.5).select(TokenScores(pro / "scores", round))
        np.testing.assert_array_equal(TokenWeights.load(tmp_path / "selection").flat(), by_hand.flat())
    assert "response tokens masked" in capsys.readouterr().out


def test_a_trainer_that_scores_goes_on_from_a_checkpoint(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.callbacks.append(Kill(7))
    with pytest.raises(RuntimeError, match="killed"):
        trainer.score(*parts_of(tiny_model, tiny_sets))
    trainer_of(tmp_path).score(*parts_of(tiny_model, tiny_sets), ckpt_path=newest(tmp_path / "checkpoints"))
    assert scored(tmp_path) == scored(finished)


def test_a_trainer_selects_from_the_store_of_another_run(tmp_path: Path, pro: Path) -> None:
    trainer_of(tmp_path, scores_from=str(pro / "scores")).select()
    assert artifacts(tmp_path) == {
        name: content for name, content in artifacts(pro).items() if name.startswith("selection/")
    }


def test_a_plan_without_scoring_cannot_be_scored_with(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop\.plan: no 'score' step in target: add it"):
        trainer_of(tmp_path, plan=["target"]).score(*parts_of(tiny_model, tiny_sets))


def test_selecting_where_nothing_was_scored(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="scores: no token scores here: run the reference and score stages first"):
        trainer_of(tmp_path).select()
