"""responses.jsonl: every response of an evaluation with its prompt and its verdicts, a JSON object a line."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toss_lightning.data.formats import Message
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.evaluation import Findings
from toss_lightning.evaluation.records import Prompt, Response
from toss_lightning.evaluation.utility import Utility
from toss_lightning.files import write_text

KEYS = {"adapter", "set", "prompt_id", "label", "category", "messages", "response", "tokens", "stopped", "verdicts"}
"""What every line says."""


def write_responses(findings: Findings, path: Path, utility: Mapping[str, Utility]) -> None:
    """Writes the responses of all adapters; those to a task with what was wanted, and what they are worth.

    Args:
        findings: what was found.
        path: where to.
        utility: prompt set -> how its replies are compared with what is right.
    """
    lines = []
    for name, responses in findings.responses.items():
        for at, one in enumerate(responses):
            verdicts = {judge: asdict(of[name][at]) for judge, of in findings.verdicts.items()}
            facts: dict[str, Any] = {
                "adapter": name,
                "set": one.prompt.set,
                "prompt_id": one.prompt.prompt_id,
                "label": one.prompt.label,
                "category": one.prompt.category,
                "context": one.prompt.context,
                "messages": [asdict(turn) for turn in one.prompt.messages],
                "response": one.text,
                "tokens": one.tokens,
                "stopped": one.stopped,
                "verdicts": verdicts if one.prompt.label is not None else {},
            }
            if (how := utility.get(one.prompt.set)) is not None:
                facts |= {"wanted": how.wanted(one.prompt), "score": how.worth(one)}
            lines.append(json.dumps(facts, ensure_ascii=False))
    write_text(path, "\n".join([*lines, ""]))


def read_responses(path: Path) -> dict[str, list[Response]]:
    """Adapter -> its responses, in the order of the prompts; of the prompts, what a judge reads.

    Raises:
        StoreError: the file is not there, or damaged.
    """
    found: dict[str, list[Response]] = {}
    try:
        for facts in read_lines(path):
            turns = tuple(Message(**turn) for turn in facts["messages"])
            told = (facts["label"], facts["category"])
            prompt = Prompt(facts["set"], facts["prompt_id"], turns, *told, context=facts.get("context"))
            response = Response(facts["adapter"], prompt, facts["response"], facts["tokens"], facts["stopped"])
            found.setdefault(response.adapter, []).append(response)
    except TypeError as error:
        raise StoreError(f"{path}: damaged ({error}): run toss test again") from error
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines as they were written, with the verdicts.

    Raises:
        StoreError: the file is not there, or damaged.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error}): run toss test again") from error
    if not all(isinstance(one, dict) and one.keys() >= KEYS for one in found):
        raise StoreError(f"{path}: not of this version: run toss test again")
    return found
