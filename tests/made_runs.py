"""Comparisons whose runs were never run: evaluation.json and summary.json as a run would leave them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from toss_lightning.compare.comparison import Comparison
from toss_lightning.compare.runs import Run, list_runs
from toss_lightning.compare.spec import load_comparison

Values = Sequence[float | None]
EVALUATION = {"loop": {"evaluation": {"prompts": {"asked": "prompts.jsonl"}}}}


def write_comparison(folder: Path, methods: Any, **keys: Any) -> Path:
    """Writes the file of a comparison, and configurations that it names."""
    (folder / "common.yaml").write_text(yaml.safe_dump({"loop": {"plan": ["target"], "epochs": 1}}))
    (folder / "asked.yaml").write_text(yaml.safe_dump(EVALUATION))
    content = {
        "run_dir": str(folder / "run"),
        "configs": str(folder / "common.yaml"),
        "evaluation": str(folder / "asked.yaml"),
        "seeds": [1, 2],
        "baseline": next(iter(methods), None),
        "methods": methods,
        **keys,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def measure(name: str, base: Values, target: Values, better: str = "lower", **facts: Any) -> dict[str, Any]:
    """A measure as evaluation.json holds it."""
    values = {"base": list(base), "target": list(target)}
    intervals = {}
    for adapter, of in values.items():
        known = [one for one in of if one is not None]
        mean = sum(known) / len(known) if known else None
        ends = {"value": mean, "low": mean and mean * 0.8, "high": mean and mean * 1.2}
        intervals[adapter] = {**ends, "n": len(known), "undecided": len(of) - len(known)}
    kind = {"judge": None, "screening": False, "share": True, "set": None}
    return {"name": name, "better": better, **kind, **facts, "adapters": intervals, "differences": [], "values": values}


def finish(
    run: Run,
    measures: Sequence[dict[str, Any]],
    seconds: float = 10.0,
    weak: dict[str, str] | None = None,
    stopped: dict[str, str] | None = None,
    computed: dict[str, Any] | None = None,
    **losses: float,
) -> None:
    """Leaves behind what a run would."""
    run.evaluation.parent.mkdir(parents=True)
    adapters = {"adapters": ["base", "target"], "names": {}, "agreement": [], "divergence": {}, "cut": {}}
    run.evaluation.write_text(json.dumps({"measures": list(measures), **adapters}))
    stages = {"target": {"seconds": seconds}, "test": {"seconds": 1000.0}}
    held_out = {"base": {"task_loss": 3.0}, "target": losses} if losses else {}
    summary = {"stages": stages, "held_out": held_out, "idle": [], "weak": weak or {}, "stopped": stopped or {}}
    run.summary.write_text(json.dumps(summary | (computed or {})))
    run.file("training", "evaluation")


def made(path: Path) -> tuple[Comparison, dict[tuple[str, int], Run]]:
    """A comparison and its runs."""
    comparison = load_comparison(path)
    return comparison, {(run.method, run.seed): run for run in list_runs(comparison)}
