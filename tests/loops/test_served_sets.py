"""A row that no batch can hold is refused before anything is trained, whatever would serve it, and in which step."""

from pathlib import Path
from typing import Any

import pytest
from runs import tiny_fit
from tiny import WORDS, some_pairs, write_rows

from toss_lightning.data.mixtures import SafeInstr
from toss_lightning.errors import ConfigError
from toss_lightning.gradients import DualSelect, SafeGrad
from toss_lightning.selection import Anchored, Seal, Sot

SCORED = ["score", "select", "target"]
SERVED: dict[str, dict[str, Any]] = {
    "correction": {"plan": ["target"], "module": {"correction": SafeGrad(examples=1)}},
    "row products": {"plan": ["target"], "module": {"correction": DualSelect()}},
    "mixture": {"plan": ["target"], "data": {"mixture": SafeInstr(rows=2)}},
    "companions of seal": {"plan": ["seal", *SCORED], "loop": {"selection": Seal()}},
    "companions of an anchor": {
        "plan": ["utility", "degraded", *SCORED],
        "loop": {"selection": Anchored(safety_rows=2)},
    },
    "embeddings": {"plan": SCORED, "loop": {"selection": Sot(anchor="safety")}},
}
MESSAGE = r"^data\.safety: row 4 has 65 tokens, and data\.max_tokens holds 40: raise data\.max_tokens, or lower data\.m"


@pytest.fixture
def sets(tiny_sets: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A safety set whose fifth row is longer than a batch."""
    pairs = some_pairs(7, start=5)
    pairs[4] = ("w1 w2", " ".join(WORDS[:57]))
    return {**tiny_sets, "safety": write_rows(tmp_path / "safety.jsonl", pairs)}


@pytest.mark.parametrize("by", SERVED)
def test_a_set_that_is_served_beside_the_stage_s_own(tiny_model: str, sets: Any, tmp_path: Path, by: str) -> None:
    with pytest.raises(ConfigError, match=MESSAGE):
        tiny_fit(tiny_model, sets, tmp_path / "run", **SERVED[by])
    assert not (tmp_path / "run" / "checkpoints").exists(), "nothing was done before"


def test_a_set_of_a_later_stage(tiny_model: str, tiny_sets: Any, tmp_path: Path) -> None:
    custom = write_rows(tmp_path / "custom.jsonl", [*some_pairs(5), ("w1", " ".join(WORDS[:60]))])
    with pytest.raises(ConfigError, match=r"^data\.custom: row 5 has 67 tokens, and data\.max_tokens holds 40"):
        tiny_fit(tiny_model, {**tiny_sets, "custom": custom}, tmp_path / "run")
    assert not (tmp_path / "run" / "adapters").exists()


def test_a_row_that_the_model_cannot_read(tiny_model: str, tiny_sets: Any, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "custom.jsonl", [*some_pairs(2), ("w1", " ".join(WORDS[:50] * 6))])
    data = {"max_tokens": 1000, "max_length": 1000}
    with pytest.raises(
        ConfigError, match=r"^data\.custom: row 2 has \d+ tokens, and the model reads 256: lower data\.max"
    ):
        tiny_fit(tiny_model, {**tiny_sets, "custom": long}, tmp_path / "run", plan=["target"], data=data)


def test_a_held_out_row_that_the_model_cannot_read(tiny_model: str, tiny_sets: Any, tmp_path: Path) -> None:
    sets = {**tiny_sets, "refusal_val": write_rows(tmp_path / "val.jsonl", [("w1", " ".join(WORDS[:50] * 6))])}
    data = {"max_tokens": 1000, "max_length": 1000}
    with pytest.raises(ConfigError, match=r"^data\.refusal_val: row 0 has \d+ tokens, and the model reads 256"):
        tiny_fit(tiny_model, sets, tmp_path / "run", plan=["target"], data=data)


def test_a_set_that_nothing_serves_may_be_long(tiny_model: str, sets: Any, tmp_path: Path) -> None:
    tiny_fit(tiny_model, sets, tmp_path / "run", plan=["target"])
    assert (tmp_path / "run" / "adapters" / "target").is_dir()
