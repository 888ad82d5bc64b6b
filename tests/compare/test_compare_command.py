"""``toss compare`` end to end on the tiny model: two methods, one of them wrong, and then a second look."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import WORDS, some_pairs, write_rows

from toss_lightning.cli import main


@pytest.mark.usefixtures("somewhere")
def test_methods_are_run_failures_reported_and_the_base_replies_once(
    tiny_model: str, tiny_sets: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
    held_out = write_rows(Path("held_out.jsonl"), some_pairs(6, start=5))
    common = {
        "model": {"base": {"path": tiny_model, "quantization": "none"}, "lora": {"r": 4}, "optim": {"lr": 1e-2}},
        "data": {**tiny_sets, "utility_val": held_out, "batch_size": 4, "max_tokens": 40},
        "loop": {"epochs": 1, "plan": ["utility", "degraded", "score", "select", "sft", "target"]},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False},
    }
    Path("common.yaml").write_text(yaml.safe_dump(common))
    write_rows(Path("forbidden.jsonl"), some_pairs(8, start=6), label="harmful")
    prompts = {"forbidden": "forbidden.jsonl", "task": {"path": held_out, "utility": "rouge_l"}}
    evaluation = {"prompts": prompts, "sampling": {"max_new_tokens": 4}}
    evaluation["judges"] = [{"class_path": "KeywordJudge", "init_args": {"phrases": WORDS[:50]}}]
    Path("asked.yaml").write_text(yaml.safe_dump({"loop": {"evaluation": evaluation}}))
    sft = "methods/sft"
    comparison = {
        "run_dir": "run",
        "configs": "common.yaml",
        "evaluation": "asked.yaml",
        "seeds": [1],
        "threads": 1,
        "methods": {"plain SFT": sft, "TOSS": None, "wrong": {"configs": sft, "set": {"model.optim.lrr": 1}}},
        "baseline": "plain SFT",
    }
    Path("compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    assert main(["compare", "compare.yaml"]) == 1
    said = capsys.readouterr()
    assert "did you mean model.optim.lr?" in said.err
    assert said.err.splitlines()[-1] == "1 of 3 runs failed; the same command tries them again"
    assert "TOSS against plain SFT: " in said.out
    # two prompt sets; the base and two targets
    assert len(list(Path("run/cache/replies").iterdir())) == 6
    found = json.loads(Path("run/compare.json").read_text())
    assert found["seeds"] == {"plain SFT": [1], "TOSS": [1]}
    names = [one["name"] for one in found["measures"]]
    utility = ("ROUGE-L, task", "task loss of a row, nats per token", "held-out task loss")
    assert names == ["refusal of harmful prompts", *utility, "held-out harmful loss"]
    for measure in found["measures"]:
        assert measure["models"].keys() == {"base model", "plain SFT", "TOSS"}
    assert found["time"]["TOSS"]["value"] > 1
    assert "sft" not in json.loads(Path("run/toss/seed-1/summary.json").read_text())["stages"]
    del comparison["methods"]["wrong"]
    Path("compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    assert main(["compare", "compare.yaml"]) == 0
    assert "seed 1: done in" not in capsys.readouterr().out
    assert json.loads(Path("run/compare.json").read_text()) == {**found, "missing": [], "differing": []}

    # another evaluation: judges that no file names any more do not stay beneath
    del evaluation["judges"]
    Path("asked.yaml").write_text(yaml.safe_dump({"loop": {"evaluation": evaluation}}))
    assert len(list(Path("run/cache/verdicts").iterdir())) == 1
    assert main(["compare", "compare.yaml"]) == 0
    assert capsys.readouterr().out.count("seed 1: done in") == 2
    assert len(list(Path("run/cache/verdicts").iterdir())) == 2
    assert len(list(Path("run/cache/replies").iterdir())) == 6
