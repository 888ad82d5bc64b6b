"""The page of a run: one HTML file that needs nothing else, neither scripts nor a network."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning import __version__
from toss_lightning.report import chapters
from toss_lightning.report.figures import groups_of
from toss_lightning.report.finished import FinishedRun
from toss_lightning.report.replies import choose_exchanges
from toss_lightning.report.shades import Shade
from toss_lightning.report.summary import plain_words
from toss_lightning.report.tokens import Row, Rows, Token, choose_rows, facts_of, one_line, risk_score, signed, visible
from toss_lightning.selection import TokenWeights

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
    summary, scores, weights = run.summary, run.scores, run.weights
    score = risk_score(scores) if scores is not None else None
    groups, shade = groups_of(scores) if scores is not None else [], Shade(score)
    before = [chapters.held_out(run), chapters.probe(run), chapters.correction(run), chapters.evaluation(run)]
    if scores is not None and score is not None:
        before.append(chapters.scores(scores, weights, score, groups))
    if weights is not None:
        before.append(chapters.masked(weights, scores, groups, tokenizer))
    behind = [chapters.rounds(run), chapters.sets(run)]
    shown = {}
    if scores is not None and tokenizer is not None:
        rows = Rows(scores, weights, tokenizer, score)
        chosen = choose_rows(scores, weights, score, count)
        shown = {heading: [_shown(rows[row_id], shade) for row_id in ids] for heading, ids in chosen.items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["clean"] = one_line
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{run.method}: {run.directory if run.directory.name.strip('.') else run.directory.resolve()}",
        subtitle=_subtitle(run),
        warnings=_warnings(run),
        words=[sentence for sentence in (plain_words(summary),) if sentence],
        before=[chapter for chapter in before if chapter is not None],
        behind=[chapter for chapter in behind if chapter is not None],
        asked=choose_exchanges(run.responses, run.evaluation or {}, count),
        rows=shown,
        made_of=score.said if score is not None else None,
        shades=shade.colours,
        signs=_signs(weights),
        benign=BENIGN,
        version=__version__,
    )


def _warnings(run: FinishedRun) -> list[str]:
    """What a person should know before they look at any number."""
    summary = run.summary
    found = [*run.warnings, *summary.weak.values(), *summary.stopped.values(), *summary.idle]
    if run.weights is not None and run.facts and "target" not in summary.stages:
        found.append("No target was trained here with the selection that is shown.")
    return found + [
        f"{judge} has not judged: {why}" for judge, why in (run.evaluation or {}).get("failed_judges", {}).items()
    ]


def _signs(weights: TokenWeights | None) -> list[str]:
    """What lines below tokens say, of those that there are."""
    if weights is None:
        return ["There is no mask to show."]
    masked = weights.flat() == 0
    anchors = [weights.anchor[row_id] for row_id in sorted(weights.anchor)] or [np.zeros(len(masked))]
    anchored = np.concatenate(anchors) != 0
    signs = {
        "A solid line below a token: it is left out of the task loss.": masked & ~anchored,
        "A dotted line below a token: it is held to what the base predicts.": anchored & ~masked,
        "A double line below a token: it is left out of the task loss, and held to what the base predicts.": masked
        & anchored,
    }
    return [sign for sign, of in signs.items() if of.any()]


def _subtitle(run: FinishedRun) -> str:
    facts = run.facts
    if not facts:
        return f"Scores of {run.scores.path}" if run.scores is not None else ""
    parts = [facts.get("base"), run.summary.precision, facts.get("device")]
    counts = (("seed", "seed {}"), ("optimizer_steps", "{} optimizer steps"), ("finished", "finished {}"))
    parts += [said.format(facts[key]) for key, said in counts if key in facts]
    return " · ".join(part for part in parts if part)


def _shown(row: Row, shade: Shade) -> dict[str, Any]:
    """A row as the template reads it."""
    return {
        "row_id": row.row_id,
        "veiled": row.label != BENIGN,
        "facts": facts_of(row),
        "tokens": [
            {
                "text": visible(token.text) or ("·" if token.ordinal is not None else ""),
                "title": said_of(token),
                "tag": "del" if token.masked else "b",
                "classes": f"{shade(token.score)}{' anchored' if token.anchor else ''}".strip(),
            }
            for token in row.tokens
        ],
    }


def said_of(token: Token) -> str:
    """What is known of a response token, on one line; nothing of another."""
    if token.ordinal is None:
        return ""
    said = [f"response token {token.ordinal}"]
    said += [f"{name} loss {loss:.2f}" for name, loss in (token.losses or {}).items()]
    said += [f"score {signed(token.score)}"] if token.score is not None else []
    if token.weight is not None and token.weight != 1:
        said += ["masked" if token.masked else f"weight {token.weight:.3g}"]
    said += [f"held to the base with weight {token.anchor:.3g}"] if token.anchor else []
    return ", ".join(said)
