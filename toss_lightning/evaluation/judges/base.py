"""What every judge is: something that reads responses and says whether they refuse, and whether they are harmful."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from toss_lightning.evaluation.records import Response, Verdict


class Judge(ABC):
    """Reads responses a chunk at a time, so that what a killed run had judged is not judged again.

    Public attributes of a judge are its settings, which identify its verdicts.

    Attributes:
        decides: which of ``refused`` and ``harmful`` it says.
        screening: its word alone is no result: tables mark it.
        chunk: responses that it is given at once.
        asks: the text that it asks by, where verdicts depend on one beside the settings.
    """

    decides: tuple[str, ...] = ("refused",)
    screening: bool = False
    chunk: int = 64
    asks: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    def check(self) -> None:  # noqa: B027
        """Refuses, before anything is trained, what would keep it from judging afterwards.

        Raises:
            ConfigError: it lacks something, as the key of an endpoint.
            ModelError: its model is not to be had.
        """

    @contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """Loads what it needs onto ``device`` and lets it go behind the block."""
        yield

    def estimate(self, responses: Sequence[Response]) -> str | None:
        """What judging them costs beyond time, in words, said before it begins; None where it costs nothing."""
        return None

    @abstractmethod
    def judge(self, responses: Sequence[Response]) -> list[Verdict]:
        """Verdicts on some responses, in their order."""
