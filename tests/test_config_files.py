from pathlib import Path

import pytest

from toss_lightning import config_files


def test_configs_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "toss_lightning"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(config_files, "__file__", str(package / "config_files.py"))
    assert config_files.configs_directory() == package / "configs"
    (package / "configs").rmdir()
    assert config_files.configs_directory() == tmp_path / "site" / "configs"


def test_a_file_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("{}")
    assert config_files.find_config("~/mine.yaml") == tmp_path / "mine.yaml"
