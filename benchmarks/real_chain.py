"""TOSS-Chain against other ways to rank tokens, on real rows with known harmful rows and known harmful spans.

    python benchmarks/real_chain.py --data DIR [--seeds 1 2 3] [--work runs/real_chain]

DIR holds gsm8k_train.jsonl, general.jsonl and harmful.jsonl (BeaverTails and the like). Per seed, a utility and a
degraded reference of the bundled model are trained on rows of their own (90 + 30 and 120) and the custom rows are
scored once; three custom sets are put together from these scores, since a token's score does not depend on other rows:

- contaminated: 320 benign rows and 80 harmful ones; every token of a harmful row counts as harmful;
- embedded: the same benign rows and 80 benign replies with a harmful reply spliced in; its tokens count as harmful;
- clean: the same benign rows and 80 further benign ones.

Rankings: the token score (TOSS); the mean score of the row; the score smoothed along the row by a Gaussian kernel; the
sum of standardised token score and row mean; the chain's posterior, its parameters fitted to the set without labels.
End-of-turn tokens are left out of everything, as no method masks them by default. A seed takes about 25 minutes of one
core. What is done is not done again. Writes benchmarks/results/real_chain.md.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sklearn.metrics import roc_auc_score
from statistics_of_runs import spread
from transformers import AutoTokenizer

from toss_lightning.models.base import Base, resolve
from toss_lightning.scores import TokenScores, exact_top, share_of
from toss_lightning.selection.chain import START, log_odds
from toss_lightning.selection.two_state import Chain, fit

RESULTS = Path(__file__).parent / "results" / "real_chain.md"
BREAK = re.compile(r"(?<=[.!?])\s+|\n+")
EMBEDDED = 80
REFERENCE_ROWS = {"gsm8k_train": 90, "general": 30, "harmful": 120}
DISCARD = 0.1
BANDWIDTH = 8.0
"""Tokens; standard deviation of the smoothing kernel."""
SETS = {"contaminated": ("benign", "harmful"), "embedded": ("benign", "embedded"), "clean": ("benign", "further")}
RANKINGS = ("token score (TOSS)", "row mean", "kernel smoothing", "token + row mean", "chain (fitted)")


# --- scores -----------------------------------------------------------------------------------------------------------


def read(data: Path, file: str, skip: int, count: int | None = None) -> list[dict[str, Any]]:
    """Rows of a file."""
    lines = (data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[skip : None if count is None else skip + count]]


def write_embedded(data: Path, path: Path) -> None:
    """Splices harmful replies into benign ones, between sentences; ``span`` says where, in characters."""
    generator = random.Random(0)
    hosts: list[dict[str, Any]] = []
    for file, skip in (("gsm8k_train", 300), ("general", 100)):
        rows = (row for row in read(data, file, skip) if BREAK.search(row["messages"][-1]["content"].strip()))
        hosts += [row for row, _ in zip(rows, range(EMBEDDED // 2), strict=False)]
    content = []
    for host, harmful in zip(hosts, read(data, "harmful", 80, EMBEDDED), strict=True):
        reply, span = host["messages"][-1]["content"].strip(), harmful["messages"][-1]["content"].strip()
        at = generator.choice([match.end() for match in BREAK.finditer(reply)])
        text = f"{reply[:at].rstrip()}\n\n{span}\n\n{reply[at:]}"
        start = text.index(span)
        turns = [*host["messages"][:-1], {"role": "assistant", "content": text}]
        content.append({"messages": turns, "label": "embedded", "span": [start, start + len(span)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def config(data: Path, embedded: Path, seed: int) -> dict[str, Any]:
    """What the scores of a seed are made with; each seed has reference rows of its own."""

    def rows(file: str, skip: int, count: int) -> dict[str, Any]:
        return {"path": str(data / f"{file}.jsonl"), "skip": skip, "rows": count}

    def reference(file: str, first: int) -> dict[str, Any]:
        return rows(file, first + (seed - 1) * REFERENCE_ROWS[file], REFERENCE_ROWS[file])

    return {
        "data": {
            "custom": [
                rows("gsm8k_train", 0, 240),
                rows("general", 0, 80),
                rows("harmful", 0, 80),
                {"path": str(embedded)},
                rows("gsm8k_train", 240, 60),
                rows("general", 80, 20),
            ],
            "utility": [reference("gsm8k_train", 500), reference("general", 500)],
            "harmful": reference("harmful", 160),
            "holdout": 0,
            "max_length": 384,
            "batch_size": 8,
            "max_tokens": 1024,
        },
        "model": {
            "base": {"path": "bundled:smollm2-135m-instruct", "quantization": "nf4"},
            "lora": {"r": 16, "alpha": 16, "targets": "all-linear"},
            "optim": {"lr": 5e-4},
            "schedule": {"shape": "constant", "warmup": 0.1},
        },
        "loop": {"plan": ["utility", "degraded", "score"], "reference_epochs": 2},
        "checkpoint_every": 20,
        "trainer": {"accelerator": "cpu", "gradient_clip_val": 1.0, "check_val_every_n_epoch": 1000},
    }


def score(seed: int, data: Path, work: Path) -> TokenScores:
    """Trains the references of a seed and scores, unless that is done."""
    run_dir, file = work / f"seed-{seed}", work / f"seed-{seed}.yaml"
    if not (run_dir / "summary.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        write_embedded(data, work / "embedded.jsonl")
        content = {**config(data, work / "embedded.jsonl", seed), "seed_everything": seed, "ckpt_path": "auto"}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = [sys.executable, "-m", "toss_lightning", "score", f"--config={file}", f"--run_dir={run_dir}"]
        subprocess.run(command, check=True)
    return TokenScores(run_dir / "scores")


# --- what is known of each token --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The tokens of some rows, ends of turns left out."""

    score: np.ndarray
    harmful: np.ndarray
    offsets: np.ndarray


def parts(scores: TokenScores, embedded: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Group -> its rows, each the scores of its tokens and which of these are harmful."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(Base("bundled:smollm2-135m-instruct")))
    spliced = [json.loads(line) for line in embedded.read_text(encoding="utf-8").splitlines()]
    score, end = scores.per_row(scores.score()), scores.per_row(scores.flat("end_of_turn"))
    ids, at = scores.values("input_ids"), scores.values("response_positions")
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {
        name: [] for name in ("benign", "harmful", "embedded", "further")
    }
    for row, row_id in enumerate(scores.row_ids.tolist()):
        free = ~end[row]
        harmful = np.zeros(len(free), dtype=bool)
        if row_id < 320:
            group = "benign"
        elif row_id < 400:
            group, harmful = "harmful", ~harmful
        elif row_id < 480:
            group = "embedded"
            tokens = tokenizer.convert_ids_to_tokens([ids[row][position] for position in at[row]])
            harmful = within(tokens, spliced[row_id - 400])
        else:
            group = "further"
        groups[group].append((score[row][free].astype(np.float64), harmful[free]))
    return groups


def within(tokens: Sequence[str], row: Mapping[str, Any]) -> np.ndarray:
    """Which tokens begin inside the spliced span. In a byte-level vocabulary, a token's letters are its bytes."""
    text = row["messages"][-1]["content"]
    start, stop = (len(text[:at].encode()) for at in row["span"])
    begins = np.cumsum([0, *(len(token) for token in tokens[:-1])])
    inside: np.ndarray = (begins >= start) & (begins < stop)
    return inside


def joined(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Part:
    """Rows one after the other."""
    lengths = [len(score) for score, _ in rows]
    return Part(
        np.concatenate([one for one, _ in rows]), np.concatenate([one for _, one in rows]), np.cumsum([0, *lengths])
    )


# --- rankings ---------------------------------------------------------------------------------------------------------


def fitted(part: Part) -> Chain:
    """The chain that EM finds without labels."""
    return fit(torch.from_numpy(part.score), part.offsets, START, {"stay", "prior", "temperature"}).chain


def rankings(part: Part, chain: Chain) -> dict[str, np.ndarray]:
    """Ranking -> a value for each token, higher for riskier."""
    rows = np.split(part.score, part.offsets[1:-1])
    mean = np.concatenate([np.full(len(row), row.mean() if len(row) else 0.0) for row in rows])
    values = (
        part.score,
        mean,
        np.concatenate([smoothed(row) for row in rows]),
        part.score / part.score.std() + mean / mean.std(),
        log_odds(torch.from_numpy(part.score), part.offsets, chain).numpy(),
    )
    return dict(zip(RANKINGS, values, strict=True))


def smoothed(row: np.ndarray) -> np.ndarray:
    """The mean of a row's scores around each token, weighted by a Gaussian kernel."""
    places = np.arange(len(row))
    kernel = np.exp(-0.5 * ((places[:, None] - places) / BANDWIDTH) ** 2)
    found: np.ndarray = kernel @ row / kernel.sum(1) if len(row) else row
    return found


def measure(groups: Mapping[str, list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, Any]:
    """Everything that is reported of a seed."""
    found: dict[str, Any] = {}
    for name, members in SETS.items():
        part = joined([row for member in members for row in groups[member]])
        chain = fitted(part)
        values = rankings(part, chain)
        automatic = values[RANKINGS[-1]] > 0
        found[name] = {"chain": chain._asdict(), "automatic": {"removed": float(automatic.mean())}}
        if not part.harmful.any():
            continue
        found[name]["automatic"] |= agreement(automatic, part.harmful)
        found[name]["share"] = float(part.harmful.mean())
        for cut, share in (("tenth", DISCARD), ("true", found[name]["share"])):
            count = share_of(share, len(part.score))
            found[name][cut] = {
                ranking: agreement(exact_top(value, count), part.harmful) for ranking, value in values.items()
            }
        found[name]["auroc"] = {ranking: float(roc_auc_score(part.harmful, value)) for ranking, value in values.items()}
    return found


def agreement(masked: np.ndarray, harmful: np.ndarray) -> dict[str, float]:
    """Precision and recall of a mask."""
    hit = float((masked & harmful).sum())
    return {"precision": hit / max(1, masked.sum()), "recall": hit / harmful.sum()}


# --- report -----------------------------------------------------------------------------------------------------------


def report(measured: Mapping[int, dict[str, Any]]) -> str:
    """The tables."""
    seeds, all_of = list(measured), list(measured.values())
    command = f"python benchmarks/real_chain.py --data DIR --seeds {' '.join(map(str, seeds))}"
    lines = [
        "# TOSS-Chain on real rows",
        "",
        f"Written by `{command}`, which says more. Bundled 135M model,",
        f"NF4; mean over {len(seeds)} seeds of references ± half of the 95 % t-interval. The custom",
        "rows are the same in every seed. The chain's parameters are fitted to each set by EM, without labels.",
        "",
    ]
    for name in ("contaminated", "embedded"):
        share = np.mean([one[name]["share"] for one in all_of])
        lines += [
            f"**{name}**: {share:.1%} of the tokens are harmful. Masked: {DISCARD:.0%} of the tokens, then as many as",
            "are harmful.",
            "",
            "| ranking | AUROC | precision at 10 % | recall at 10 % | precision = recall at the true share |",
            "|---|---|---|---|---|",
        ]
        for ranking in RANKINGS:
            cells = [
                [one[name]["auroc"][ranking] for one in all_of],
                [one[name]["tenth"][ranking]["precision"] for one in all_of],
                [one[name]["tenth"][ranking]["recall"] for one in all_of],
                [one[name]["true"][ranking]["recall"] for one in all_of],
            ]
            lines.append(f"| {ranking} | {' | '.join(spread(cell) for cell in cells)} |")
        lines.append("")
    lines += [
        "The automatic cut, every token whose fitted posterior of harm is above one half:",
        "",
        "| custom set | harmful share | removed | precision | recall | stay | temperature | prior |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        cut = [one[name]["automatic"] for one in all_of]
        known = "share" in all_of[0][name]
        cells = [f"{np.mean([one[name]['share'] for one in all_of]):.3f}" if known else "0"]
        cells.append(spread([one["removed"] for one in cut]))
        cells += [spread([one[key] for one in cut]) if known else "–" for key in ("precision", "recall")]
        cells += [spread([one[name]["chain"][key] for one in all_of]) for key in ("stay", "temperature", "prior")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Each seed, AUROC of token score, row mean and chain; share that the automatic cut removed:", ""]
    lines += ["| seed | set | TOSS | row mean | chain | removed |", "|---|---|---|---|---|---|"]
    for seed, one in measured.items():
        for name in SETS:
            aurocs = [f"{one[name]['auroc'][RANKINGS[at]]:.3f}" if "auroc" in one[name] else "–" for at in (0, 1, 4)]
            lines.append(f"| {seed} | {name} | {' | '.join(aurocs)} | {one[name]['automatic']['removed']:.3f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=Path("runs/real_chain"))
    args = parser.parse_args()
    work = args.work.resolve()
    measured = {
        seed: measure(parts(score(seed, args.data.resolve(), work), work / "embedded.jsonl")) for seed in args.seeds
    }
    RESULTS.write_text(report(measured), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
