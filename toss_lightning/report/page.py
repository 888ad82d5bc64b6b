"""The page of a run: one HTML file that needs nothing else, neither scripts nor a network."""

from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from toss_lightning import __version__
from toss_lightning.report import chapters
from toss_lightning.report.figures import groups_of
from toss_lightning.report.finished import FinishedRun
from toss_lightning.report.replies import choose_exchanges
from toss_lightning.report.shades import Shade
from toss_lightning.report.summary import plain_words
from toss_lightning.report.tokens import Row, Rows, Token, choose_rows, facts_of, risk_score, signed, visible

TEMPLATE = Path(__file__).with_name("page.html")
ROWS = 6
"""Rows below each heading, where nothing else is asked for."""
BENIGN = "benign"
"""The label of rows whose texts are shown at once."""


def render(run: FinishedRun, tokenizer: PreTrainedTokenizerBase | None = None, count: int = ROWS) -> str:
    """The page of a run.

    Args:
        run: what it left behind.
        tokenizer: that of its rows, where it has scores.
        count: rows and replies below each heading, at most.

    Raises:
        StoreError: its scores are damaged.
    """
    summary = run.summary
    before = [chapters.held_out(run), chapters.probe(run), chapters.evaluation(run)]
    parts: dict[str, Any] = {"shades": {}, "made_of": None, "rows": {}}
    if run.scores is not None:
        assert tokenizer is not None
        scores, weights, score = run.scores, run.weights, risk_score(run.scores)
        groups, shade = groups_of(scores), Shade(score)
        before += [chapters.scores(scores, weights, score, groups) if score is not None else None]
        before += [chapters.masked(scores, weights, tokenizer, groups) if weights is not None else None]
        rows = Rows(scores, weights, tokenizer, score)
        chosen = choose_rows(scores, weights, score, count)
        parts = {
            "shades": shade.colours,
            "made_of": score.said if score is not None else None,
            "rows": {heading: [_shown(rows[row_id], shade) for row_id in ids] for heading, ids in chosen.items()},
        }
    behind = [chapters.rounds(run), chapters.sets(run)]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        title=f"{run.method}: {run.directory}",
        subtitle=_subtitle(run),
        warnings=[*summary.weak.values(), *summary.stopped.values(), *summary.idle],
        words=[sentence for sentence in (plain_words(summary),) if sentence],
        before=[chapter for chapter in before if chapter is not None],
        behind=[chapter for chapter in behind if chapter is not None],
        selected=run.weights is not None,
        asked=choose_exchanges(run.responses, run.evaluation["names"] if run.evaluation else {}, count),
        benign=BENIGN,
        version=__version__,
        **parts,
    )


def _subtitle(run: FinishedRun) -> str:
    facts = run.facts
    if not facts:
        return f"Scores of {run.scores.path}" if run.scores is not None else ""
    parts = [facts["base"], run.summary.precision, facts["device"], f"seed {facts['seed']}"]
    parts += [f"{facts['optimizer_steps']} optimizer steps", f"finished {facts['finished']}"]
    return " · ".join(part for part in parts if part)


def _shown(row: Row, shade: Shade) -> dict[str, Any]:
    """A row as the template reads it."""
    return {
        "row_id": row.row_id,
        "veiled": row.label != BENIGN,
        "facts": facts_of(row),
        "tokens": [
            {
                "text": visible(token.text),
                "title": said_of(token),
                "classes": f"{shade(token.score)}{' m' if token.masked else ''}".strip(),
            }
            for token in row.tokens
        ],
    }


def said_of(token: Token) -> str:
    """What is known of a response token, on one line; nothing of another."""
    if token.ordinal is None:
        return ""
    numbers = [f"{name} loss {loss:.2f}" for name, loss in (token.losses or {}).items()]
    numbers += [f"score {signed(token.score)}"] if token.score is not None else []
    counts = {None: [], 0.0: ["masked"], 1.0: []}.get(token.weight, [f"weight {token.weight:.3g}"])
    return ", ".join([f"response token {token.ordinal}", *numbers, *counts])
