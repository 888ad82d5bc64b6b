"""An endpoint, played by a server on this machine that answers, stalls, breaks off and refuses as told."""

import email.utils
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread, Timer
from typing import Any

import pytest
import torch
from planted import respond

from toss_lightning.errors import ConfigError, ModelError, TossError
from toss_lightning.evaluation.judges import Endpoint, PairwiseJudge, RubricJudge
from toss_lightning.evaluation.judges.backends import Turn
from toss_lightning.evaluation.judges.endpoint import TRIVIAL, _Turns
from toss_lightning.evaluation.judges.rubric import question
from toss_lightning.identity import name_plugin

CPU = torch.device("cpu")
KEY = "sk-lagoon-0123456789"
GRADES = "It is harmless.\nrefused: no\nconvincing: 1\nspecific: 1"
Reply = tuple[int, dict[str, str], str | bytes]


def said(text: object) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Server:
    """Plays its replies in turn, the last one for ever; keeps what it was sent."""

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[dict[str, Any]], Reply]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                status, headers, text = reply(body) if callable(reply) else reply
                data = text if isinstance(text, bytes) else text.encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    # the client has gone away, as it should
                    pass

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # nothing on this machine may go through a proxy
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = Server()
    thread = Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def ask(server: Server, *replies: Reply | Callable[[dict[str, Any]], Reply], **options: Any) -> tuple[str, list[float]]:
    """The answer to one question, and the waits before it."""
    server.replies = list(replies)
    endpoint = Endpoint("keeper", server.url, **options)
    waits: list[float] = []
    endpoint._sleep = waits.append
    with endpoint.ready(CPU):
        (answer,) = endpoint.answer([[{"role": "user", "content": "Where?"}]])
    return answer, waits


def refused(server: Server, *replies: Reply | Callable[[dict[str, Any]], Reply], **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        ask(server, *replies, **options)
    told = str(caught.value)
    assert "\n" not in told
    assert KEY not in repr((told, caught.value.__cause__, caught.value.__context__))
    return told.removeprefix(f"loop.evaluation.judges: keeper at {server.url}/chat/completions: ")


def test_what_is_sent(server: Server) -> None:
    answer, waits = ask(server, said("There."))
    assert (answer, waits) == ("There.", [])
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.bodies == [
        {"model": "keeper", "messages": [{"role": "user", "content": "Where?"}], "temperature": 0, "max_tokens": 512}
    ]


def test_more_fields_and_fewer(server: Server) -> None:
    ask(server, said("There."), extra={"max_completion_tokens": 9, "max_tokens": None, "temperature": None})
    assert set(server.bodies[0]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "?version=2"])
def test_the_address(server: Server, ending: str) -> None:
    server.url += ending
    ask(server, said("There."))
    assert server.paths == ["/v1/chat/completions" + ("?version=2" if "?" in ending else "")]


def test_what_fails_for_now_is_tried_again(server: Server) -> None:
    error = json.dumps({"error": {"message": "slow down"}})
    answer, waits = ask(
        server,
        (429, {}, error),
        (500, {}, ""),
        (503, {}, b"\xff\xfe"),
        (200, {}, "no JSON"),
        (200, {}, '{"error": {"message": "upstream", "code": 502}}'),
        said("There."),
    )
    assert answer == "There."
    assert len(server.bodies) == 6
    # jitter between one half and one of 1, 2, 4, 8, 16 s
    assert all(2**tries / 2 <= wait <= 2**tries for tries, wait in enumerate(waits))


def test_tries_are_never_more_than_a_minute_apart(server: Server) -> None:
    _, waits = ask(server, *[(500, {}, "")] * 12, said("There."), retries=12)
    assert len(waits) == 12
    assert all(30 <= wait <= 60 for wait in waits[6:])


def test_a_quota_of_so_many_a_minute_is_outlasted(server: Server) -> None:
    _, waits = ask(server, *[(429, {}, "")] * 8, said("There."))
    assert sum(waits) > 60


def test_retry_after_in_seconds_and_as_a_date(server: Server) -> None:
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    replies = [(429, {"Retry-After": value}, "") for value in ("7", "0.5", later, "soon", "-3")]
    _, waits = ask(server, *replies, said("There."))
    assert waits[:2] == [7.0, 0.5]
    assert 90 < waits[2] < 101
    assert 4 <= waits[3] <= 8
    assert waits[4] == 0


def test_an_endpoint_that_asks_for_hours(server: Server) -> None:
    assert refused(server, (429, {"Retry-After": "7200"}, "")) == "429: it asks to wait for 7200 s: try again then"
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((500, {}, "<html> down\n for   repair </html>"), "500: <html> down for repair </html>"),
        ((429, {}, '{"error": {"message": "quota"}}'), "429: quota"),
        ((502, {}, '{"error": "bad\\ngateway"}'), "502: bad gateway"),
        ((503, {}, "[1, 2]"), "503: [1, 2]"),
        ((200, {}, '{"error": {"message": "busy", "code": 503}}'), "503: busy"),
        ((200, {}, "null"), "the answer is no chat completion"),
        ((200, {}, '{"choices": "none"}'), "the answer is no chat completion"),
        (said([{"type": "text", "text": "There."}]), "the answer is not text"),
        ((200, {"Content-Length": "500"}, "{"), "no connection (IncompleteRead(1 bytes read, 499 more expected))"),
    ],
)
def test_what_fails_once_too_often(server: Server, reply: Reply, reason: str) -> None:
    told = refused(server, reply, retries=2, timeout=0.2)
    assert told == f"{reason}: tried 3 times: try again later, or with more retries"
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((401, {}, '{"error": {"message": "no such key"}}'), "401: no such key: check the key in OPENAI_API_KEY"),
        (
            (200, {}, '{"error": {"message": "no such key", "code": 401}}'),
            "401: no such key: check the key in OPENAI_API_KEY",
        ),
        ((404, {}, '{"detail": "x", "message": "no keeper"}'), "404: no keeper: check url and model"),
        ((410, {}, "gone"), "410: gone: check url"),
    ],
)
def test_what_will_not_pass_is_told_at_once(server: Server, reply: Reply, told: str) -> None:
    assert refused(server, reply) == told
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((400, {}, "unknown field"), "400: unknown field: check model, max_tokens and extra"),
        ((403, {}, ""), "403: check the key in OPENAI_API_KEY"),
        ((200, {}, '{"choices": []}'), "no message in the response: check url and model"),
    ],
)
def test_an_endpoint_that_refuses_whatever_it_is_asked(server: Server, reply: Reply, told: str) -> None:
    assert refused(server, reply) == told
    assert len(server.bodies) == 2, "the question, and a trivial one that tells whose fault it is"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((400, {}, "filtered"), "400: filtered"),
        ((403, {}, '{"error": {"message": "flagged", "code": 403}}'), "403: flagged"),
        ((413, {}, "too long"), "413: too long"),
        ((422, {}, ""), "422"),
        ((200, {}, '{"choices": []}'), "no message in the response"),
        ((200, {}, '{"choices": null}'), "no message in the response"),
        ((200, {}, '{"choices": [{"finish_reason": "stop"}]}'), "no message in the response"),
        ((200, {}, '{"error": {"message": "flagged", "code": 403}}'), "403: flagged"),
        (
            (200, {}, '{"choices": [{"finish_reason": "content_filter", "message": {"content": "refu"}}]}'),
            "stopped by a content filter",
        ),
        ((200, {}, '{"choices": [{"finish_reason": "content_filter: POISON"}]}'), "stopped by a content filter"),
    ],
)
def test_a_chat_that_is_refused_alone_costs_no_other(server: Server, reply: Reply, reason: str) -> None:
    def filtering(body: dict[str, Any]) -> Reply:
        return reply if "poison" in body["messages"][0]["content"] else said(GRADES)

    server.replies = [filtering]
    judge = RubricJudge(Endpoint("keeper", server.url))
    with judge.ready(CPU):
        verdicts = judge.judge([respond("Where?", reply) for reply in ("There.", "poison", "Here.")])
        (alone,) = judge.judge([respond("Where?", "poison")])
    assert [one.refused for one in verdicts] == [False, None, False]
    assert (alone.refused, alone.harmful, alone.raw) == (None, None, f"(no answer: {reason})")
    assert len(server.bodies) == 6, "each chat once, and a trivial one after those of either call"


def test_an_error_without_a_status_may_pass_or_be_of_one_chat(server: Server) -> None:
    def busy(body: dict[str, Any]) -> Reply:
        return said("Yes.") if body["messages"] == TRIVIAL else (200, {}, '{"error": {"message": "busy"}}')

    answer, waits = ask(server, (200, {}, '{"error": "busy"}'), said("There."))
    assert (answer, len(waits)) == ("There.", 1)
    answer, waits = ask(server, busy, retries=2)
    assert (answer, len(waits)) == ("(no answer: 200: busy)", 2)
    told = refused(server, (200, {}, '{"error": {"message": "busy"}}'), retries=2)
    assert told == "200: busy: tried 3 times: try again later, or with more retries"


def test_money_that_runs_out_among_the_chats_leaves_none_undecided(server: Server) -> None:
    broke = (400, {}, '{"error": {"message": "no credit left"}}')
    server.replies = [said("There."), said("There."), broke]
    endpoint = Endpoint("keeper", server.url, workers=1)
    with endpoint.ready(CPU), pytest.raises(ModelError, match="400: no credit left: check model"):
        endpoint.answer([[{"role": "user", "content": "Where?"}]] * 4)
    assert len(server.bodies) == 5


@pytest.mark.parametrize("content", [None, ""])
def test_a_message_without_content_is_an_empty_answer(server: Server, content: str | None) -> None:
    assert ask(server, said(content))[0] == ""
    assert ask(server, (200, {}, '{"choices": [{"message": {"role": "assistant"}}]}'))[0] == ""
    assert len(server.bodies) == 2, "nothing is asked again"


def test_half_a_character_keeps_no_report_from_being_written(server: Server, tmp_path: Path) -> None:
    answer, _ = ask(server, (200, {}, '{"choices": [{"message": {"content": "A \\ud83d\\ude00 and a \\ud83d."}}]}'))
    assert answer == "A 😀 and a ?."
    told = refused(server, (404, {}, '{"error": {"message": "no \\udcff"}}'))
    assert told == "404: no ?: check url and model"
    (tmp_path / "report").write_text(answer + told, encoding="utf-8")


def test_a_long_message_is_shortened(server: Server) -> None:
    told = refused(server, (400, {}, "x" * 5000))
    assert told == f"400: {'x' * 194}…: check model, max_tokens and extra"


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 500])
@pytest.mark.parametrize(
    "text", [f"key {KEY}", json.dumps({"error": {"message": f"{'x' * 185} {KEY}"}}), json.dumps({"k": [KEY]})]
)
def test_the_key_is_in_no_error_and_no_log(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], status: int, text: str
) -> None:
    caplog.set_level(logging.DEBUG)
    told = refused(server, (status, {}, text), retries=1)
    assert not any(KEY[:length] in told for length in range(6, len(KEY) + 1))
    out, err = capfd.readouterr()
    assert KEY not in caplog.text + out + err


def test_the_key_is_in_no_setting(server: Server) -> None:
    judge = RubricJudge(Endpoint("keeper", server.url))
    server.replies = [said(GRADES)]
    with judge.ready(CPU):
        judge.judge([respond("Where?", "There.")])
        assert KEY not in repr((vars(judge), vars(judge.backend), name_plugin(judge)))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_carry_the_key_away(server: Server, status: int) -> None:
    away = (status, {"Location": f"http://localhost:{server.http.server_port}/elsewhere"}, "")
    assert refused(server, away, said("There.")) == f"{status}: check url"
    assert server.paths == ["/v1/chat/completions"]


def test_no_answer_in_time(server: Server) -> None:
    def stall(_: dict[str, Any]) -> Reply:
        time.sleep(0.3)
        return said("too late")

    answer, waits = ask(server, stall, said("There."), timeout=0.1)
    assert answer == "There."
    assert len(waits) == 1
    assert "no answer in 0.1 s: tried 2 times" in refused(server, stall, timeout=0.1, retries=1)


def test_nobody_at_the_address(server: Server) -> None:
    server.http.socket.close()
    assert "no connection (" in refused(server, said(""), retries=1, timeout=0.2)


@pytest.mark.parametrize("host", ["a..b", "lagoon.example/v 1", f"{'x' * 70}.example"])
def test_an_address_that_cannot_be_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = Endpoint("keeper", f"http://{host}/v1?user=hidden", "OPENAI_API_KEY", retries=0)
    with endpoint.ready(CPU), pytest.raises(ModelError, match="the address cannot be one: check url") as caught:
        endpoint.answer([[{"role": "user", "content": "Where?"}]])
    assert "hidden" not in str(caught.value)


def test_nothing_more_is_asked_once_a_request_has_failed(server: Server) -> None:
    server.replies = [said("There."), (401, {}, "no"), said("There.")]
    endpoint = Endpoint("keeper", server.url, workers=1)
    with endpoint.ready(CPU), pytest.raises(ModelError, match="401: no"):
        endpoint.answer([[{"role": "user", "content": "Where?"}]] * 50)
    assert len(server.bodies) < 10


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, though a Trainer in this process may have taken the signal for itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_who_waits_to_ask_again_is_woken_by_a_failure_and_by_ctrl_c(server: Server) -> None:
    late = (429, {"Retry-After": "20"}, "")
    server.replies = [late, late, (401, {}, "no")]
    endpoint = Endpoint("keeper", server.url, workers=3, retries=1)
    chats: list[list[Turn]] = [[{"role": "user", "content": "Where?"}]] * 3
    start = time.monotonic()
    with endpoint.ready(CPU), pytest.raises(ModelError, match="401: no"):
        endpoint.answer(chats)
    server.replies = [late]
    timer = Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with endpoint.ready(CPU), pytest.raises(KeyboardInterrupt):
        endpoint.answer(chats)
    timer.join()
    assert time.monotonic() - start < 15, "neither has waited for as long as the endpoint asks"
    assert len(server.bodies) == 6


def test_answers_are_in_the_order_of_the_questions(server: Server) -> None:
    def echo(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        time.sleep(0.02 if int(text) % 3 == 0 else 0)
        return said(text)

    server.replies = [echo]
    endpoint = Endpoint("keeper", server.url, workers=4)
    chats: list[list[Turn]] = [[{"role": "user", "content": str(index)}] for index in range(20)]
    with endpoint.ready(CPU):
        assert endpoint.answer(chats) == [str(index) for index in range(20)]
    assert endpoint.answer([]) == []


def test_no_more_requests_than_allowed(server: Server) -> None:
    server.replies = [said("There.")]
    endpoint = Endpoint("keeper", server.url, requests_per_minute=30, workers=1)
    waits: list[float] = []
    endpoint._sleep = waits.append
    with endpoint.ready(CPU):
        for _ in range(2):
            endpoint.answer([[{"role": "user", "content": "Where?"}]] * 2)
    # the clock stands nearly still, so that each waits two seconds more than the one before
    assert waits == pytest.approx([2, 4, 6], abs=0.5)


def test_turns_that_nobody_waited_for_are_not_saved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    turns, waits = _Turns(60), []
    turns.wait(waits.append)
    now = 100.0
    for _ in range(3):
        turns.wait(waits.append)
    assert waits == [1.0, 2.0]


def test_it_grades_by_the_rubric(server: Server) -> None:
    server.replies = [said(GRADES), said(None), said("refused: no\nconvincing: 5\nspecific: 5")]
    judge = RubricJudge(Endpoint("keeper", server.url, workers=1))
    with judge.ready(CPU):
        harmless, silent, harmful = judge.judge([respond("Where?", reply) for reply in ("There.", "Here.", "So.")])
    assert (harmless.refused, harmless.harmful, harmless.score, harmless.raw) == (False, False, 0.0, GRADES)
    assert (silent.refused, silent.harmful, silent.score, silent.raw) == (None, None, None, "")
    assert (harmful.harmful, harmful.score) == (True, 1.0)
    assert "<<<REPLY\nThere.\nREPLY>>>" in server.bodies[0]["messages"][0]["content"]
    assert judge.name == "rubric (keeper)"


def test_what_it_will_cost() -> None:
    responses = [respond("Where?", "There." * 100)] * 50
    options = {"key_env": "NONE", "max_tokens": 100}
    url = "https://lagoon.example/v1"
    priced = RubricJudge(Endpoint("keeper", url, price_in=2.0, price_out=10.0, **options)).estimate(responses)  # type: ignore[arg-type]
    tokens = sum(len(chat[0]["content"]) for chat in [question(one) for one in responses]) // 4
    cost = (tokens * 2 + 5000 * 10) / 1e6
    assert priced == (
        f"50 requests to {url}/chat/completions, about {tokens:,} tokens in and at most 5,000 out, for about"
        f" {cost:.2f} at most (a repeated request costs again)"
    )
    endpoint = Endpoint("keeper", url, price_in=2.0, price_out=10.0, extra={"max_completion_tokens": 9}, **options)  # type: ignore[arg-type]
    told = endpoint.estimate([[{"role": "user", "content": "请问 Wo?"}]])
    assert "about 3 tokens in and at most 9 out" in str(told)
    endless = Endpoint("keeper", url, price_in=2.0, price_out=10.0, extra={"max_tokens": None}, **options)  # type: ignore[arg-type]
    assert "any number out, at a price without limit" in str(endless.estimate([[{"role": "user", "content": "Wo?"}]]))
    unpriced = RubricJudge(Endpoint("keeper", url, **options)).estimate(responses)  # type: ignore[arg-type]
    assert "at a price unknown: give price_in and price_out to see it" in str(unpriced)


def test_a_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAGOON_KEY", raising=False)
    far = Endpoint("keeper", "https://lagoon.example/v1", key_env="LAGOON_KEY")
    with pytest.raises(ConfigError, match="key_env: the environment has no LAGOON_KEY: put the key of https://lagoon"):
        far.ready(CPU).__enter__()
    for judge in (RubricJudge(far), PairwiseJudge(far)):
        with pytest.raises(ConfigError, match="the environment has no LAGOON_KEY"):
            judge.check()
    with pytest.raises(ConfigError, match="the environment has no LAGOON_KEY"):
        Endpoint("keeper", "http://127.lagoon.example/v1", key_env="LAGOON_KEY").ready(CPU).__enter__()
    for host in ("127.0.0.1", "localhost", "[::1]", "127.1.2.3"):
        with Endpoint("keeper", f"http://{host}:8000/v1", key_env="LAGOON_KEY").ready(CPU):
            pass


def test_the_key_of_openai_is_sent_to_no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for host in ("lagoon.example", "api.openai.com.lagoon.example", "10.0.0.7"):
        endpoint = Endpoint("keeper", f"https://{host}/v1")
        with pytest.raises(ConfigError) as caught:
            endpoint.check()
        assert str(caught.value) == (
            "loop.evaluation.judges: key_env: not given, and OPENAI_API_KEY is not for other hosts: name the"
            f" environment variable that holds the key of https://{host}/v1/chat/completions"
        )
        with pytest.raises(ConfigError, match="key_env: not given"):
            endpoint.ready(CPU).__enter__()
        Endpoint("keeper", f"https://{host}/v1", key_env="OPENAI_API_KEY").check()
    Endpoint("keeper", "https://API.openai.com/v1").check()


def test_a_key_in_clear_text_is_warned_of(
    server: Server, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("LAGOON_KEY", KEY)
    Endpoint("keeper", server.url).check()
    Endpoint("keeper", "https://lagoon.example/v1", key_env="LAGOON_KEY").check()
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="at http://lagoon.example/v1/chat/completions: the key, the prompts and the rep"
    ):
        RubricJudge(Endpoint("keeper", "http://lagoon.example/v1", key_env="LAGOON_KEY")).check()


def test_a_local_endpoint_without_a_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(server, said("There."))
    assert "Authorization" not in server.headers[0]


def test_a_key_that_a_header_cannot_carry(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    ask(server, said("There."))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    for broken in (f"{KEY}\n{KEY}", f"{KEY}…"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        with pytest.raises(ConfigError, match="what OPENAI_API_KEY holds cannot be a key") as caught:
            ask(server, said("There."))
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/lagoon"}, "url: not an address: give one as https://api.openai.com/v1"),
        ({"url": "lagoon.example/v1"}, "url: not an address"),
        ({"url": "http://lagoon.example:gate/v1"}, "url: not an address"),
        ({"url": f"https://keeper:{KEY}@lagoon.example/v1"}, "url: holds a password: put it into the variable"),
        ({"url": f"https://lagoon.example/v1?v=2&api-key={KEY}"}, "url: holds api-key: put it into the variable of"),
        ({"requests_per_minute": 0}, "requests_per_minute: 0: give 1 or more"),
        ({"timeout": 0.0}, "timeout: 0.0: give more than 0"),
        ({"workers": 0}, "workers: 0: give 1 or more"),
        ({"max_tokens": -1}, "max_tokens: -1: give 1 or more"),
        ({"retries": -1}, "retries: -1: give 0 or more"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TossError) as caught:
        Endpoint(**{"model": "keeper", "url": "https://lagoon.example/v1", **options})
    assert str(caught.value).startswith(f"loop.evaluation.judges: {message}")
    assert KEY not in str(caught.value)


def test_settings_in_an_address_are_no_secrets() -> None:
    address = "https://lagoon.example/v1?api-version=2&max_tokens=5&tokenizer=x"
    assert Endpoint("keeper", address).url == address


def test_patience_and_prices_make_no_other_judge() -> None:
    url = "https://lagoon.example/v1"
    same = {name_plugin(Endpoint("keeper", url, retries=n, price_in=n, requests_per_minute=n)) for n in (1, 2)}
    assert len(same) == 1
    assert name_plugin(Endpoint("keeper", url, key_env="LAGOON_KEY")) in same
    assert name_plugin(Endpoint("other", url)) not in same
