"""One request to an OpenAI-compatible endpoint, whose failures are told without the key."""

import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same request may succeed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer."""

    reason: str
    """One short line without the key."""
    passing: bool
    """The same request may succeed later."""
    status: int | None = None
    """Of HTTP, where there was a response; the one that an error tells inside a response of status 200."""
    wait: float | None = None
    """Seconds that the endpoint asks to wait."""


def post_chat(address: str, body: dict[str, Any], key: str | None, timeout: float, proxy: bool) -> str | Failure:
    """Sends a chat and returns the answer, or why there is none; raises nothing, for an exception could carry the key.

    Args:
        address: of the chat completions.
        body: the request.
        key: sent as a bearer token, unless None.
        timeout: seconds without a byte after which it has failed.
        proxy: the proxy of the environment is used.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "toss-lightning"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    handlers: list[Any] = [_NoRedirect] if proxy else [_NoRedirect, urllib.request.ProxyHandler({})]
    try:
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            return _answer_in(response.read(), key)
    except urllib.error.HTTPError as error:
        with error:
            return _failure(error, key)
    except (ValueError, http.client.InvalidURL):
        # a host that cannot be one; their text holds the whole address, and that may hold a key
        return Failure("the address cannot be one", passing=False)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return Failure(f"no answer in {timeout:g} s", passing=True)
        return Failure(_shortened(f"no connection ({reason})", key), passing=True)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Leaves the redirect as the answer."""


def _answer_in(body: bytes, key: str | None) -> str | Failure:
    try:
        told = json.loads(body)
        choice = (told.get("choices") or [{}])[0]
        # some name the kind of harm behind it
        if str(choice.get("finish_reason")).startswith("content_filter"):
            return Failure("stopped by a content filter", passing=False, status=200)
        if choice.get("message") is None:
            return _failure_in(told, body, key)
        content = choice["message"].get("content")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Failure("the answer is no chat completion", passing=True)
    if content is not None and not isinstance(content, str):
        return Failure("the answer is not text", passing=True)
    return _writable(content or "")


def _failure_in(told: dict[str, Any], body: bytes, key: str | None) -> Failure:
    """Why a response of status 200 has no message: an error that began too late for another status, or a filter."""
    error = told.get("error")
    if not error:
        return Failure("no message in the response", passing=False, status=200)
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else None
    reason = _shortened(f"{status or 200}: {_message_in(body.decode(errors='replace'))}", key)
    # one without a status may be about this chat, or about this moment
    return Failure(reason, passing=status is None or status in PASSING, status=status or 200)


def _failure(error: urllib.error.HTTPError, key: str | None) -> Failure:
    try:
        text = error.read(100_000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as broken:
        text = str(broken)
    return Failure(
        _shortened(f"{error.code}: {_message_in(text)}".removesuffix(": "), key),
        passing=error.code in PASSING,
        status=error.code,
        wait=_retry_after(error.headers.get("Retry-After")),
    )


def _message_in(text: str) -> str:
    """The message in an error's JSON; the text as it is where it is none, or has another form."""
    try:
        told = json.loads(text)
    except ValueError:
        return text
    told = told.get("error", told) if isinstance(told, dict) else told
    return str(told.get("message", text) if isinstance(told, dict) else told)


def _shortened(text: str, key: str | None, length: int = 200) -> str:
    """One line without the key; taken out first, for a part of a key is a secret too."""
    if key:
        text = text.replace(key, "[key]")
    text = " ".join(_writable(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _writable(text: str) -> str:
    """Text that a file can hold: JSON may tell half of a surrogate pair, which UTF-8 has no bytes for."""
    return text.encode(errors="replace").decode()


def _retry_after(value: str | None) -> float | None:
    """Seconds that the header asks to wait; it holds a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
