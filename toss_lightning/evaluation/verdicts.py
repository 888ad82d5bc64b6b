"""Verdicts of a judge on responses and on pairs of them, kept on disk so that none is asked for twice."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from toss_lightning.errors import ModelError, StoreError
from toss_lightning.evaluation.judges.base import Judge
from toss_lightning.evaluation.judges.pairwise import Outcome, PairwiseJudge
from toss_lightning.evaluation.records import Response, Verdict
from toss_lightning.files import CACHE, digest_of, digest_of_file, write_text
from toss_lightning.identity import code_of, name_plugin, own, parts_of
from toss_lightning.progress import progress_bar, say

Pair = tuple[Response, Response]
Facts = dict[str, Any]
Item = TypeVar("Item")


def judge_responses(
    judge: Judge,
    responses: Sequence[Response],
    directory: Path,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """Verdicts on all responses, in their order; see :func:`judging`.

    Args:
        judge: the judge.
        responses: what it reads.
        directory: where verdicts are kept.
        device: where its model computes, if it has one.
        between: called whenever verdicts are on disk; what it raises ends the work.
    """
    for _ in judging(judge, responses, directory, device):
        between()
    return known_verdicts(judge, responses, directory)


def known_verdicts(judge: Judge, responses: Sequence[Response], directory: Path) -> list[Verdict]:
    """What a judge has said of responses, all of which it has judged, in their order.

    Raises:
        StoreError: the directory holds a damaged file.
    """
    known = _read(_folder(directory, judge), "response", {*asdict(Verdict())})
    return [Verdict(**known[one.digest]) for one in responses]


def judging(judge: Judge, responses: Sequence[Response], directory: Path, device: torch.device) -> Iterator[None]:
    """Has responses judged, as far as they are not yet, and comes back whenever some verdicts more are on disk.

    Equal responses to equal prompts are judged once.

    Args:
        judge: the judge.
        responses: what it reads.
        directory: where verdicts are kept, those of each judge with its settings in a directory of its own.
        device: where its model computes, if it has one.

    Raises:
        StoreError: the directory cannot be written, or holds a damaged file.
    """

    def ask(part: Sequence[Response]) -> list[Facts]:
        return _plain(judge, judge.judge(part), len(part))

    folder = _folder(directory, judge)
    known = _read(folder, "response", {*asdict(Verdict())})
    open_ones = {one.digest: one for one in responses if one.digest not in known}
    if open_ones:
        if cost := judge.estimate(list(open_ones.values())):
            say(f"{judge.name}: {cost}")
        bar = progress_bar(f"{judge.name} judges", len(responses), "response", done=len(responses) - len(open_ones))
        with bar, judge.ready(device):
            for part in _parts(open_ones, judge.chunk):
                _file(folder, "response", part, ask, CACHE)
                bar.update(len(part))
                yield


def _plain(judge: Judge, verdicts: Sequence[Verdict], wanted: int) -> list[Facts]:
    """Verdicts as a file holds them; a judge of one's own may say no as numpy does.

    Raises:
        ModelError: there are too few or too many, or one is none.
    """
    if len(verdicts) != wanted or not all(isinstance(one, Verdict) for one in verdicts):
        raise ModelError(
            f"loop.evaluation.judges: {judge.name}: its method judge gave {len(verdicts)} values for {wanted}"
            " responses: return a list with a Verdict for each"
        )
    return [
        {
            "refused": None if one.refused is None else bool(one.refused),
            "harmful": None if one.harmful is None else bool(one.harmful),
            "score": None if one.score is None else float(one.score),
            "raw": str(one.raw),
        }
        for one in verdicts
    ]


def comparing(judge: PairwiseJudge, pairs: Sequence[Pair], directory: Path, device: torch.device) -> Iterator[None]:
    """Has pairs compared, as far as they are not yet; comes back after each part that is filed.

    Equal responses to equal prompts are compared once.

    Args:
        judge: the judge.
        pairs: our response and theirs to the same prompt.
        directory: where outcomes are kept, those of each judge with its settings in a directory of its own.
        device: where its model computes, if it has one.

    Raises:
        StoreError: the directory cannot be written, or holds a damaged file.
    """

    def ask(part: Sequence[Pair]) -> list[Facts]:
        return [{"outcome": outcome} for outcome in judge.compare(*_unzipped(part))]

    known = known_outcomes(judge, directory)
    open_ones = {digest: pair for pair in pairs if (digest := digest_of_pair(pair)) not in known}
    if open_ones:
        if cost := judge.estimate(*_unzipped(open_ones.values())):
            say(f"{judge.name}: {cost}")
        bar = progress_bar(f"{judge.name} compares", len(pairs), "pair", done=len(pairs) - len(open_ones))
        with bar, judge.ready(device):
            for part in _parts(open_ones, judge.chunk):
                _file(_folder(directory, judge), "pair", part, ask, CACHE)
                bar.update(len(part))
                yield


def known_outcomes(judge: PairwiseJudge, directory: Path) -> dict[str, Outcome | None]:
    """What a judge has said of pairs by now: digest of the pair -> what it is for our response.

    Raises:
        StoreError: the directory holds a damaged file.
    """
    found = _read(_folder(directory, judge), "pair", {"outcome"})
    return {digest: facts["outcome"] for digest, facts in found.items()}


def digest_of_pair(pair: Pair) -> str:
    """Identifies a prompt and two responses to it, whichever adapters gave them."""
    ours, theirs = pair
    return digest_of(f"{ours.digest} {theirs.digest}")


def _unzipped(pairs: Iterable[Pair]) -> tuple[list[Response], list[Response]]:
    ours, theirs = zip(*pairs, strict=True)
    return [*ours], [*theirs]


def remember_code(judge: Judge | PairwiseJudge) -> None:
    """Takes down the code that a judge has now: its file may be edited before, or while, it judges."""
    for _ in _origins(judge):
        pass


def _folder(directory: Path, judge: Judge | PairwiseJudge) -> Path:
    facts = name_plugin(judge) + judge.asks + "".join(_origins(judge))
    return directory / f"{type(judge).__name__}-{digest_of(facts)}"


def _origins(plugin: object) -> Iterator[str]:
    """What verdicts depend on beside names and settings: code that is not ours, local models, files that are named."""
    for part in parts_of(plugin):
        for kind in own(part):
            # one that was typed at a prompt is known to this process alone
            yield f"{kind.__module__}.{kind.__qualname__} {code_of(kind) or f'{os.getpid()} {id(kind)}'}"
        for name, value in sorted(vars(part).items()):
            if name == "model" and isinstance(value, str) and (path := Path(value).expanduser()).exists():
                files = [path] if path.is_file() else sorted(path.iterdir())
                yield " ".join(f"{one.name} {one.stat().st_size} {one.stat().st_mtime_ns}" for one in files)
            elif isinstance(value, str | Path) and name[0] != "_" and (content := _content_of(value)):
                yield f"{name} {content}"


def _content_of(value: str | Path) -> str | None:
    """Identifies the content of the file that a setting names; None where it names none."""
    try:
        named = Path(value).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long a text, or one that no path can be
        return None
    try:
        return digest_of_file(value) if named else None
    except OSError as error:
        raise ModelError(f"loop.evaluation.judges: {value}: cannot be read ({error.strerror})") from error


def _parts(items: Mapping[str, Item], size: int) -> list[dict[str, Item]]:
    digests = list(items)
    return [{one: items[one] for one in digests[at : at + size]} for at in range(0, len(digests), size)]


def _file(
    folder: Path, key: str, part: Mapping[str, Item], ask: Callable[[Sequence[Item]], Sequence[Facts]], instead: str
) -> dict[str, Facts]:
    """Asks for a part of the items, and writes what is said of them; returns it by their digests."""
    new = dict(zip(part, ask([*part.values()]), strict=True))
    lines = [json.dumps({key: digest, **facts}) for digest, facts in new.items()]
    # runs that share the directory may judge at the same time
    write_text(folder / f"{digest_of(' '.join(new))}.jsonl", "\n".join([*lines, ""]), instead)
    return new


def _read(folder: Path, key: str, fields: set[str]) -> dict[str, Facts]:
    """Digest -> what was said, of all files of a judge, whose lines hold ``fields`` beside the digest."""
    found: dict[str, Facts] = {}
    for file in sorted(folder.glob("*.jsonl")):
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                facts = json.loads(line)
                digest = facts.pop(key)
                if facts.keys() != fields:
                    raise ValueError(f"expected {', '.join(sorted(fields))}")
                found[digest] = facts
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise StoreError(f"{file}: damaged ({error}): delete it and run the test again") from error
    return found
