"""A checkpoint of another run is refused by naming what differs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toss_lightning.errors import StoreError
from toss_lightning.identity import check_identity, settings_of
from toss_lightning.models import Lora
from toss_lightning.selection import GlobalTopFraction


def test_settings_are_text_in_a_fixed_order() -> None:
    assert settings_of(GlobalTopFraction(0.2)) == (
        "degraded_weight=1.0, discard=0.2, protect_end=True, utility_weight=1.0"
    )
    assert settings_of(Lora(r=4)) == (
        "alpha=16, dora=False, dropout=0.0, r=4, rslora=False, targets=['q_proj', 'v_proj']"
    )


def test_what_a_configuration_cannot_hold_is_left_out() -> None:
    class Mine:
        def __init__(self) -> None:
            self.share, self.names, self._seen, self.cache = 0.5, ["a"], 3, object()

    # an address in memory would make every process another run
    assert settings_of(Mine()) == "names=['a'], share=0.5"
    assert settings_of(object.__new__(Mine)) == ""


def test_settings_are_the_same_in_every_process() -> None:
    program = (
        "from toss_lightning.identity import settings_of; from toss_lightning.selection import GlobalTopFraction;"
        "print(settings_of(GlobalTopFraction(0.3)))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert said == {settings_of(GlobalTopFraction(0.3))}


def test_the_same_run_is_accepted_whatever_else_the_checkpoint_knows() -> None:
    check_identity({"loop.plan": "target", "an older version's": "x"}, {"loop.plan": "target"})


def test_the_part_that_differs_is_named_with_both_values() -> None:
    ours = {"loop.plan": "target", "data.batch_size": "8"}
    with pytest.raises(StoreError) as error:
        check_identity({"loop.plan": "target", "data.batch_size": "4"}, ours)
    assert str(error.value) == (
        "the checkpoint was made with another data.batch_size (4, now 8), which gives other optimizer steps:"
        " resume with the same, or start a new run"
    )
    with pytest.raises(StoreError, match=r"another loop\.plan"):
        check_identity({}, ours)
