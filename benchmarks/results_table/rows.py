"""Which rows of the real data are used for what; no row, and no prompt, is used for two things."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DIGESTS = Path(__file__).parent / "data.sha256"
"""SHA-256 of each file of the data, as sha256sum --check reads it."""


@dataclass(frozen=True)
class Size:
    """How many rows each part of the experiment has."""

    custom: int = 128
    """Of the custom set, harmful ones included."""
    reference: int = 80
    """Of the utility reference's set and of the degraded reference's, in each seed."""
    safety: int = 64
    """Refusals for the methods that draw on some."""
    align: Mapping[str, int] | None = None
    """File -> rows that the base is aligned on; None leaves the base as it is."""
    pairs: int = 48
    """Harmful requests with two replies, of the validation split and of the test split."""
    task: int = 48
    """Held-out rows of the task, of either split."""
    risky_task: int = 32
    """Held-out rows among those that are harmless and erode safety; the others make a custom set."""
    prompts: int = 32
    """Of each set of the test split, at most."""
    validation_prompts: int = 64
    """Of the validation split."""


SIZES = {
    "trial": Size(24, reference=16, safety=12, pairs=8, task=8, risky_task=8, prompts=8, validation_prompts=8),
    "small": Size(custom=64, reference=40, safety=32, pairs=24, task=24, risky_task=16),
    "medium": Size(),
    # about all of the harmful rows that there are
    "large": Size(custom=480, safety=240, task=96, prompts=96),
}
"""What shows that every part runs, and no more; what fits a laptop with a larger base; a laptop; a GPU."""
ALIGNMENT = {"refusals": 160, "harmful": 120, "gsm8k_train": 100, "general": 320}
"""Of ``harmful`` the safe replies."""
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Harmful rows among the custom ones."""
SHARE = 0.2
TASK = 0.75
"""Of the benign rows, those of gsm8k; the others are general instructions."""


def write_rows(data: Path, to: Path, size: Size, seeds: Sequence[int]) -> None:
    """Deals the rows out into files. Those of a seed do not depend on which other seeds are asked for.

    Raises:
        SystemExit: the data has too few rows for this size.
    """
    to.mkdir(parents=True, exist_ok=True)
    decks = {name: _Deck(data / f"{name}.jsonl") for name in ("gsm8k_train", "general", "harmful", "refusals")}

    def benign(count: int) -> list[Row]:
        task = round(TASK * count)
        return [*decks["gsm8k_train"].deal(task), *decks["general"].deal(count - task)]

    aligned = {name: decks[name].deal(count) for name, count in (size.align or {}).items()}
    aligned["harmful"] = [_safe(row) for row in aligned.get("harmful", [])]
    _write(to / "align.jsonl", [row for rows in aligned.values() for row in rows])
    _write(to / "safety.jsonl", decks["refusals"].deal(size.safety))
    splits = {split: decks["harmful"].deal(size.pairs) for split in ("validation", "test")}
    for split, rows in splits.items():
        _write(to / f"pairs_{split}.jsonl", rows)
        # the test split takes gsm8k's own; both take general rows that nothing else is trained on
        task = round(TASK * size.task)
        deck = decks["gsm8k_train"] if split == "validation" else _Deck(data / "gsm8k_test.jsonl")
        _write(to / f"task_{split}.jsonl", [*deck.deal(task), *decks["general"].deal(size.task - task)])
    most = round(max(SHARES) * size.custom)
    harmful, clean = decks["harmful"].deal(most), _interleaved(benign(size.custom))
    for share in SHARES:
        count = round(share * size.custom)
        _write(to / f"custom_{share:g}.jsonl", [*clean[: size.custom - count], *harmful[:count]])
    _write(to / "custom_clean.jsonl", clean[: size.custom - round(SHARE * size.custom)])
    risky = _Deck(data / "benign_risky.jsonl")
    _write(to / "task_risky.jsonl", risky.deal(size.risky_task))
    _write(to / "custom_risky.jsonl", risky.deal(size.custom, at_most=True))
    for seed in range(1, max(seeds) + 1):
        _write(to / f"utility_{seed}.jsonl", benign(size.reference))
        _write(to / f"harmful_{seed}.jsonl", decks["harmful"].deal(size.reference))


def write_prompts(data: Path, to: Path) -> None:
    """Prompts without replies: of XSTest those that only sound dangerous, of HarmBench those that only mean harm.

    HarmBench also asks for song texts, and about texts that do not stand in its prompts.
    """
    for name in ("beavertails", "advbench"):
        _write(to / f"prompts_{name}.jsonl", _read(data / f"prompts_{name}.jsonl"))
    benign = [row for row in _read(data / "prompts_xstest.jsonl") if row["label"] == "benign"]
    _write(to / "xstest_benign.jsonl", benign)
    standard = [row for row in _read(data / "prompts_harmbench.jsonl") if row["kind"] == "standard"]
    _write(to / "harmbench_standard.jsonl", standard)


def check_apart(rows: Path) -> None:
    """Checks that no prompt stands in files of two purposes.

    Raises:
        SystemExit: one does, with the files and where it stands in them.
    """
    purposes: dict[str, tuple[str, str]] = {}
    for file in sorted(rows.glob("*.jsonl")):
        # custom sets of one experiment hold the same rows, of which another share is harmful
        purpose = "custom" if file.stem.startswith("custom") and file.stem != "custom_risky" else file.stem
        for number, row in enumerate(_read(file), 1):
            asked = " ".join(row["messages"][0]["content"].lower().split())
            before, where = purposes.setdefault(asked, (purpose, f"{file.name}:{number}"))
            if before != purpose:
                raise SystemExit(f"{where} and {file.name}:{number} ask the same: one row for two purposes")


def differing(data: Path) -> list[str]:
    """Files of the data that are not those which the committed pages were made from."""
    known = [line.split() for line in DIGESTS.read_text(encoding="utf-8").splitlines()]
    found = ((name, digest, data / name) for digest, name in known)
    return [name for name, digest, file in found if file.exists() and sha256(file.read_bytes()).hexdigest() != digest]


def count_rows(file: Path) -> int:
    """Rows of a file."""
    return len(_read(file))


class _Deck:
    """Rows of a file in an order that is drawn once and stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = _read(path)
        random.Random(path.stem).shuffle(rows)
        self._rows: Iterator[Row] = iter(rows)

    def deal(self, count: int, at_most: bool = False) -> list[Row]:
        """The next rows, which no one else gets."""
        dealt = list(islice(self._rows, count))
        if len(dealt) < count and not at_most:
            raise SystemExit(f"{self.path}: too few rows: {count - len(dealt)} more are needed")
        return dealt


def _safe(row: Row) -> Row:
    return {**row, "messages": [row["messages"][0], {"role": "assistant", "content": row["safe_reply"]}]}


def _interleaved(rows: list[Row]) -> list[Row]:
    """In a drawn order, so that every beginning of the list holds all kinds."""
    return random.Random(0).sample(rows, len(rows))


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
