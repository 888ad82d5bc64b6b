"""Verdicts of a judge on responses, kept on disk so that none is asked for twice."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from toss_lightning.data.scoring import digest_of
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.judges.base import Judge
from toss_lightning.evaluation.records import Response, Verdict
from toss_lightning.files import write_text
from toss_lightning.identity import name_plugin
from toss_lightning.progress import progress_bar, say


def judge_responses(
    judge: Judge,
    responses: Sequence[Response],
    directory: Path,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """Verdicts on all responses, in their order. Equal responses to equal prompts are judged once.

    Args:
        judge: the judge.
        responses: what it reads.
        directory: where verdicts are kept, those of each judge with its settings in a directory of its own.
        device: where its model computes, if it has one.
        between: called whenever verdicts are on disk; what it raises ends the work.

    Raises:
        StoreError: the directory cannot be written, or holds a damaged file.
    """
    folder = directory / f"{type(judge).__name__}-{digest_of(name_plugin(judge))}"
    folder.mkdir(parents=True, exist_ok=True)
    known = _read(folder)
    open_ones = list({one.digest: one for one in responses if one.digest not in known}.values())
    if open_ones:
        if cost := judge.estimate(open_ones):
            say(f"{judge.name}: {cost}")
        bar = progress_bar(f"{judge.name} judges", len(responses), "response", done=len(responses) - len(open_ones))
        with bar, judge.ready(device):
            for start in range(0, len(open_ones), judge.chunk):
                part = open_ones[start : start + judge.chunk]
                new = {one.digest: verdict for one, verdict in zip(part, judge.judge(part), strict=True)}
                lines = [json.dumps({"response": digest, **asdict(verdict)}) for digest, verdict in new.items()]
                # runs that share the directory may judge at the same time
                write_text(folder / f"{digest_of(' '.join(new))}.jsonl", "\n".join([*lines, ""]))
                known |= new
                bar.update(len(part))
                between()
    return [known[one.digest] for one in responses]


def _read(folder: Path) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for file in sorted(folder.glob("*.jsonl")):
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                facts = json.loads(line)
                digest = facts.pop("response")
                found[digest] = Verdict(**facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{file}: damaged ({error}): delete it and run the test again") from error
    return found
