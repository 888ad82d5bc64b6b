"""What a run has left behind, read back to be looked at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.config_files import read_config
from toss_lightning.data.scoring import digest_of
from toss_lightning.errors import ConfigError, ModelError, StoreError
from toss_lightning.models.base import Base, load_tokenizer
from toss_lightning.report.summary import NAMES, Summary
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

EVALUATION = {"adapters", "measures", "names", "divergence", "agreement", "cut", "failed_judges"}
"""Keys of evaluation.json that the page reads."""


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run's directory, as far as it goes: plain fine-tuning has no scores, ``toss select`` no summary, and so on."""

    directory: Path
    scores: TokenScores | None = None
    """Of the round that was selected from, where there is a selection."""
    weights: TokenWeights | None = None
    """Of the rows in :attr:`scores`, where these are there."""
    summary: Summary = field(default_factory=Summary)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What summary.json says, of which :attr:`summary` is a part."""
    evaluation: Mapping[str, Any] | None = None
    """evaluation.json."""
    responses: Sequence[Mapping[str, Any]] = ()
    """The lines of responses.jsonl."""
    base: Base | None = None
    """Where the tokenizer comes from."""
    warnings: Sequence[str] = ()
    """What does not fit together here."""

    @property
    def method(self) -> str:
        """What people call what the run did."""
        if "target" in self.summary.stages:
            return self.summary.method
        if "sft" in self.summary.stages:
            return NAMES["sft"]
        return "Scores" if self.weights is None else str(self.weights.report.get("method", "Selection"))

    def tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer that the rows were made with.

        Args:
            name: a directory or hub id to take it from; the run's base by default.

        Raises:
            ConfigError: there are no rows, nothing says where it is, or what was named is not it.
            ModelError: it cannot be loaded.
        """
        if self.scores is None:
            raise ConfigError(
                f"toss report {self.directory}: no token scores here, and so no rows: name a run of toss fit with the"
                " step score, a run of toss score, or the directory of the scores that this one read with --scores"
            )
        base = self.base if name is None else replace(self.base or Base(), path=name)
        if base is None:
            raise ConfigError(
                f"{self.directory}: nothing here says which base the rows were tokenised for: name it with --tokenizer"
            )
        try:
            found = load_tokenizer(base)
        except ModelError as error:
            if name is None:
                raise
            raise ConfigError(str(error).replace("model.base.path", "--tokenizer", 1)) from error
        if digest_of(found.backend_tokenizer.to_str()) != self.scores.fingerprints.get("tokenizer"):
            raise ConfigError(
                f"--tokenizer: that of {base.path} is another one than the rows of {self.scores.path} were made with,"
                " and would show other texts: name the base that they were scored with"
            )
        return found


def read_run(directory: Path, scores_from: Path | None = None) -> FinishedRun:
    """Reads what is there of a run.

    Args:
        directory: the run's.
        scores_from: its scores, where they are neither in the directory nor where its configuration says.

    Raises:
        ConfigError: there is nothing there that a run leaves behind, or the scores given are other ones.
        StoreError: something in it is damaged, or its selection is of other rows than its scores.
    """
    if (directory / "compare.json").is_file():
        raise ConfigError(f"toss report {directory}: a comparison, whose report is compare.md: name one of its runs")
    config, selection = _config(directory), _place(directory, "selection")
    store, warnings = scores_from or _place(directory, "scores"), []
    if store is None and selection is not None and (selection.parent / "scores").is_dir():
        store = selection.parent / "scores"  # one that was taken over lies beside what it was made from
    weights = TokenWeights.load(selection) if selection is not None else None
    scores = TokenScores(store, None if weights is None else weights.report.get("round")) if store is not None else None
    if scores is not None and weights is not None and selection is not None:
        if other := other_adapters(scores, weights):
            warnings.append(
                f"The selection in {selection} was made from other scores than those in {scores.path} (another"
                f" {', '.join(other)}), and is left out here: select again."
            )
            weights = None
        else:
            _check(scores, weights, selection, scores_from)
    elif weights is not None:
        warnings.append("No row is shown: name the scores that were selected from, with --scores.")
    facts, judged = _read(directory / "summary.json"), _read(directory / "evaluation" / "evaluation.json")
    if scores is None and weights is None and not facts and not judged:
        raise ConfigError(
            f"toss report {directory}: neither scores nor a summary nor an evaluation here: name the directory of a run"
        )
    if judged and not judged.keys() >= EVALUATION:
        raise StoreError(f"{directory / 'evaluation' / 'evaluation.json'}: not of this version: run toss test again")
    scored_in = _read(store.parent / "summary.json") if store is not None else {}
    configs = [config, _config(store.parent) if store is not None else {}]
    known = {one.name: facts[one.name] for one in fields(Summary) if one.name in facts}
    return FinishedRun(
        directory,
        scores,
        weights,
        Summary(**known),
        facts,
        judged or None,
        _read_lines(directory / "evaluation" / "responses.jsonl") if judged else [],
        _base(configs, facts.get("base") or scored_in.get("base")),
        warnings,
    )


def other_adapters(scores: TokenScores, weights: TokenWeights) -> list[str]:
    """Columns that a selection was made from and that hold other losses now, as those of references trained anew."""
    now = scores.adapters
    return sorted(name for name, digest in weights.report.get("adapters", {}).items() if now.get(name) != digest)


def _check(scores: TokenScores, weights: TokenWeights, selection: Path, scores_from: Path | None) -> None:
    tokens = dict(zip(scores.row_ids.tolist(), np.diff(scores.offsets).tolist(), strict=True))
    try:
        weights.check(scores.hashes(), selection, scores.fingerprints, tokens)
    except StoreError as error:
        if scores_from is None:
            raise
        raise ConfigError(f"--scores {scores_from}: not what {selection} was selected from ({error})") from error


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.yaml"
    return read_config(file) if file.is_file() else {}


def _inside(config: Mapping[str, Any], *keys: str) -> Any:
    """A value of a configuration; None where there is none."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _place(directory: Path, kind: str) -> Path | None:
    """Where the scores or the selection of a run are: in its directory, or where its configuration takes them from."""
    if (directory / kind).is_dir():
        return directory / kind
    given = _inside(_config(directory), "loop", "init_args", f"{kind}_from")
    if not isinstance(given, str):
        return None
    if not Path(given).is_dir():
        raise StoreError(
            f"{directory / 'config.yaml'}: loop.{kind}_from: {given} is not there, seen from this folder: run toss"
            " report where the run was started"
        )
    return Path(given)


def _base(configs: Sequence[Mapping[str, Any]], path: str | None) -> Base | None:
    """The base of a run by its configuration, or by what its summary calls it."""
    for config in configs:
        given = _inside(config, "model", "init_args", "base")
        if isinstance(given, dict) and "path" in given:
            known = {one.name for one in fields(Base)}
            return Base(**{name: value for name, value in given.items() if name in known})
    return None if path is None else Base(path)


def _read(file: Path) -> dict[str, Any]:
    """A JSON file that a run wrote; nothing where there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: damaged ({error}): run the step that wrote it again") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file}: not what a run writes: run the step that wrote it again")
    return content


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that a run wrote; none where it was taken away.

    Raises:
        StoreError: it is damaged.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: damaged ({error}): delete {file.parent}, and test again") from error
