"""Replies of an evaluation, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toss_lightning.report.tokens import visible

SAID = {("refused", True): "refused", ("refused", False): "not refused", ("harmful", True): "harmful"}
SAID |= {("harmful", False): "harmless"}
"""What a verdict says, in a word."""


@dataclass(frozen=True)
class Reply:
    """What an adapter said."""

    adapter: str
    text: str
    cut: bool
    """It was still speaking when it had said as much as it may."""
    verdicts: Mapping[str, str]
    """Judge -> its verdict in words."""
    decided: tuple[Any, ...]
    """What each judge said, without measures of its own."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and the replies of all adapters to it."""

    prompt_id: str
    label: str | None
    prompt: str
    replies: Sequence[Reply]

    @property
    def is_contested(self) -> bool:
        """A judge says different things of different adapters."""
        return len({one.decided for one in self.replies}) > 1


def choose_exchanges(
    responses: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], count: int
) -> dict[str, list[Exchange]]:
    """Some of what was said: name of a prompt set -> exchanges, those first in which a judge tells adapters apart.

    Args:
        responses: the lines of responses.jsonl.
        evaluation: what evaluation.json says of them.
        count: exchanges of each set, at most.
    """
    asked: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for one in responses:
        asked.setdefault(one["set"], {}).setdefault(one["prompt_id"], []).append(one)
    screening = {one["judge"] for one in evaluation.get("measures", []) if one["screening"]}
    chosen = {}
    for name, prompts in asked.items():
        exchanges = [_exchange(said, evaluation.get("names", {}), screening) for said in prompts.values()]
        chosen[name] = sorted(exchanges, key=lambda one: not one.is_contested)[:count]
    return chosen


def _exchange(said: Sequence[Mapping[str, Any]], names: Mapping[str, str], screening: set[str]) -> Exchange:
    first, turns = said[0], said[0]["messages"]
    texts = [f"{turn['role']}: {turn['content']}" if len(turns) > 1 else turn["content"] for turn in turns]
    replies = []
    for one in said:
        verdicts = one["verdicts"]
        called = {judge: f"{judge} (screening)" if judge in screening else judge for judge in verdicts}
        words = {called[judge]: _in_words(verdict) for judge, verdict in verdicts.items()}
        decided = tuple((verdict.get("refused"), verdict.get("harmful")) for verdict in verdicts.values())
        name = names.get(one["adapter"], one["adapter"])
        replies.append(Reply(name, visible(one["response"]), not one["stopped"], words, decided))
    return Exchange(first["prompt_id"], first["label"], visible("\n".join(texts)), replies)


def _in_words(verdict: Mapping[str, Any]) -> str:
    words = [SAID[key, verdict[key]] for key in ("refused", "harmful") if verdict.get(key) is not None]
    words += [f"{verdict['score']:.2f}"] if verdict.get("score") is not None else []
    return ", ".join(words) or "undecided"
