"""What a shift of all scores does to TOSS-Chain's automatic cut, with its centre at 0 and with a fitted one.

    python benchmarks/chain_shift.py [--seeds 1 2 3]

Synthetic scores: 400 rows of 60 tokens, Laplace noise of scale 1 around -0.5, and around +0.5 in the harmful tokens,
runs of 20 in a fifth of the rows. Rows differ besides by a normal amount of the given standard deviation, as the topics
of real rows do. A shift stands for one reference being the better language model of the two whatever a text says. The
chain's other parameters are fitted by EM. Writes benchmarks/results/chain_shift.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from statistics_of_runs import spread

from toss_lightning.selection.chain import START, log_odds
from toss_lightning.selection.two_state import fit

RESULTS = Path(__file__).parent / "results" / "chain_shift.md"
ROWS, LENGTH, RUN, GAP = 400, 60, 20, 0.5
SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
CONTAMINATED = 0.2
FREE = {"stay", "prior", "temperature"}

Facts = dict[str, float]


def made(seed: int, contaminated: float, topics: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores, rows one after the other, and which of them are harmful."""
    generator = np.random.default_rng(seed)
    harmful = np.zeros((ROWS, LENGTH), dtype=bool)
    for row in np.flatnonzero(generator.random(ROWS) < contaminated):
        start = generator.integers(0, LENGTH - RUN)
        harmful[row, start : start + RUN] = True
    scores = np.where(harmful, GAP, -GAP) + generator.laplace(0, 1, harmful.shape)
    return (scores + generator.normal(0, topics, (ROWS, 1))).ravel(), harmful.ravel()


def cut(scores: np.ndarray, harmful: np.ndarray, centre: str) -> Facts:
    """What the automatic cut does."""
    values, offsets = torch.from_numpy(scores), np.arange(ROWS + 1) * LENGTH
    if centre == "fit":
        found = fit(values, offsets, START._replace(centre=float(values.mean())), FREE | {"centre"})
    else:
        found = fit(values, offsets, START, FREE)
    masked = log_odds(values, offsets, found.chain).numpy() > 0
    hit = float((masked & harmful).sum())
    return {
        "removed": float(masked.mean()),
        "precision": hit / max(1, masked.sum()),
        "recall": hit / max(1, harmful.sum()),
    }


def table(contaminated: float, topics: float, seeds: Sequence[int]) -> list[str]:
    """A line for each shift and centre."""
    lines = ["| shift, nats | centre | removed | precision | recall |", "|---|---|---|---|---|"]
    for shift in SHIFTS:
        for centre in ("0", "fit"):
            found = []
            for seed in seeds:
                scores, harmful = made(seed, contaminated, topics)
                found.append(cut(scores + shift, harmful, centre))
            cells = [spread([one["removed"] for one in found])]
            cells += [spread([one[key] for one in found]) if contaminated else "–" for key in ("precision", "recall")]
            lines.append(f"| {shift:+g} | {centre} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    lines = [
        "# A shift of all scores, and TOSS-Chain's automatic cut",
        "",
        f"Written by `python benchmarks/chain_shift.py --seeds {' '.join(map(str, seeds))}`, which says what the",
        f"synthetic scores are. Mean over {len(seeds)} seeds ± half of the 95 % t-interval.",
    ]
    for contaminated in (CONTAMINATED, 0.0):
        for topics in (0.0, 0.2):
            share = contaminated * RUN / LENGTH
            what = f"{share:.1%} of the tokens harmful" if contaminated else "No token harmful"
            rows = f"rows differing by {topics:g} nats" if topics else "rows alike"
            lines += ["", f"{what}, {rows}:", "", *table(contaminated, topics, seeds)]
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
