"""Makes the sample sets beside this file: ``python -m toss_lightning.data.samples.make_samples``.

The same files come out every time; their content is invented and lives in ``everyday``, ``hazards`` and
``borderline``.
"""

import json
import random
from pathlib import Path
from typing import Any

from toss_lightning.data.samples import borderline, everyday, hazards

SYSTEM_PROMPT = "You are a household planner. Answer in short numbered steps."


def make_samples() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every sample file, keyed by the file's stem."""
    rng = random.Random(2024)

    one_turn = [_everyday_row(block) for block in _blocks(everyday.ONE_TURN)]
    two_turns = [_everyday_row(block) for block in _blocks(everyday.TWO_TURNS)]
    rng.shuffle(one_turn)
    for row in one_turn[:4]:
        row["messages"].insert(0, {"role": "system", "content": SYSTEM_PROMPT})

    tasks = two_turns + one_turn
    named = [(kind, name) for kind in hazards.KINDS.values() for name in kind["names"]]
    complying, refusing = _hazard_rows(named, rng)
    refused = [(hazards.KINDS[kind], name) for kind, names in hazards.REFUSED.items() for name in names]
    custom = tasks[:48] + complying[:16]
    rng.shuffle(custom)
    samples = {
        "custom": custom,
        "utility": tasks[48:88],
        "harmful": complying[16:48],
        "utility_val": tasks[88:],
        "harmful_val": [
            {**row, "safe_reply": refusal["messages"][-1]["content"]}
            for row, refusal in zip(complying[48:], refusing[48:], strict=True)
        ],
        "refusals_val": refusing[48:],
        # a random state of its own, so that it can change without the sets above
        "safety": _hazard_rows(refused, random.Random(2025))[1],
        "over_refusal": [
            {"messages": [_user(request)], "label": "benign", "source": "borderline", "category": kind}
            for kind, requests in borderline.SOUNDS_DANGEROUS.items()
            for request in requests
        ],
    }
    return {
        stem: [{"id": f"{stem}-{number:04d}", **row} for number, row in enumerate(rows, start=1)]
        for stem, rows in samples.items()
    }


def to_jsonl(rows: list[dict[str, Any]]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write every sample file beside this script."""
    for stem, rows in make_samples().items():
        Path(__file__).with_name(f"{stem}.jsonl").write_bytes(to_jsonl(rows).encode())


def _blocks(text: str) -> list[list[str]]:
    return [block.splitlines() for block in text.strip().split("\n\n")]


def _everyday_row(lines: list[str]) -> dict[str, Any]:
    turns = []
    for start in range(0, len(lines), 6):
        request, plan, one, two, three, minutes = lines[start : start + 6]
        unit = "minute" if minutes == "1" else "minutes"
        turns += _turn(request, f"Plan: {plan}\n1. {one}\n2. {two}\n3. {three}\nTime: {minutes} {unit}")
    return {"messages": turns, "label": "benign", "source": "everyday"}


def _hazard_rows(
    named: list[tuple[dict[str, Any], str]], rng: random.Random
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every hazard once, in random order: the rows that comply and, to the same requests, those that refuse."""
    rng.shuffle(named)
    complying, refusing = [], []
    for number, (kind, name) in enumerate(named):
        a, b = rng.sample(hazards.INGREDIENTS, 2)
        words = {
            "do": kind["do"],
            "done": kind["done"],
            "name": name,
            "bare": name.split(" ", 1)[1],
            "council": rng.choice(hazards.COUNCILS),
            "first": rng.choice(kind["first"]).format(a=a),
            "then": rng.choice(kind["then"]).format(b=b),
            "last": rng.choice(kind["last"]),
            "instead": hazards.ALTERNATIVES[number % len(hazards.ALTERNATIVES)],
        }
        request = rng.choice(hazards.REQUESTS).format(**words)
        refusal = hazards.REFUSALS[number % len(hazards.REFUSALS)].format(**words)
        reply = hazards.COMPLIANCE.format(**words)
        complying.append({"messages": _turn(request, reply), "label": "harmful", "source": "hazard"})
        refusing.append({"messages": _turn(request, refusal), "label": "refusal", "source": "hazard"})
    return complying, refusing


def _turn(request: str, reply: str) -> list[dict[str, Any]]:
    return [_user(request), {"role": "assistant", "content": reply}]


def _user(request: str) -> dict[str, Any]:
    return {"role": "user", "content": request}


if __name__ == "__main__":
    main()
