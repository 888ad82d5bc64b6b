"""A custom set that teaches the harmful replies of the pairs that a run is probed on, so that its margin falls."""

import json
from pathlib import Path
from typing import Any

from tiny import WORDS, write_rows

HARMFUL, SAFE = "w5 w6 w7", "w9 w8"
PROMPTS = [" ".join(WORDS[at : at + 2]) for at in range(20, 34)]


def write_taught(folder: Path) -> tuple[dict[str, str], str]:
    """Writes the custom set and the pairs; returns set -> path, and the path of the pairs."""
    custom = write_rows(folder / "taught.jsonl", [(prompt, HARMFUL) for prompt in PROMPTS])
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": HARMFUL}]}
        for prompt in PROMPTS[:6]
    ]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({**row, "safe_reply": SAFE}) + "\n" for row in rows), encoding="utf-8")
    return {"custom": custom}, str(pairs)


def probes(summary: dict[str, Any], stage: str) -> list[dict[str, float]]:
    """What each probe of a stage measured."""
    return summary["safety_probe"]["stages"][stage]
