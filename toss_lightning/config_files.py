"""Configuration files: where they lie, and what they say. Nothing here needs torch."""

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

from toss_lightning.errors import ConfigError
from toss_lightning.files import user_path


def configs_directory() -> Path:
    """The configurations that come with the project."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def find_config(name: str) -> Path:
    """A configuration file: as given, or below the ones that come with the project.

    Raises:
        ConfigError: there is no such file.
    """
    ours = configs_directory()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    # os.path calls a text that is too long for a name no file, where pathlib raises
    for path in (user_path(name), ours / f"{short}.yaml"):
        if os.path.isfile(path):
            return path
    known = {str(path.relative_to(ours).with_suffix("")): path for path in sorted(ours.rglob("*.yaml"))}
    near = difflib.get_close_matches(short, known, 1, 0.5)
    near = near or [stem for stem, path in known.items() if path.stem == Path(short).stem]
    hint = f"did you mean configs/{near[0]}.yaml?" if near else "give the path of a YAML file"
    raise ConfigError(f"--config {name}: no such file; {hint}")


def read_config(path: Path) -> dict[str, Any]:
    """What a configuration file says.

    Raises:
        ConfigError: it cannot be read, or is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({error.problem})") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: no keys in it: it should look like demo.yaml")
    return content
