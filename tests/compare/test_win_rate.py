"""Win rates from replies on disk, judged by an endpoint on this machine, against counts by hand."""

import json
import os
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from made_runs import finish, made, measure, write_comparison

from toss_lightning.cli import main
from toss_lightning.compare.win_rate import judge_win_rates, measure_win_rates
from toss_lightning.errors import StoreError
from toss_lightning.evaluation.judges import Endpoint
from toss_lightning.evaluation.statistics import t_interval

pytestmark = pytest.mark.usefixtures("somewhere")
METHODS = ("plain SFT", "A", "B")
PROMPTS = 12


class Longer:
    """Prefers the longer reply wherever it stands; out of form where one is ``odd``, and down when told to be."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers_left: int | None = None
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                down = judge.answers_left is not None and judge.asked >= judge.answers_left
                judge.asked += not down
                first, second = (re.search(rf"<<<REPLY {name}\n(.*)\nREPLY", text)[1] for name in "AB")
                better = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "tie"
                said = "Well." if "odd" in (first, second) else f"Because.\nbetter: {better}"
                data = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
                self.send_response(401 if down else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def judge() -> Iterator[Longer]:
    found = Longer()
    thread = Thread(target=found.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.http.shutdown()
    found.http.server_close()
    thread.join()


def reply(method: str, seed: int, at: int) -> str:
    """Lengths that a judge can tell, equal ones among them, and one to which it says nothing."""
    if (method, at) == ("B", 3):
        return "odd"
    return "x" * {"plain SFT": 5, "A": 4 + (at + seed) % 4, "B": 1 + at, "base": 6}[method]


def comparison(folder: Path, url: str, seeds: tuple[int, ...] = (1, 2), **win_rate: Any) -> Path:
    backend = {"class_path": "Endpoint", "init_args": {"model": "keeper", "url": url, "workers": 1}}
    named = {"class_path": "PairwiseJudge", "init_args": {"backend": backend}}
    path = write_comparison(folder, dict.fromkeys(METHODS), seeds=list(seeds), win_rate={"judge": named, **win_rate})
    asked = {"prompts": {"forbidden": "forbidden.jsonl", "task": "task.jsonl"}}
    (folder / "asked.yaml").write_text(yaml.safe_dump({"loop": {"evaluation": asked}}))
    return path


def leave_replies(path: Path, but: tuple[tuple[str, int], ...] = ()) -> None:
    for (method, seed), run in made(path)[1].items():
        if (method, seed) in but:
            continue
        finish(run, [measure("harmful compliance", [0.0] * PROMPTS, [1.0, 0.0] * (PROMPTS // 2))])
        lines = [
            {
                "adapter": adapter,
                "set": name,
                "prompt_id": str(at),
                "label": label,
                "category": None,
                # a reply may hold signs that are the end of a line for some
                "messages": [{"role": "user", "content": f"{name} {at}?\u2028"}],
                "response": reply(method if adapter == "target" else "base", seed, at),
                "tokens": 3,
                "stopped": True,
                "verdicts": {},
            }
            for adapter in ("base", "target")
            for name, label in (("forbidden", "harmful"), ("task", None))
            for at in range(PROMPTS)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        run.evaluation.with_name("responses.jsonl").write_text(text)


def by_hand(method: str, seed: int, opponent: str) -> list[float | None]:
    found: list[float | None] = []
    for at in range(PROMPTS):
        ours, theirs = reply(method, seed, at), reply(opponent, seed, at)
        difference = len(ours) - len(theirs)
        found.append(None if "odd" in (ours, theirs) else 1.0 if difference > 0 else 0.0 if difference else 0.5)
    return found


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "compare.json").read_text())
    return found


def rates(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in content(folder)["measures"] if one["name"].startswith("win rate")}


def test_win_rates_are_those_counted_by_hand(tmp_path, judge):
    path = comparison(tmp_path, judge.url)
    leave_replies(path)
    assert main(["compare", str(path)]) == 0
    found = rates(tmp_path)
    assert list(found) == ["win rate against plain SFT, forbidden", "win rate against plain SFT, task"]
    for name, one in found.items():
        assert (one["title"], one["better"], one["share"]) == (f"{name} (pairs (keeper))", "higher", True)
        assert one["is_utility"] == name.endswith("task")
        assert list(one["models"]) == [*METHODS]
        for method in ("A", "B"):
            means = []
            for seed in (1, 2):
                decided = [value for value in by_hand(method, seed, "plain SFT") if value is not None]
                means.append(sum(decided) / len(decided))
            assert one["models"][method]["value"] == pytest.approx(sum(means) / 2)
        assert one["models"]["B"]["undecided"] == 2
        assert one["models"]["plain SFT"]["value"] == 0.5
        pairs = {(pair["of"], pair["against"]): pair for pair in one["differences"]}
        assert pairs["A", "plain SFT"]["mean"] == pytest.approx(one["models"]["A"]["value"] - 0.5)
        assert "p" not in pairs["A", "base model"]
    page = (tmp_path / "run" / "compare.md").read_text()
    assert "win rate against plain SFT, forbidden (pairs (keeper)) ↑" in page
    assert "A against plain SFT: " in page


def test_the_base_may_be_the_opponent_and_sets_be_chosen(tmp_path, judge):
    path = comparison(tmp_path, judge.url, seeds=(1,), against="base", prompts="task")
    leave_replies(path)
    assert main(["compare", str(path)]) == 0
    (one,) = rates(tmp_path).values()
    assert one["name"] == "win rate against base model, task"
    assert list(one["models"]) == ["base model", *METHODS]
    for method in METHODS:
        decided = [value for value in by_hand(method, 1, "base") if value is not None]
        interval = t_interval(decided)
        model = one["models"][method]
        ends = (max(0.0, interval.low), min(1.0, interval.high))
        assert (model["value"], model["low"], model["high"]) == pytest.approx((interval.mean, *ends))
    assert one["models"]["base model"]["value"] == 0.5


def test_what_was_compared_is_not_asked_again_and_more_seeds_are(tmp_path, judge):
    path = comparison(tmp_path, judge.url, prompts=["forbidden"])
    second = tuple((method, 2) for method in METHODS)
    leave_replies(path, but=second)
    given, runs = made(path)

    def to_ask(*seeds: int) -> int:
        """Both orders of each pair that is not equal, and no pair twice."""
        unequal = {
            (reply(method, seed, at), reply("plain SFT", seed, at), at)
            for method in ("A", "B")
            for seed in seeds
            for at in range(PROMPTS)
            if reply(method, seed, at) != reply("plain SFT", seed, at)
        }
        return 2 * len(unequal)

    for _ in range(2):
        judge_win_rates(given, [*runs.values()])
        assert judge.asked == to_ask(1)
    (measured,), unjudged = measure_win_rates(given, [*runs.values()])
    assert unjudged == []
    assert measured.of["A"]["target"] == {1: by_hand("A", 1, "plain SFT")}
    leave_replies(path, but=tuple((method, 1) for method in METHODS))
    judge_win_rates(given, [*runs.values()])
    assert judge.asked == to_ask(1, 2)
    (measured,), _ = measure_win_rates(given, [*runs.values()])
    assert measured.of["A"]["target"] == {seed: by_hand("A", seed, "plain SFT") for seed in (1, 2)}


def test_a_judge_that_fails_costs_no_report_and_goes_on_where_it_was(tmp_path, judge, capsys):
    path = comparison(tmp_path, judge.url)
    leave_replies(path)
    judge.answers_left = 40
    assert main(["compare", str(path)]) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith(f"win_rate.judge: keeper at {judge.url}/chat/completions: 401")
    assert last.endswith("check the key in OPENAI_API_KEY; the same command goes on comparing replies")
    assert "Replies are still to be compared for the win rates of A, seed 1" in said.out
    assert content(tmp_path)["unjudged"] != []
    asked = judge.asked
    assert main(["compare", str(path), "--report"]) == 0
    assert judge.asked == asked
    judge.answers_left = None
    assert main(["compare", str(path)]) == 0
    assert content(tmp_path)["unjudged"] == []
    assert rates(tmp_path)["win rate against plain SFT, task"]["models"]["A"]["seeds"] == 2
    pairs = {(set_, reply(m, s, at), at) for set_ in "ft" for m in "AB" for s in (1, 2) for at in range(PROMPTS)}
    unequal = [pair for pair in pairs if pair[1] != "x" * 5]
    # what was under way when it failed was not filed
    assert 2 * len(unequal) <= judge.asked <= 2 * len(unequal) + 40


def test_a_backend_of_ones_own_that_breaks_costs_no_report_either(tmp_path, judge, capsys, monkeypatch):
    path = comparison(tmp_path, judge.url)
    leave_replies(path)
    monkeypatch.setattr(Endpoint, "answer", lambda self, chats: {}["no such key"])
    assert main(["compare", str(path)]) == 1
    said = capsys.readouterr()
    assert "win_rate.judge: KeyError: 'no such key'" in said.err.splitlines()[-1]
    assert content(tmp_path)["unjudged"] != []


def test_replies_to_other_prompts_are_not_compared(tmp_path, judge):
    path = comparison(tmp_path, judge.url, seeds=(1,))
    leave_replies(path)
    given, runs = made(path)
    file = runs["B", 1].evaluation.with_name("responses.jsonl")
    file.write_text(file.read_text().replace("task 4?", "task 5?"))
    with pytest.raises(StoreError, match="B, seed 1 and plain SFT were asked different prompts: delete the evaluation"):
        judge_win_rates(given, list(runs.values()))
    file.write_text("{")
    with pytest.raises(StoreError, match=r"responses.jsonl: damaged \(.*\): run toss test again"):
        judge_win_rates(given, list(runs.values()))


def test_without_a_judge_nobody_is_asked(tmp_path, judge):
    path = comparison(tmp_path, judge.url)
    text = yaml.safe_load(path.read_text())
    del text["win_rate"]
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    leave_replies(path)
    assert main(["compare", str(path)]) == 0
    assert judge.asked == 0
    assert rates(tmp_path) == {}


@pytest.mark.parametrize(
    ("win_rate", "said"),
    [
        (
            "PairwiseJudge",
            "{path}: win_rate: expected who compares the replies, such as {judge: {class_path: PairwiseJ",
        ),
        ({"judge": {}, "prompt": "task"}, "{path}: win_rate.prompt: no such key; did you mean prompts?"),
        ({"judge": {}, "against": "sft"}, "{path}: win_rate.against: 'sft': give baseline or base"),
        (
            {"judge": {}, "prompts": ["tsk"]},
            "{path}: win_rate.prompts: 'tsk' is none of its prompt sets; did you mean 't",
        ),
        (
            {"judge": {"class_path": "PairwisJudge"}},
            "win_rate: judge: no class PairwisJudge; did you mean PairwiseJudge?",
        ),
        (
            {"judge": {"class_path": "PairwiseJudge", "init_args": {"backend": {"class_path": "Endpont"}}}},
            "win_rate: judge.backend: no class Endpont; did you mean Endpoint?",
        ),
        (
            {
                "judge": {
                    "class_path": "PairwiseJudge",
                    "init_args": {"backend": {"class_path": "Endpoint", "init_args": {"model": "a", "url": "b"}}},
                }
            },
            "win_rate.judge: url: not an address: give one as https://",
        ),
    ],
)
def test_a_judge_that_cannot_work_is_one_line_before_anything_is_run(tmp_path, capsys, win_rate, said):
    path = comparison(tmp_path, "http://127.0.0.1:9/v1")
    text = yaml.safe_load(path.read_text()) | {"win_rate": win_rate}
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    assert main(["compare", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: " + said.replace("{path}", str(path)))
    assert not (tmp_path / "run").exists()


def test_a_judge_without_its_key_is_told_where_it_stands(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["compare", str(comparison(tmp_path, "https://api.openai.com/v1"))]) == 2
    assert "error: win_rate.judge: key_env: the environment has no OPENAI_API_KEY" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_judge_sees_the_gpus_of_the_comparison_alone(tmp_path, judge, monkeypatch):
    path = comparison(tmp_path, judge.url)
    leave_replies(path)
    seen: set[str | None] = set()

    def answer(self: Endpoint, chats: list[Any]) -> list[str]:
        seen.add(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return ["Because.\nbetter: A"] * len(chats)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(Endpoint, "answer", answer)
    assert main(["compare", str(path), "--gpus=[2, 3]"]) == 0
    assert seen == {"2"}


def test_an_evaluation_without_prompts_has_no_replies_to_compare(tmp_path, capsys):
    path = comparison(tmp_path, "http://127.0.0.1:9/v1")
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"loop": {"evaluation": {"pairs": "pairs.jsonl"}}}))
    assert main(["compare", str(path), "--dry_run"]) == 2
    assert "win_rate: the evaluation has no prompts, so there are no replies to compare" in capsys.readouterr().err
