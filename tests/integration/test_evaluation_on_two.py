"""Two processes give the replies and the numbers that one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toss_lightning.cli import main


@pytest.fixture(scope="module")
def runs(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, tested by one process in ``one`` and by two in ``two``."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"id": f"p{at}", "prompt": f"w{at} w{at + 1}", "label": ("harmful", "benign")[at % 2]} for at in range(11)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "data": {**tiny_sets, "batch_size": 4, "max_tokens": 40},
        "model": {"base": {"path": tiny_model, "quantization": "none"}, "lora": {"r": 4, "targets": "all-linear"}},
        "loop": {
            "plan": ["target"],
            "epochs": 1,
            "evaluation": {
                "prompts": {"asked": str(folder / "asked.jsonl")},
                "sampling": {"max_new_tokens": 4, "temperature": 2.0},
                "batch_size": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "one")]) == 0
    shutil.copytree(folder / "one", folder / "two")
    assert main(["test", "--run_dir", str(folder / "one")]) == 0
    command = [sys.executable, "-m", "toss_lightning", "test", "--run_dir", str(folder / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


def test_two_processes_draw_the_same_replies(runs: Path) -> None:
    one, two = ((runs / name / "evaluation" / "responses.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 22


def test_and_share_the_work_in_the_same_files(runs: Path) -> None:
    files = [
        {str(file.relative_to(runs / name)): file.read_bytes() for file in (runs / name).glob("evaluation/replies/*/*")}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * 6
