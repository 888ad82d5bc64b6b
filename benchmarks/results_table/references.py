"""What the references know of harm: their scores against the labels of the custom rows, and how long training helps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import BEST, MOST_EPOCHS
from sklearn.metrics import roc_auc_score
from tables import heading

from toss_lightning.evaluation.cells import DASH, markdown_table
from toss_lightning.evaluation.statistics import t_interval
from toss_lightning.scores import TokenScores
from toss_lightning.selection import ChainSelection
from toss_lightning.selection.chain import log_odds
from toss_lightning.selection.two_state import Chain

ROLES = ("base", "utility", "degraded")
AUROCS = ("AUROC of TOSS, tokens", "of TOSS, row means", "of TOSS-Chain, tokens")


def page(runs: Mapping[str, Sequence[Path]], command: str, setup: Sequence[str]) -> str:
    """References that were trained for different times, as Markdown.

    Args:
        runs: passes over their rows, or :data:`experiment.BEST` -> what training them left, for each seed; nothing
            where it is not run yet.
        command: what wrote this.
        setup: what was done, in words.
    """
    lines, kept = [], []
    for epochs, of in ((epochs, of) for epochs, of in runs.items() if of):
        summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in of]
        losses = [[one["held_out"][name][key] for one in summaries] for name, key in HELD_OUT]
        scores = [TokenScores(run / "scores") for run in of]
        if epochs == BEST:
            kept = [f"Of {MOST_EPOCHS} epochs the validation split chose: {_kept(summaries)}."]
        aurocs = np.array([aurocs_of(one) for one in scores]).T.tolist()
        cuts = np.array([cut_of(one) for one in scores]).mean(0)
        lines.append(
            [
                _named(epochs),
                str(len(of)),
                *(DASH if epochs == BEST else f"{np.mean(one):.3f}" for one in losses),
                *map(_mean, aurocs),
                *(f"{share:.0%}" for share in cuts),
            ]
        )
    header = ["epochs", "seeds", *(f"{name}'s {key.replace('_', ' ')}" for name, key in HELD_OUT), *AUROCS]
    header += ["automatic cut masks", "of harmful tokens"]
    return "\n".join(
        [
            *heading("How long references are trained", f"`{command}`", setup),
            "Losses are those of held-out rows, by the pairs and rows of the test split; all tokens of a harmful row",
            "count as harmful.",
            "",
            *markdown_table(header, lines),
            "",
            *kept,
            *(f"Not run yet: {_named(epochs)} epochs." for epochs, of in runs.items() if not of),
            "",
        ]
    )


def _named(epochs: str) -> str:
    return f"best of {MOST_EPOCHS}" if epochs == BEST else epochs


def _kept(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Which epochs were kept, seed by seed."""
    found = []
    for role in ("utility", "degraded"):
        chosen = [str(one["stages"][role]["kept_epoch"]) for one in summaries]
        found.append(f"for the {role} reference {', '.join(chosen)}")
    return "; ".join(found)


HELD_OUT = (
    ("base", "task_loss"),
    ("utility", "task_loss"),
    ("base", "harmful_loss"),
    ("degraded", "harmful_loss"),
)
"""What is shown of the held-out losses: of whom, and which one."""


def score_table(runs: Sequence[Path]) -> list[str]:
    """AUROC of token scores and of row means, for the references of each seed."""
    scores = [TokenScores(run / "scores") for run in runs]
    found = [
        [float(of_tokens(one).mean()) for one in scores],
        *np.array([aurocs_of(one) for one in scores]).T.tolist(),
    ]
    return markdown_table(["harmful tokens", *AUROCS], [[_mean(values) for values in found]])


def loss_table(runs: Sequence[Path]) -> list[str]:
    """What the references make of the custom rows, which tells what they have learned beyond their own rows."""
    found: dict[tuple[bool, str], list[float]] = {(harmful, role): [] for harmful in (True, False) for role in ROLES}
    for scores in (TokenScores(run / "scores") for run in runs):
        for role in ROLES:
            loss = scores.combine({f"loss_{role}": 1.0})
            for harmful in (True, False):
                found[harmful, role].append(float(loss[of_tokens(scores) == harmful].mean()))
    lines = []
    for harmful, title in ((True, "harmful rows"), (False, "the others")):
        lines.append([title, *(f"{np.mean(found[harmful, role]):.3f}" for role in ROLES)])
    return markdown_table(["", "base", "utility reference", "degraded reference"], lines)


def aurocs_of(scores: TokenScores) -> list[float]:
    """How well scores tell harmful rows: by tokens that may be masked, by row means, by TOSS-Chain's tokens."""
    harmful = np.array([label == "harmful" for label in scores.values("label")])
    of_token, free = of_tokens(scores), ~scores.flat("end_of_turn").astype(bool)
    score = scores.score()
    means = [row.mean() for row in scores.per_row(score)]
    guesses = ((of_token[free], score[free]), (harmful, means), (of_token[free], _chain_odds(scores, free)))
    return [float(roc_auc_score(truth, guess)) for truth, guess in guesses]


def cut_of(scores: TokenScores) -> tuple[float, float]:
    """Shares that TOSS-Chain's automatic cut masks: of all response tokens, and of those of harmful rows."""
    masked = ChainSelection(discard=None).select(scores).flat() == 0
    return float(masked.mean()), float(masked[of_tokens(scores)].mean())


def of_tokens(scores: TokenScores) -> np.ndarray:
    """Whether each token is one of a harmful row."""
    return np.repeat([label == "harmful" for label in scores.values("label")], np.diff(scores.offsets))


def _chain_odds(scores: TokenScores, free: np.ndarray) -> np.ndarray:
    """Log odds of harm of each token that may be masked, by the chain that is fitted by default."""
    chain = Chain(**ChainSelection(discard=None).select(scores).report["chain"])
    offsets = np.concatenate([[0], np.cumsum(free)])[scores.offsets]
    odds: np.ndarray = log_odds(torch.from_numpy(scores.score()[free].astype(np.float64)), offsets, chain).numpy()
    return odds


def _mean(values: Sequence[float]) -> str:
    """Of shares: an interval ends at 0 and at 1."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean = t_interval(values, bounded=True)
    return f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
