"""What the safety probe measures, and what it refuses; tests/loops/test_safety_watch.py follows it in a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from probed import HARMFUL, SAFE, probes, write_taught
from runs import tiny_fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from toss_lightning.cli import main
from toss_lightning.data.sources import Source
from toss_lightning.errors import ConfigError, DataError, TrainingError
from toss_lightning.evaluation import Evaluation, SafetyProbe

pytestmark = pytest.mark.usefixtures("tiny_openers")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    return write_taught(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def probed(tiny_model, taught, tmp_path_factory) -> Path:
    """A run that is probed on three of six pairs, and tested on the same three."""
    sets, pairs = taught
    run_dir = tmp_path_factory.mktemp("probed")
    probe = SafetyProbe(pairs, every=3, max_pairs=3, positions=2)
    loop = {"safety_probe": probe, "evaluation": Evaluation(pairs=Source(pairs, rows=3))}
    tiny_fit(tiny_model, sets, run_dir, plan=["target", "test"], loop=loop)
    return run_dir


def summary(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


def test_the_numbers_are_those_of_the_evaluation(probed: Path) -> None:
    found = json.loads((probed / "evaluation" / "evaluation.json").read_text())
    measures = {one["name"]: one["adapters"] for one in found["measures"]}
    last = probes(summary(probed), "target")[-1]
    for name, ours in (("base", summary(probed)["safety_probe"]["base"]), ("target", last)):
        margin, refusal = (
            measures[measure][name]["value"]
            for measure in ("margin of the safe reply, nats per token", "probability of a refusal's first token")
        )
        assert (ours["margin"], ours["refusal"]) == pytest.approx((margin, refusal), abs=1e-7)
    by_position = [found["divergence"][kind]["target"][:2] for kind in ("harmful replies", "safe replies")]
    assert last["divergence"] == pytest.approx(np.mean(by_position), abs=1e-7)


def test_the_numbers_are_those_of_a_naive_computation(
    probed: Path, tiny_model: str, tiny_openers: tuple[str, ...]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(probed / "adapters/target"))
    openers = sorted({tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in tiny_openers})
    losses: dict[str, list[float]] = {HARMFUL: [], SAFE: []}
    refusals, divergences = [], []
    for prompt in ("w20 w21", "w21 w22", "w22 w23"):
        for reply, found in losses.items():
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
            with torch.no_grad():
                log_p = net(ids).logits[0, len(asked) - 1 : -1].log_softmax(-1)
                with net.disable_adapter():
                    base = net(ids).logits[0, len(asked) - 1 : -1].log_softmax(-1)
            found.append(-log_p.gather(1, ids[0, len(asked) :, None]).mean().item())
            divergences += (base.exp() * (base - log_p)).sum(-1)[:2].tolist()
        refusals.append(log_p[0].exp()[openers].sum().item())
    expected = (np.mean(losses[HARMFUL]) - np.mean(losses[SAFE]), np.mean(refusals), np.mean(divergences))
    last = probes(summary(probed), "target")[-1]
    assert (last["margin"], last["refusal"], last["divergence"]) == pytest.approx(expected, abs=1e-6)


def test_drift_is_told_from_the_base_and_the_last_step_is_probed_too(probed: Path) -> None:
    found = summary(probed)["safety_probe"]
    assert (found["pairs"], found["pairs_given"], found["base"]["divergence"]) == (3, 6, 0)
    assert [one["step"] for one in found["stages"]["target"]] == [3, 6, 8]
    for one in found["stages"]["target"]:
        for key in ("margin", "refusal"):
            assert one[f"{key}_drift"] == one[key] - found["base"][key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": None}, r"loop\.safety_probe\.pairs: nothing to read: name a file of harmful requests"),
        ({"pairs": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        ({"pairs": "sample:utility_val"}, r"pairs need messages that end in a harmful reply, and a text in safe_reply"),
        ({"every": 0}, r"loop\.safety_probe\.every: 0: give 1 or more"),
        ({"max_pairs": 0}, r"loop\.safety_probe\.max_pairs: 0: give 1 or more"),
        ({"positions": 0}, r"loop\.safety_probe\.positions: 0: give 1 or more"),
        ({"stages": ["utility"]}, r"loop\.safety_probe\.stages: \['utility'\]: name one or both of sft, target"),
        ({"stages": ["sft"]}, r"loop\.safety_probe\.stages: loop\.plan has no sft to probe: add it, or set"),
        ({"max_drop": 0.0}, r"loop\.safety_probe\.max_drop: 0\.0: give nats above 0, such as 0\.5, or null"),
        ({"max_drop": float("nan")}, r"loop\.safety_probe\.max_drop: nan: give nats above 0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(
    tiny_model, taught, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    sets, pairs = taught
    with pytest.raises((ConfigError, DataError), match=message):
        tiny_fit(
            tiny_model,
            sets,
            tmp_path,
            plan=["target"],
            loop={"safety_probe": SafetyProbe(**{"pairs": pairs, **change})},
        )
    assert not (tmp_path / "adapters").exists()


def test_a_pair_that_no_batch_holds_is_refused(tiny_model, taught, tmp_path: Path) -> None:
    sets, pairs = taught
    row = json.loads(Path(pairs).read_text().splitlines()[0]) | {"safe_reply": "w1 " * 40}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    loop = {"safety_probe": SafetyProbe(str(tmp_path / "long.jsonl"))}
    with pytest.raises(ConfigError, match=r"loop\.safety_probe\.pairs: one has \d+ tokens, and data\.max_tokens holds"):
        tiny_fit(tiny_model, sets, tmp_path, plan=["target"], loop=loop)


def test_a_limit_is_not_held_against_a_margin_that_is_no_number(
    tiny_model, taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, pairs = taught
    values = {"margin": float("nan"), "refusal": 0.5, "divergence": 0.0}
    monkeypatch.setattr("toss_lightning.evaluation.SafetyProber.measure", lambda *_: values)
    loop = {"safety_probe": SafetyProbe(pairs, max_drop=0.5)}
    with pytest.raises(TrainingError, match=r"max_drop: the margin of base is no finite number \(nan\): set model"):
        tiny_fit(tiny_model, sets, tmp_path, plan=["target"], loop=loop)


def test_a_sharded_base_is_refused(tiny_model, taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets, pairs = taught
    monkeypatch.setattr("toss_lightning.evaluation.safety_probe.is_sharding", lambda _: True)
    with pytest.raises(ConfigError, match=r"loop\.safety_probe: lets each device read replies alone, .* or use ddp"):
        tiny_fit(tiny_model, sets, tmp_path, plan=["target"], loop={"safety_probe": SafetyProbe(pairs)})


def test_it_is_switched_on_in_options(
    tiny_model, taught, tmp_path: Path, capsys: pytest.CaptureFixture[str], somewhere: None
) -> None:
    sets, pairs = taught
    options = ["--model.base.path", tiny_model, "--model.base.quantization=none", "--trainer.accelerator=cpu"]
    options += ["--model.optim.paged_8bit=false", "--loop.plan=[target]", "--loop.epochs=1", "--data.batch_size=4"]
    options += [f"--data.custom={sets['custom']}", "--run_dir=run", "--trainer.enable_progress_bar=false"]
    probe = ["--loop.safety_probe.pairs", pairs, "--loop.safety_probe.every=2", "--loop.safety_probe.stages=[target]"]
    assert main(["fit", *options, *probe]) == 0
    assert [one["step"] for one in probes(summary(Path("run")), "target")] == [2, 4]
    assert "safety probe, target 2/4: margin" in capsys.readouterr().out
    assert main(["fit", *options, *probe, "--loop.safety_probe.evry=2"]) == 2
    assert "loop.safety_probe.evry: no such key; did you mean loop.safety_probe.every?" in capsys.readouterr().err
