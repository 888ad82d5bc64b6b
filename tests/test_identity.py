"""A checkpoint of another run is refused by naming what differs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toss_lightning.errors import StoreError
from toss_lightning.identity import check_identity, identify, name_plugin, settings_of
from toss_lightning.models import Lora
from toss_lightning.selection import Anchored, Everything, GlobalTopFraction, PerRowTopFraction


def test_settings_are_text_in_a_fixed_order() -> None:
    assert settings_of(GlobalTopFraction(0.2)) == (
        "degraded_weight=1.0, discard=0.2, protect_end=True, utility_weight=1.0"
    )
    assert settings_of(Lora(r=4)) == (
        "alpha=16, dora=False, dropout=0.0, r=4, rslora=False, targets=['q_proj', 'v_proj']"
    )


def test_sets_paths_and_patterns_are_told_the_same_in_every_process() -> None:
    class Mine:
        def __init__(self) -> None:
            self.words, self.file, self.pattern = {"no", "never", "cannot"}, Path("a.txt"), re.compile("no+")

    assert settings_of(Mine()) == "file=a.txt, pattern=re.compile('no+'), words='cannot', 'never', 'no'"


def test_arrays_and_plug_ins_in_lists_are_told_by_what_they_hold() -> None:
    class Panel:
        def __init__(self, weights: list[float], *inside: object) -> None:
            # so many that NumPy prints the ends alone
            self.weights, self.inside, self.named = np.pad(weights, 2000), [*inside], {"first": inside[0]}

    def told(weights: list[float], *shares: float) -> str:
        return name_plugin(Panel(weights, *map(GlobalTopFraction, shares)))

    assert told([1.0, 2.0], 0.1, 0.2) == told([1.0, 2.0], 0.1, 0.2)
    assert len({told([1.0, 2.0], 0.1, 0.2), told([1.0, 3.0], 0.1, 0.2), told([1.0, 2.0], 0.1, 0.3)}) == 3
    assert "0x" not in told([1.0], 0.1)


def test_what_a_configuration_cannot_hold_is_left_out() -> None:
    class Mine:
        def __init__(self) -> None:
            self.share, self.names, self._seen, self.cache = 0.5, ["a"], 3, object()

    # an address in memory would make every process another run
    assert settings_of(Mine()) == "names=['a'], share=0.5"
    assert settings_of(object.__new__(Mine)) == ""


def test_a_plug_in_is_named_with_its_settings_and_those_of_the_plug_ins_inside_it() -> None:
    settings = "degraded_weight=1.0, discard=0.2, protect_end=True, utility_weight=1.0"
    assert name_plugin(GlobalTopFraction(0.2)) == f"GlobalTopFraction {settings}"
    assert name_plugin(Everything()).strip() == "Everything"
    assert name_plugin(None) == "none"
    inside = name_plugin(Anchored(GlobalTopFraction(0.2), weight=0.5))
    assert inside.startswith("Anchored ")
    assert "weight=0.5" in inside
    assert inside.endswith(f"(GlobalTopFraction {settings})")
    # what differs only inside is another run
    assert inside != name_plugin(Anchored(GlobalTopFraction(0.3), weight=0.5))
    assert inside != name_plugin(Anchored(PerRowTopFraction(0.2), weight=0.5))


def test_what_a_plug_in_learns_on_the_way_does_not_name_it() -> None:
    class Mine:
        def __init__(self) -> None:
            self.share, self._learned = 0.5, 1
            self._inside = GlobalTopFraction()

    one, two = Mine(), Mine()
    two._learned = 2
    assert name_plugin(one) == name_plugin(two) == "Mine share=0.5"


def test_code_of_ones_own_identifies_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(version: int) -> list[str]:
        """What a process says of the plug-in when its file is at this version."""
        file = tmp_path / f"{version}.py"
        file.write_text(
            "from toss_lightning.selection import GlobalTopFraction\n\n\n"
            f"class Mine(GlobalTopFraction):\n    version = {version}\n"
        )
        spec = importlib.util.spec_from_file_location("my_selections", file)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "my_selections", module)
        spec.loader.exec_module(module)
        return [identify(module.Mine()), identify(Anchored(module.Mine())), name_plugin(module.Mine())]

    first, edited = told(1), told(2)
    assert first == told(1)
    assert first[0].startswith(f"{first[2]}, code of my_selections.Mine ")
    assert [one == other for one, other in zip(first, edited, strict=True)] == [False, False, True]
    # what comes with the package is known by its version
    for ours in (GlobalTopFraction(0.2), Anchored(GlobalTopFraction(0.2)), None):
        assert identify(ours) == name_plugin(ours)


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
