"""What a run has left behind, read back to be looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.config_files import read_config
from toss_lightning.errors import ConfigError, ModelError, StoreError
from toss_lightning.evaluation.responses import read_lines
from toss_lightning.files import digest_of, user_path
from toss_lightning.models.base import Base, load_tokenizer
from toss_lightning.report.summary import NAMES, Summary, read_facts
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights
from toss_lightning.selection.weights import REPORT_FILE

NUMBER = int | float
MAYBE = int | float | None
SHARES = dict.fromkeys(("tokens", "masked", "share_of_its_tokens_masked", "share_of_masked_tokens"), NUMBER)
SELECTION = {
    "tokens?": int,
    "masked?": int,
    "anchored?": int,
    "round?": int | None,
    "masked_share_per_label?": {str: SHARES},
    "masked_share_per_source?": {str: SHARES},
}
"""What the page reads of selection.json, see :func:`_fits`."""
SUMMARY = {
    "base": str | None,
    "device": str | None,
    "precision": str,
    "method": str,
    "data": [
        {"set": str} | {f"{name}?": int for name in ("rows", "response_tokens", "dropped", "truncated", "longest")}
    ],
    "stages": dict,
    "held_out": {str: {str: NUMBER}},
    "selection": SELECTION,
    "correction": dict,
    "idle": [str],
    "weak": {str: str},
    "stopped": {str: str},
    "rounds": [
        {"round": int, "promoted_per_label?": dict, "harmful_loss?": MAYBE, "threshold?": MAYBE, "jaccard?": NUMBER}
    ],
    "safety_probe": {"base?": {"margin?": MAYBE}, "stages?": {str: [{"step": int, "margin?": MAYBE}]}},
}
"""Of summary.json."""
INTERVAL = {"n": int, "value": MAYBE, "low": MAYBE, "high": MAYBE}
DIFFERENCE = {"of": str, "against": str, "n": int} | {f"{name}?": NUMBER for name in ("mean", "low", "high", "p_holm")}
EVALUATION = {
    "adapters": [str],
    "measures": [
        {
            "name": str,
            "judge": str | None,
            "screening": bool,
            "better": str,
            "share": bool,
            "adapters": {str: INTERVAL},
            "differences": [DIFFERENCE],
        }
    ],
    "names": {str: str},
    "divergence": {str: {str: [NUMBER]}},
    "agreement": [
        {"judges": [str], "of": str, "kappa": MAYBE, "low": NUMBER, "high": NUMBER, "share": NUMBER, "decided": int}
    ],
    "cut": {str: int},
    "failed_judges": {str: str},
}
"""Of evaluation.json, where all of these must be there."""
RESPONSE = {
    **dict.fromkeys(("adapter", "set", "prompt_id", "response"), str),
    "label": str | None,
    "messages": [{"role": str, "content": str}],
    "stopped": bool,
    "verdicts": {str: {"refused?": bool | None, "harmful?": bool | None, "score?": MAYBE}},
}
"""Of a line of responses.jsonl."""


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
    config = _config(directory)
    warnings: list[str] = []
    selection, store = _places(directory, config, scores_from, warnings)
    weights = TokenWeights.load(selection) if selection is not None else None
    if weights is not None and selection is not None:
        _check_shape(weights.report, SELECTION, selection / REPORT_FILE)
    scores = TokenScores(store, None if weights is None else weights.report.get("round")) if store is not None else None
    if weights is not None and selection is not None and scores is None:
        warnings.append("No row is shown: give the scores that were selected from with --scores.")
    elif weights is not None and selection is not None and scores is not None:
        _check(scores, weights, selection, scores_from)
        if other := other_adapters(scores, weights):
            said = f"{selection} was made from other scores than those in {scores.path} (another {', '.join(other)})"
            if scores_from is not None:
                raise ConfigError(f"--scores {scores_from}: {said}: give those that it was made from")
            warnings.append(f"{said}, and is left out here. Give those that it was made from with --scores.")
            weights = None
    facts = _read(directory / "summary.json", SUMMARY)
    evaluation = _read(directory / "evaluation" / "evaluation.json", EVALUATION)
    if scores is None and weights is None and not facts and not evaluation:
        reasons = warnings or ["it has not scored yet" if config else "it is not the directory of a run"]
        raise ConfigError(f"toss report {directory}: nothing to show: {' '.join(reasons)}")
    if not facts and (directory / "checkpoints").is_dir():
        warnings.append("This run has not come to its end.")
    if evaluation and not evaluation.keys() >= EVALUATION.keys():
        warnings.append("The evaluation here is not of this version, and is left out: run toss test again.")
        evaluation = {}
    scored_in = _read(store.parent / "summary.json", SUMMARY) if store is not None else {}
    configs = [config, _config(store.parent) if store is not None else {}]
    known = {one.name: facts[one.name] for one in fields(Summary) if one.name in facts}
    return FinishedRun(
        directory,
        scores,
        weights,
        Summary(**known),
        facts,
        evaluation or None,
        _responses(directory / "evaluation" / "responses.jsonl") if evaluation else [],
        _base(configs, facts.get("base") or scored_in.get("base")),
        warnings,
    )


def _places(
    directory: Path, config: Mapping[str, Any], scores_from: Path | None, warnings: list[str]
) -> tuple[Path | None, Path | None]:
    """Where the selection and the scores of a run are: in its directory, or where its configuration takes them from.

    Args:
        directory: the run's.
        config: its configuration.
        scores_from: scores that go before others.
        warnings: a line is added for what is not where it should be.
    """
    found: dict[str, Path | None] = {}
    for kind in ("selection", "scores"):
        given = _inside(config, "loop", "init_args", f"{kind}_from")
        place = directory / kind if (directory / kind).is_dir() or not isinstance(given, str) else user_path(given)
        found[kind] = place if place.is_dir() else None
        if isinstance(given, str) and not place.is_dir() and not (kind == "scores" and scores_from):
            warnings.append(f"loop.{kind}_from: {given} is not there, seen from this folder, and is left out here.")
    selection, store = found["selection"], scores_from or found["scores"]
    if store is None and selection is not None and (selection.parent / "scores").is_dir():
        store = selection.parent / "scores"  # a selection that was taken over lies beside what it was made from
    return selection, store


def other_adapters(scores: TokenScores, weights: TokenWeights) -> list[str]:
    """Columns of token losses that a selection was made from and that hold others now, of references trained anew."""
    made, now = weights.report.get("adapters"), scores.adapters
    return sorted(name for name, digest in made.items() if now.get(name) != digest) if isinstance(made, dict) else []


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


def _base(configs: Sequence[Mapping[str, Any]], path: str | None) -> Base | None:
    """The base of a run by its configuration, or by what its summary calls it."""
    for config in configs:
        given = _inside(config, "model", "init_args", "base")
        if isinstance(given, dict) and isinstance(given.get("path"), str):
            known = {one.name for one in fields(Base)}
            return Base(**{name: value for name, value in given.items() if name in known})
    return None if path is None else Base(path)


def _read(file: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file that a run wrote, in the shape that the page reads; nothing where there is none.

    Raises:
        StoreError: it is damaged.
    """
    content = read_facts(file)
    _check_shape(content, shape, file)
    return content


def _responses(file: Path) -> list[dict[str, Any]]:
    """The lines of responses.jsonl; none where it was taken away.

    Raises:
        StoreError: it is damaged.
    """
    lines = read_lines(file) if file.exists() else []
    for number, one in enumerate(lines, 1):
        if not _fits(one, RESPONSE):
            raise StoreError(f"{file}:{number}: not of this version: run toss test again")
    return lines


def _check_shape(content: Mapping[str, Any], shape: Mapping[str, Any], file: Path) -> None:
    """Looks at the values of the keys that are there.

    Raises:
        StoreError: one is not what the page would read; the message names its key.
    """
    for name, one in ((name.removesuffix("?"), one) for name, one in shape.items()):
        if name in content and not _fits(content[name], one):
            raise StoreError(f"{file}: {name}: not what a run writes: run the step that wrote it again")


def _fits(value: Any, shape: Any) -> bool:
    """A value out of JSON is of a shape.

    Args:
        value: the value.
        shape: a type; ``[shape]`` of a list; ``{str: shape}`` of an object with any keys; or ``{key: shape}`` of one
            with these keys and maybe others, of which those with a ``?`` behind need not be there.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(one, shape[0]) for one in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(_fits(one, shape[str]) for one in value.values())
    keys = [(name.removesuffix("?"), name.endswith("?"), one) for name, one in shape.items()]
    return all(_fits(value[name], one) if name in value else may_lack for name, may_lack, one in keys)
