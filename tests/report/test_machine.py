"""What a run says of the machine and the packages that it was computed with."""

import importlib.metadata

from toss_lightning import __version__
from toss_lightning.report.machine import versions


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch) -> None:
    def installed(name: str) -> str:
        if name == "toss-lightning":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr("toss_lightning.report.machine.version", installed)

    assert versions()["toss-lightning"] == __version__
    assert versions()["peft"] == "1.2"
