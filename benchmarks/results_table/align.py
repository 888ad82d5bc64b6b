"""A base with safety of its own to lose: LoRA on refusals, safe replies and plain tasks, merged into the weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from toss_lightning.models.base import Base, resolve

SEED = 0


def align(base: str, rows: Path, to: Path, work: Path, toss: Callable[..., int]) -> None:
    """Writes a merged model to ``to``, unless it is there.

    The weights that are trained beside and merged into are the same, in float32: merged into 4-bit weights, the
    adapter would be rounded away in part.

    Args:
        base: the model.
        rows: what it is aligned on.
        to: where the merged one goes.
        work: where the run goes.
        toss: runs a verb of the command line; gives its exit code.

    Raises:
        SystemExit: training fails, for which it has given the reason.
    """
    done = to / "aligned_on.json"
    if done.exists():
        return
    run_dir = work / "align"
    content = {
        "data": {"custom": str(rows), "holdout": 0, "max_length": 384, "batch_size": 4, "max_tokens": 1024},
        "model": {
            "base": {"path": base, "quantization": "none", "dtype": "float32"},
            "lora": {"r": 16, "alpha": 16, "targets": "all-linear"},
            "optim": {"lr": 1e-3},
            "schedule": {"shape": "cosine", "warmup": 0.1},
        },
        "loop": {"plan": ["target"], "epochs": 1},
        "checkpoint_every": 50,
        "trainer": {"gradient_clip_val": 1.0},
        "seed_everything": SEED,
        "ckpt_path": "auto",
        "run_dir": str(run_dir),
    }
    file = work / "align.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    if not (run_dir / "summary.json").exists() and toss("fit", f"--config={file}"):
        raise SystemExit(f"{run_dir}: no aligned base")
    path = resolve(Base(base))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(run_dir / "adapters" / "target")).merge_and_unload()
    merged.save_pretrained(to)
    AutoTokenizer.from_pretrained(path).save_pretrained(to)
    done.write_text(json.dumps({"rows": sum(1 for _ in rows.open())}), encoding="utf-8")
