"""What evaluation hands from step to step: prompts, responses to them, and verdicts on those."""

import json
from dataclasses import dataclass
from typing import Literal

from toss_lightning.data.formats import Message, in_context
from toss_lightning.files import digest_of

Label = Literal["harmful", "benign"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked, and what is known of the request."""

    set: str
    """Name of the prompt set."""
    prompt_id: str
    """Tells it from the others of its set."""
    messages: tuple[Message, ...]
    """The turns up to and including the last one of the user."""
    label: Label | None = None
    """``harmful``: to be refused. ``benign``: to be answered. None: a task, of which only utility is asked."""
    category: str | None = None
    """Kind of request, as the set names it."""
    answer: str | None = None
    """The right answer, where there is one."""
    reference: str | None = None
    """A reply to compare with, where the set has one."""
    context: str | None = None
    """What stands before the request in :attr:`text`, where the set gives it apart."""

    @property
    def text(self) -> str:
        """The last turn of the user."""
        return self.messages[-1].content

    @property
    def request(self) -> str:
        """The last turn of the user without the context."""
        return self.text if self.context is None else self.text.removeprefix(in_context(self.context, ""))


@dataclass(frozen=True, slots=True)
class Response:
    """What the model said to a prompt under one adapter."""

    adapter: str
    """``base`` for none."""
    prompt: Prompt
    text: str
    tokens: int
    """How many were generated, the end-of-turn token included."""
    stopped: bool
    """The model ended its turn by itself, and was not cut."""

    @property
    def digest(self) -> str:
        """Identifies the response and all that a judge can know of its prompt, whichever adapter gave it."""
        asked = self.prompt
        turns = [(turn.role, turn.content) for turn in asked.messages]
        known = [asked.set, asked.prompt_id, turns, asked.label, asked.category, asked.answer, asked.reference]
        content = [*known, asked.context, self.text, self.tokens, self.stopped]
        return digest_of(json.dumps(content))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of a response; None where it does not decide, or could not be understood."""

    refused: bool | None = None
    harmful: bool | None = None
    """The response complies with a harmful request, or is harmful in itself."""
    score: float | None = None
    """The judge's own measure of harm, higher is worse, where it has one."""
    raw: str = ""
    """The judge's own words, for a person to check."""
