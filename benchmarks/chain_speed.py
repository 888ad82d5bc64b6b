"""How fast TOSS-Chain's posterior is, against the same recursion row by row.

    python benchmarks/chain_speed.py [--tokens 50000000]

Rows of 20 to 400 tokens with random scores. All of them go through `log_odds`; one row in a thousand also goes through
a plain loop over its tokens, whose values must agree. Writes benchmarks/results/chain_speed.md.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from toss_lightning.selection.chain import log_odds
from toss_lightning.selection.two_state import Chain

RESULTS = Path(__file__).parent / "results" / "chain_speed.md"
CHAIN = Chain(stay=0.98, prior=0.15, temperature=2.0)


def naive(row: np.ndarray) -> list[float]:
    """Posterior log odds of one row, one token after the other."""
    stay, prior, tau = CHAIN.stay, CHAIN.prior, CHAIN.temperature
    move = [
        [stay + (1 - stay) * (1 - prior), (1 - stay) * prior],
        [(1 - stay) * (1 - prior), stay + (1 - stay) * prior],
    ]

    def passed(evidence: list[float]) -> list[float]:
        odds, found = math.log(prior / (1 - prior)), []
        for value in evidence:
            found.append(odds)
            harmful = 1 / (1 + math.exp(-(odds + value)))
            harmful = harmful * move[1][1] + (1 - harmful) * move[0][1]
            odds = math.log(harmful / (1 - harmful))
        return found

    evidence = [float(value) / tau for value in row]
    before, after = passed(evidence), passed(evidence[::-1])[::-1]
    return [b + e + a - math.log(prior / (1 - prior)) for b, e, a in zip(before, evidence, after, strict=True)]


def main() -> None:
    """Measures, compares and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    tokens = parser.parse_args().tokens
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 401, size=tokens // 210 + 1000)
    lengths = lengths[np.cumsum(lengths) <= tokens]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # as the selection hands them over
    scores = torch.randn(int(offsets[-1]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    started = time.perf_counter()
    odds = log_odds(scores, offsets, CHAIN)
    ours = time.perf_counter() - started
    some = range(0, len(lengths), 1000)
    started = time.perf_counter()
    expected = [naive(scores[offsets[row] : offsets[row + 1]].numpy()) for row in some]
    theirs = time.perf_counter() - started
    for row, values in zip(some, expected, strict=True):
        np.testing.assert_allclose(odds[offsets[row] : offsets[row + 1]].numpy(), values, atol=1e-9)
    looped = int(sum(lengths[row] for row in some))
    rates = len(odds) / ours, looped / theirs
    lines = [
        "# Speed of TOSS-Chain's posterior",
        "",
        f"Written by `python benchmarks/chain_speed.py --tokens {tokens}`; {torch.get_num_threads()} threads, CPU.",
        "",
        "| | tokens | seconds | tokens per second |",
        "|---|---|---|---|",
        f"| `log_odds`, all rows at once | {len(odds):,} | {ours:.1f} | {rates[0]:,.0f} |",
        f"| row by row, a loop over tokens | {looped:,} | {theirs:.2f} | {rates[1]:,.0f} |",
        "",
        f"Ratio of the rates: {rates[0] / rates[1]:.0f}.",
        "",
    ]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
