"""What a run has left behind, read back to be looked at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.config_files import read_config
from toss_lightning.data.scoring import digest_of
from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.files import nearest
from toss_lightning.models.base import Base, load_tokenizer
from toss_lightning.report.summary import Summary
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run's directory, as far as it goes: plain fine-tuning has no scores, ``toss select`` no summary, and so on."""

    directory: Path
    scores: TokenScores | None = None
    """Of the round that was selected from, where there is a selection."""
    weights: TokenWeights | None = None
    """Of the rows in :attr:`scores`; None without these."""
    summary: Summary = field(default_factory=Summary)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What summary.json says, of which :attr:`summary` is a part."""
    evaluation: Mapping[str, Any] | None = None
    """evaluation.json."""
    responses: Sequence[Mapping[str, Any]] = ()
    """The lines of responses.jsonl."""
    base: str | None = None
    """Where the tokenizer comes from."""

    @property
    def method(self) -> str:
        """What people call what the run did."""
        if self.facts and self.summary.stages.keys() & {"sft", "target"}:
            return self.summary.method
        return "Scores" if self.weights is None else str(self.weights.report.get("method", "Selection"))

    def tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer that the rows were made with.

        Args:
            name: a directory or hub id to take it from; the run's base by default.

        Raises:
            ConfigError: there are no rows, nothing says where it is, or it is another one.
            ModelError: it cannot be loaded.
        """
        if self.scores is None:
            raise ConfigError(
                f"toss report {self.directory}: no token scores here, and so no rows: name a run of toss fit with the"
                " step score, a run of toss score, or the directory of the scores that this one read with --scores"
            )
        wanted = name or self.base
        if wanted is None:
            raise ConfigError(
                f"{self.directory}: nothing here says which base the rows were tokenised for: name it with --tokenizer"
            )
        found = load_tokenizer(Base(wanted))
        if digest_of(found.backend_tokenizer.to_str()) != self.scores.fingerprints["tokenizer"]:
            raise ConfigError(
                f"--tokenizer: that of {wanted} is another one than the rows of {self.scores.path} were made with, and"
                " would show other texts: name the base that they were scored with"
            )
        return found


def read_run(directory: Path, scores_from: Path | None = None) -> FinishedRun:
    """Reads what is there of a run.

    Args:
        directory: the run's.
        scores_from: its scores, where they are neither in the directory nor where its configuration says.

    Raises:
        ConfigError: there is no such directory, or nothing in it that a run leaves behind.
        StoreError: something in it is damaged, or its selection is of other rows than its scores.
    """
    if not directory.is_dir():
        raise ConfigError(f"toss report {directory}: no such directory{nearest(directory)}")
    if (directory / "compare.json").is_file():
        raise ConfigError(f"toss report {directory}: a comparison, whose report is compare.md: name one of its runs")
    selection = _place(directory, "selection")
    store = scores_from or _place(directory, "scores")
    if store is None and selection is not None and (selection.parent / "scores").is_dir():
        store = selection.parent / "scores"  # one that was taken over lies beside what it was made from
    weights = TokenWeights.load(selection) if selection is not None and store is not None else None
    scores = None
    if store is not None:
        scores = TokenScores(store, None if weights is None else weights.report.get("round"))
    if scores is not None and weights is not None:
        tokens = dict(zip(scores.row_ids.tolist(), np.diff(scores.offsets).tolist(), strict=True))
        weights.check(scores.hashes(), selection or directory, scores.fingerprints, tokens)
    facts, evaluation = _read(directory / "summary.json"), directory / "evaluation"
    judged = _read(evaluation / "evaluation.json")
    if scores is None and not facts and not judged:
        raise ConfigError(
            f"toss report {directory}: neither scores nor a summary nor an evaluation here: name the directory of a run"
        )
    known = {one.name: facts[one.name] for one in fields(Summary) if one.name in facts}
    return FinishedRun(
        directory,
        scores,
        weights,
        Summary(**known),
        facts,
        judged or None,
        _read_lines(evaluation / "responses.jsonl") if judged else [],
        (facts or (_read(store.parent / "summary.json") if store is not None else {})).get("base"),
    )


def _place(directory: Path, kind: str) -> Path | None:
    """Where the scores or the selection of a run are: in its directory, or where its configuration takes them from."""
    if (directory / kind).is_dir():
        return directory / kind
    file = directory / "config.yaml"
    loop = (read_config(file).get("loop") or {}) if file.is_file() else {}
    given = (loop.get("init_args") or {}).get(f"{kind}_from")
    if given is None:
        return None
    if not Path(given).is_dir():
        raise StoreError(
            f"{file}: loop.{kind}_from: {given} is not there, seen from this folder: run toss report where the run was"
            " started"
        )
    return Path(given)


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
    """The lines of a JSONL file that a run wrote.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: damaged ({error}): run toss test again") from error
