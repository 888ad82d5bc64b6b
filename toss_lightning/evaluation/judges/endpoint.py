"""Models behind an OpenAI-compatible endpoint."""

import ipaddress
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

import torch
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.errors import ConfigError, ModelError
from toss_lightning.evaluation.judges.backends import Backend, Turn, check_at_least
from toss_lightning.evaluation.judges.chat_request import Failure, post_chat

LONGEST_WAIT = 300.0
"""Seconds; an endpoint that asks for more is given up."""
LONGEST_BACKOFF = 60.0
"""Seconds between tries where the endpoint asks for none."""
OF_ONE = frozenset({200, 400, 403, 413, 422})
"""HTTP statuses of failures that may be about one chat alone: what a content filter stops, or what is too long."""
TRIVIAL: list[Turn] = [{"role": "user", "content": "Say yes."}]
ADVICE = {200: "check url and model", 400: "check model, max_tokens and extra", 404: "check url and model"}
OPENAI = "api.openai.com"
SECRET = re.compile(r"(^|[-_.])(key|token|secret|sig|signature|auth)$|apikey|passw", re.IGNORECASE)
"""Of a name in an address's query: what it gives is nobody else's business."""


class Endpoint(Backend):
    """Answers from ``POST <url>/chat/completions``.

    A request that fails for now (429, 5xx, no answer in time, an answer that is no chat completion) is made again after
    as long as ``Retry-After`` says, else after one second, two, four and so on, with jitter. A chat that the endpoint
    refuses (400, 403, 413, 422, a response without a message: a content filter, too long) has a note in place of its
    answer where a trivial chat is answered after it. The key is read from the environment for each request and kept
    nowhere.

    Args:
        model: the model's name at the endpoint.
        url: the endpoint up to ``/chat/completions``, as ``https://api.openai.com/v1``.
        key_env: the environment variable that holds the key. ``OPENAI_API_KEY`` by default at api.openai.com and on
            this machine, where an endpoint may do without; any other host is sent a key that is named for it only.
        requests_per_minute: no more requests than these are begun in a minute, repeated ones included; of each process
            that judges, as each run of a comparison is.
        retries: how often a request is made again; the default outlasts a quota of so many a minute.
        timeout: seconds without a byte after which a request has failed.
        price_in: price of a million tokens of questions.
        price_out: price of a million tokens of answers.
        max_tokens: how long an answer may be.
        workers: requests under way at once.
        extra: more fields of the request, as ``{max_completion_tokens: 2000, max_tokens: null}``; null leaves one out.

    Raises:
        ConfigError: the URL is none, or holds a password or a key; a number is out of range.
    """

    def __init__(
        self,
        model: str,
        url: str,
        key_env: str | None = None,
        requests_per_minute: int | None = None,
        retries: int = 8,
        timeout: float = 60.0,
        price_in: float | None = None,
        price_out: float | None = None,
        max_tokens: int = 512,
        workers: int = 4,
        extra: dict[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_sound_port(parts):
            raise ConfigError("loop.evaluation.judges: url: not an address: give one as https://api.openai.com/v1")
        if parts.username or parts.password:
            raise ConfigError("loop.evaluation.judges: url: holds a password: put it into the variable of key_env")
        if secret := next((name for name, _ in parse_qsl(parts.query) if SECRET.search(name)), None):
            # an address stands in config.yaml and in the names of verdicts
            raise ConfigError(f"loop.evaluation.judges: url: holds {secret}: put it into the variable of key_env")
        check_at_least(1, max_tokens=max_tokens, workers=workers)
        if requests_per_minute is not None:
            check_at_least(1, requests_per_minute=requests_per_minute)
        if not timeout > 0:
            raise ConfigError(f"loop.evaluation.judges: timeout: {timeout}: give more than 0")
        check_at_least(0, retries=retries)
        # what an answer depends on; haste, patience and prices make no other judge
        self.model, self.url, self.max_tokens, self.extra = model, url, max_tokens, extra
        self._requests_per_minute, self._workers = requests_per_minute, workers
        self._retries, self._timeout = retries, timeout
        self._price_in, self._price_out = price_in, price_out
        self._local = _is_local(parts.hostname)
        self._key_env = key_env or ("OPENAI_API_KEY" if self._local or parts.hostname == OPENAI else None)
        self._in_clear = parts.scheme == "http" and not self._local
        path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._address = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        self._shown = f"{parts.scheme}://{parts.netloc}{path}"
        self._stopping = threading.Event()
        self._vouching, self._vouched = threading.Lock(), False
        self._sleep: Callable[[float], object] = self._stopping.wait
        self._turns: _Turns | None = None

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self.model

    def check(self) -> None:
        """Makes sure of the key, and warns of a way on which others can read it.

        Raises:
            ConfigError: there is none, or it cannot be one.
        """
        self._key()
        if self._in_clear:
            rank_zero_warn(
                f"the judge {self.model} at {self._shown}: the key, the prompts and the replies travel unencrypted:"
                " give a url with https, unless you trust the network"
            )

    @contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """Makes sure of the key before the first request.

        Raises:
            ConfigError: there is none, or it cannot be one.
        """
        self._key()
        self._turns = _Turns(self._requests_per_minute)
        yield

    def estimate(self, chats: Sequence[list[Turn]]) -> str | None:
        """Requests, tokens, and the price where every answer is as long as it may be.

        A token is taken for four characters of ASCII, or one of another script.
        """
        texts = [turn["content"] for chat in chats for turn in chat]
        plain = sum(len(text.encode("ascii", "ignore")) for text in texts)
        asked = plain // 4 + sum(map(len, texts)) - plain
        fields = {"max_tokens": self.max_tokens, **(self.extra or {})}
        limits = [fields[name] for name in ("max_tokens", "max_completion_tokens") if fields.get(name) is not None]
        told = len(chats) * min(limits, default=0)
        if self._price_in is None or self._price_out is None:
            price = "at a price unknown: give price_in and price_out to see it"
        elif not limits:
            price = "at a price without limit: leave max_tokens in, or give max_completion_tokens"
        else:
            price = f"for about {(asked * self._price_in + told * self._price_out) / 1e6:.2f} at most"
        out = f"at most {told:,}" if limits else "any number"
        return (
            f"{len(chats):,} requests to {self._shown}, about {asked:,} tokens in and {out} out, {price}"
            " (a repeated request costs again)"
        )

    def answer(self, chats: Sequence[list[Turn]]) -> list[str]:
        """One answer to each chat; empty where the model gave none, a note where the endpoint refuses this chat alone.

        Where a chat is refused, a trivial one is asked, which tells whose fault it is: at the first refusal, and behind
        the last, for whoever runs out of money is refused from some chat on.

        Raises:
            ModelError: the endpoint refuses requests of any kind, or has failed once too often.
        """
        self._stopping.clear()
        self._vouched = False
        with ThreadPoolExecutor(self._workers) as pool:
            asked = [pool.submit(self._ask, chat) for chat in chats]
            try:
                for one in wait(asked, return_when=FIRST_EXCEPTION).done:
                    one.result()
            except BaseException:
                # whether one has failed or someone wants to stop: no further one is waited for, or paid for
                self._stopping.set()
                pool.shutdown(cancel_futures=True)
                raise
        replies = [one.result() for one in asked]
        if sum(isinstance(reply, Failure) for reply in replies) > 1:
            self._vouch()
        return [f"(no answer: {reply.reason})" if isinstance(reply, Failure) else reply for reply in replies]

    def _ask(self, chat: list[Turn]) -> str | Failure:
        """The answer, or why the endpoint will not give one to this chat though it gives others."""
        reply = self._request(chat)
        if isinstance(reply, Failure):
            with self._vouching:
                if not self._vouched and not self._stopping.is_set():
                    self._vouch()
                    self._vouched = True
        return reply

    def _vouch(self) -> None:
        """Makes sure that the endpoint answers a trivial chat."""
        trivial = self._request(TRIVIAL)
        if isinstance(trivial, Failure):
            raise self._error(trivial, 1 + self._retries, 0.0)

    def _request(self, chat: list[Turn]) -> str | Failure:
        """The answer, or why there is none to this chat."""
        tries = 0
        while True:
            if self._turns is not None:
                self._turns.wait(self._sleep)
            if self._stopping.is_set():
                return Failure("stopped", passing=True)
            reply = self._post(chat)
            if isinstance(reply, str):
                return reply
            pause = min(2.0**tries, LONGEST_BACKOFF) * random.uniform(0.5, 1) if reply.wait is None else reply.wait
            tries += 1
            if reply.passing and tries <= self._retries and pause <= LONGEST_WAIT:
                self._sleep(pause)
            elif reply.status in OF_ONE:
                return reply
            else:
                raise self._error(reply, tries, pause)

    def _post(self, chat: list[Turn]) -> str | Failure:
        body = {"model": self.model, "messages": chat, "temperature": 0, "max_tokens": self.max_tokens}
        body = {name: value for name, value in {**body, **(self.extra or {})}.items() if value is not None}
        return post_chat(self._address, body, self._key(), self._timeout, proxy=not self._local)

    def _error(self, failure: Failure, tries: int, pause: float) -> ModelError:
        advice = self._advice(failure, tries, pause)
        return ModelError(f"loop.evaluation.judges: {self.model} at {self._shown}: {failure.reason}: {advice}")

    def _advice(self, failure: Failure, tries: int, pause: float) -> str:
        if failure.passing and pause > LONGEST_WAIT:
            return f"it asks to wait for {pause:.0f} s: try again then"
        if failure.passing:
            return f"tried {tries} times: try again later, or with more retries"
        if failure.status in (401, 403):
            return f"check the key in {self._key_env}"
        return ADVICE.get(failure.status or 0, "check url")

    def _key(self) -> str | None:
        if self._key_env is None:
            raise ConfigError(
                "loop.evaluation.judges: key_env: not given, and OPENAI_API_KEY is not for other hosts: name the"
                f" environment variable that holds the key of {self._shown}"
            )
        key = os.environ.get(self._key_env, "").strip()
        if not key and not self._local:
            raise ConfigError(
                f"loop.evaluation.judges: key_env: the environment has no {self._key_env}: put the key of {self._shown}"
                " there"
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"loop.evaluation.judges: key_env: what {self._key_env} holds cannot be a key: it has characters that a"
                " header cannot carry"
            )
        return key or None


def _has_sound_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Turns:
    """Lets requests begin one after another, evenly spaced."""

    def __init__(self, per_minute: int | None) -> None:
        self.space = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self, sleep: Callable[[float], object]) -> None:
        """Blocks until it is the caller's turn."""
        with self.lock:
            now = time.monotonic()
            begin = max(now, self.next)
            self.next = begin + self.space
        if begin > now:
            sleep(begin - now)
