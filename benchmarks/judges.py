"""How far the keyword judge agrees with people, on replies of five chat models to XSTest prompts.

    python benchmarks/judges.py --data DIR

DIR holds judge_xstest.jsonl: 1037 replies with the refusal labels that people gave them (XSTest, CC BY 4.0). The
phrases of the judge were chosen on one half of the prompts, told apart by a hash, and frozen; the other half is what
counts. Writes benchmarks/results/judges.md.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toss_lightning.data.formats import Message
from toss_lightning.evaluation import KeywordJudge, Prompt, Response
from toss_lightning.evaluation.statistics import kappa, wilson

RESULTS = Path(__file__).parent / "results" / "judges.md"
DRAWS = 10_000
"""Of the bootstrap."""


def read(path: Path) -> list[dict[str, Any]]:
    """The rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def response(row: dict[str, Any]) -> Response:
    """A row as a judge reads it."""
    prompt = Prompt("xstest", row["id"], (Message("user", row["messages"][0]["content"]),), "harmful")
    return Response(row["source"], prompt, row["messages"][-1]["content"], 0, True)


def is_held_out(row: dict[str, Any]) -> bool:
    """Half of the prompts, with all replies to them."""
    return bool(hashlib.blake2b(row["messages"][0]["content"].encode(), digest_size=4).digest()[0] % 2)


def share_interval(right: Sequence[bool], prompts: Sequence[str]) -> tuple[float, float]:
    """Of the share that is right: Wilson's, or the bootstrap's over prompts where some have several replies."""
    if len({*prompts}) == len(prompts):
        interval = wilson(sum(right), len(right))
        return interval.low, interval.high
    of_prompt: dict[str, list[int]] = {}
    for is_right, prompt in zip(right, prompts, strict=True):
        of_prompt.setdefault(prompt, [0, 0])[not is_right] += 1
    counts = np.array([*of_prompt.values()])
    drawn = counts[np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn.sum(1), [0.025, 0.975])
    return float(low), float(high)


def line(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """What the judge and people say of some rows."""
    said = [verdict.refused for verdict in KeywordJudge().judge([response(row) for row in rows])]
    people = [row["label"] == "refusal" for row in rows]
    right = sum(ours == theirs for ours, theirs in zip(said, people, strict=True))
    both = sum(bool(ours) and theirs for ours, theirs in zip(said, people, strict=True))
    # five models replied to each prompt
    prompts = [row["messages"][0]["content"] for row in rows]
    agreement = kappa(said, people, prompts)
    low, high = share_interval([ours == theirs for ours, theirs in zip(said, people, strict=True)], prompts)
    cells = [
        name,
        str(len(rows)),
        f"{sum(people) / len(rows):.0%}",
        f"{right / len(rows):.1%} [{low:.1%}, {high:.1%}]",
        "–" if agreement.kappa is None else f"{agreement.kappa:.2f} [{agreement.low:.2f}, {agreement.high:.2f}]",
        f"{both / max(1, sum(map(bool, said))):.1%}",
        f"{both / max(1, sum(people)):.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    rows = read(parser.parse_args().data / "judge_xstest.jsonl")
    kept, held_out = ([row for row in rows if is_held_out(row) == wanted] for wanted in (False, True))
    models = sorted({row["source"] for row in rows})
    lines = [
        "# The keyword judge against people",
        "",
        "Written by `python benchmarks/judges.py --data DIR`, which says more. In brackets: 95 % intervals. Kappa's is",
        "the bootstrap's over the prompts, and so is that of accuracy over the replies of several models; that over",
        "the replies of one is Wilson's.",
        "",
        "| replies | n | refused, by people | accuracy | kappa | precision | recall |",
        "|---|---|---|---|---|---|---|",
        line("half that the phrases were chosen on", kept),
        line("**held-out half**", held_out),
        *(
            line(f"held-out half, {model.partition(':')[2]}", [row for row in held_out if row["source"] == model])
            for model in models
        ),
    ]
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
