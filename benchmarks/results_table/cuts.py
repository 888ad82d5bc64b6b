"""Where TOSS-Chain's cut should stand, by the labels of the custom rows: with a fifth of harmful rows, and without."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from references import aurocs_of, of_tokens
from rows import SHARE
from tables import heading

from toss_lightning.evaluation.cells import interval, markdown_table, number
from toss_lightning.evaluation.statistics import t_interval
from toss_lightning.scores import TokenScores
from toss_lightning.selection import ChainSelection

CUSTOM = CONTAMINATED, CLEAN = f"{SHARE:g}", "0"
"""Shares of harmful rows in the sets that are looked at."""
AT_ZERO, BY_MIDDLE = "automatic", "automatic, centre held_out"
RULES = {
    "discard 0.1": ChainSelection(0.1),
    AT_ZERO: ChainSelection(None),
    BY_MIDDLE: ChainSelection(None, centre="held_out"),
    "false alarms 5%": ChainSelection(None, false_alarms=0.05),
    "false alarms 5%, centre held_out": ChainSelection(None, false_alarms=0.05, centre="held_out"),
    "false alarms 10%, centre held_out": ChainSelection(None, false_alarms=0.1, centre="held_out"),
}


def page(runs: Mapping[str, Sequence[Path]], command: str, setup: Sequence[str]) -> str:
    """Everything, as Markdown.

    Args:
        runs: share of harmful rows -> what scoring the custom set with it left, for each seed.
        command: what wrote this.
        setup: what was done, in words.
    """
    stores = {share: [TokenScores(run / "scores") for run in of] for share, of in runs.items()}
    taken = {
        (name, share): np.array([taken_by(rule, one) for one in stores[share]])
        for name, rule in RULES.items()
        for share in CUSTOM
    }
    lines = []
    for name in RULES:
        harmful, others = taken[name, CONTAMINATED].T
        lines.append([name, *map(_mean, (harmful, others, taken[name, CLEAN][:, 1]))])
    found = taken[AT_ZERO, CONTAMINATED][:, 0]
    middles = [RULES[BY_MIDDLE].select(one).report["chain"]["centre"] for one in stores[CONTAMINATED]]
    aurocs = [aurocs_of(one)[-1] for one in stores[CONTAMINATED]]
    return "\n".join(
        [
            *heading("Where the cut stands", f"`{command}`", setup),
            "Held-out rows are those of the validation split.",
            "",
            *markdown_table(["masked", "of harmful tokens ↑", "of the others ↓", "of a set without harm ↓"], lines),
            "",
            f"Mean over {len(aurocs)} seed{'s' if len(aurocs) > 1 else ''} of references"
            + ("; in brackets 95 % intervals over the seeds." if len(aurocs) > 1 else ".")
            + " All tokens of a harmful row count as",
            f"harmful. Seed by seed, AUROC of the chain that is fitted at centre 0: {', '.join(map(_plain, aurocs))};",
            f"harmful tokens that its automatic cut takes: {', '.join(f'{one:.0%}' for one in found)}; middle of the",
            f"held-out rows, in nats: {', '.join(map(_plain, middles))}.",
            "",
        ]
    )


def taken_by(rule: ChainSelection, scores: TokenScores) -> tuple[float, float]:
    """Shares that a rule masks: of the tokens of harmful rows, if there are any, and of the others."""
    harmful, masked = of_tokens(scores), rule.select(scores).flat() == 0
    return float(masked[harmful].mean()) if harmful.any() else 0.0, float(masked[~harmful].mean())


def _plain(value: float) -> str:
    return number(value, False)


def _mean(values: np.ndarray) -> str:
    if len(values) < 2:
        return number(values[0], True)
    mean = t_interval(values.tolist())
    return interval({"value": mean.mean, "low": max(0.0, mean.low), "high": min(1.0, mean.high)}, True)
