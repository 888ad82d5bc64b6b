"""Replies of an evaluation, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        said = [tuple(one.verdicts.items()) for one in self.replies]
        return len(set(said)) > 1


def choose_exchanges(
    responses: Sequence[Mapping[str, Any]], names: Mapping[str, str], count: int
) -> dict[str, list[Exchange]]:
    """Some of what was said: name of a prompt set -> exchanges, those first in which a judge tells adapters apart.

    Args:
        responses: the lines of responses.jsonl.
        names: adapter -> what people call it.
        count: exchanges of each set, at most.
    """
    asked: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for one in responses:
        asked.setdefault(one["set"], {}).setdefault(one["prompt_id"], []).append(one)
    chosen = {}
    for name, prompts in asked.items():
        exchanges = [_exchange(said, names) for said in prompts.values()]
        chosen[name] = sorted(exchanges, key=lambda one: not one.is_contested)[:count]
    return chosen


def _exchange(said: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Exchange:
    first, turns = said[0], said[0]["messages"]
    texts = [f"{turn['role']}: {turn['content']}" if len(turns) > 1 else turn["content"] for turn in turns]
    replies = [
        Reply(
            names.get(one["adapter"], one["adapter"]),
            one["response"],
            not one["stopped"],
            {judge: _in_words(verdict) for judge, verdict in one["verdicts"].items()},
        )
        for one in said
    ]
    return Exchange(first["prompt_id"], first["label"], "\n".join(texts), replies)


def _in_words(verdict: Mapping[str, Any]) -> str:
    words = [SAID[key, verdict[key]] for key in ("refused", "harmful") if verdict.get(key) is not None]
    words += [f"{verdict['score']:.2f}"] if verdict.get("score") is not None else []
    return ", ".join(words) or "undecided"
