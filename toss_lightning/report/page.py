"""The page of a run: one HTML file that needs nothing else, neither scripts nor a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning import __version__
from toss_lightning.evaluation.cells import Cells
from toss_lightning.evaluation.divergence_svg import draw_divergence, has_moved
from toss_lightning.evaluation.tables import differences_of, rows_of
from toss_lightning.report.charts import Axis, Line, Mark, chart
from toss_lightning.report.figures import (
    Group,
    by_place,
    found_by_share,
    groups_of,
    histogram,
    knowledge,
    masked_tokens,
)
from toss_lightning.report.finished import FinishedRun
from toss_lightning.report.summary import held_out_cells, plain_words, selected_words, stage_name
from toss_lightning.report.tokens import RiskScore, Row, Rows, Token, choose_rows, facts_of, pieces, risk_score

TEMPLATE = Path(__file__).with_name("page.html")
ROWS = 6
"""Rows below each heading, where nothing else is asked for."""
MOST_MASKED = 15
"""Tokens of the vocabulary that are listed."""
SHARES = [at / 50 for at in range(31)]
"""Discard ratios at which it is drawn what a mask by these scores would hit."""
COOL, WARM = (86, 180, 233), (230, 125, 20)
"""Of scores below and above 0, red, green and blue."""
DEPTHS = (0.0, 0.25, 0.45, 0.7, 0.95)
"""How much of its colour a score has, from the lowest to those at :data:`FULL`."""
FULL = 0.975
"""Quantile of the absolute scores from which on a token has all of its colour."""
BENIGN = "benign"
"""The label of rows whose texts are shown at once."""


@dataclass(frozen=True)
class Chapter:
    """A part of the page; tables without lines are left out."""

    title: str
    before: Sequence[str] = ()
    charts: Sequence[str] = ()
    tables: Sequence[Cells] = ()
    folded: Mapping[str, Cells] = field(default_factory=dict)
    """Tables below a line that opens them."""
    after: Sequence[str] = ()


def render(run: FinishedRun, tokenizer: PreTrainedTokenizerBase, count: int = ROWS) -> str:
    """The page of a run.

    Args:
        run: what it left behind.
        tokenizer: that of its rows.
        count: rows below each heading, at most.

    Raises:
        StoreError: its scores are damaged.
    """
    score, groups = risk_score(run.scores), groups_of(run.scores)
    before = [
        _held_out(run),
        _probe(run),
        _evaluation(run),
        _scores(run, score, groups),
        _masked(run, tokenizer, groups),
    ]
    behind = [_rounds(run), _sets(run)]
    rows, shade, chosen = Rows(run, tokenizer, score), Shade(score), choose_rows(run, score, count)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    summary = run.summary
    return template.render(
        title=f"{summary.method if run.facts else 'Scores'}: {run.directory}",
        subtitle=_subtitle(run),
        warnings=[*summary.weak.values(), *summary.stopped.values(), *summary.idle],
        words=[sentence for sentence in (plain_words(summary),) if sentence],
        before=[chapter for chapter in before if chapter is not None],
        behind=[chapter for chapter in behind if chapter is not None],
        made_of=score.said if score is not None else None,
        shades=shade.colours,
        selected=run.weights is not None,
        rows={heading: [_shown(rows[row_id], shade) for row_id in ids] for heading, ids in chosen.items()},
        version=__version__,
    )


def _subtitle(run: FinishedRun) -> str:
    facts = run.facts
    if not facts:
        return f"Scores of {run.scores.path}"
    parts = [facts["base"], run.summary.precision, facts["device"], f"seed {facts['seed']}"]
    parts += [f"{facts['optimizer_steps']} optimizer steps", f"finished {facts['finished']}"]
    return " · ".join(part for part in parts if part)


# --- chapters ---------------------------------------------------------------------------------------------------------


def _held_out(run: FinishedRun) -> Chapter | None:
    if not run.summary.held_out:
        return None
    return Chapter(
        "Held-out losses",
        ["Mean token loss on held-out rows, of the base and after each stage."],
        tables=[held_out_cells(run.summary, list(run.summary.held_out))],
    )


def _probe(run: FinishedRun) -> Chapter | None:
    """How the margin of the safe reply went while stages were trained."""
    probe = run.summary.safety_probe
    stages = {name: values for name, values in probe.get("stages", {}).items() if values}
    if not stages:
        return None
    start = probe["base"]["margin"]
    lines = [
        Line(stage_name(run.summary, name), [(0, start), *((one["step"], one["margin"]) for one in values)])
        for name, values in stages.items()
    ]
    return Chapter(
        "While it trained",
        [
            "The safety probe: by how much a safe reply is likelier than a harmful one, from the base on. Higher is safer."
        ],
        [chart(lines, Axis("optimizer step", low=0), Axis("margin of the safe reply, nats per token"))],
    )


def _evaluation(run: FinishedRun) -> Chapter | None:
    found = run.evaluation
    if found is None:
        return None
    names = found["names"]
    differences = differences_of(found, names)
    return Chapter(
        "What it says now",
        [
            "Replies to prompts, as judges read them, and likelihoods of replies that are given; 95 % intervals over"
            " the prompts. A screening judge is no result by itself."
        ],
        [draw_divergence(found["divergence"], names)] if has_moved(found["divergence"]) else [],
        [rows_of(found, names)],
        folded={"Differences on the same prompts, which say nothing of another training seed": differences},
    )


def _sets(run: FinishedRun) -> Chapter | None:
    sets = run.facts.get("data", [])
    if not sets:
        return None
    header = ["", "rows", "response tokens", "rows dropped", "truncated", "longest"]
    keys = ("rows", "response_tokens", "dropped", "truncated", "longest")
    return Chapter("Data", tables=[(header, [[one["set"], *(f"{one[key]:,}" for key in keys)] for one in sets])])


def _scores(run: FinishedRun, score: RiskScore | None, groups: Sequence[Group]) -> Chapter | None:
    if score is None:
        return None
    edges, shares = histogram(score, groups)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    lines = [Line(one.name, [*zip(middles, of.tolist(), strict=True)]) for one, of in zip(groups, shares, strict=True)]
    pictures = [
        chart(lines, Axis("token score, nats"), Axis("share of the tokens", share=True, low=0), _threshold(run, score)),
        *_places(score.values, "mean token score, nats", run, groups),
    ]
    before = [f"The score of a token: {score.said}, in nats. A higher one is riskier."]
    known = knowledge(run.scores, score)
    if known is not None:
        before.append(
            f"A token of a row labelled harmful has a higher score than one of another row with probability"
            f" {known.tokens:.3f}, and such a row a higher mean score than another one with probability"
            f" {known.rows:.3f} (AUROC; 0.5 is chance)."
        )
        found = found_by_share(score, groups, SHARES)
        curves = [Line(one.name, [*zip(SHARES, of, strict=True)]) for one, of in zip(groups, found, strict=True)]
        blind = Line("a blind choice", [*zip(SHARES, SHARES, strict=True)], fades=True)
        across = Axis("share of all tokens that the highest scores are", share=True)
        pictures.append(chart([*curves, blind], across, Axis("share of the tokens of each label", share=True, low=0)))
    return Chapter("Scores", before, pictures)


def _threshold(run: FinishedRun, score: RiskScore) -> Mark | None:
    """Where the mask begins, if it is a cut through these scores."""
    if run.weights is None or (cut := run.weights.report.get("threshold")) is None:
        return None
    masked = run.weights.flat() == 0
    if not masked.any() or score.values[masked].min() < cut:
        return None
    return Mark(cut, f"masked from {cut:.2f}".replace("-", "−"))


def _masked(run: FinishedRun, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Group]) -> Chapter | None:
    weights = run.weights
    if weights is None:
        return None
    masked = (weights.flat() == 0).astype(np.float64)
    tables: list[Cells] = [
        (
            [kind, "tokens", "masked", "share of its tokens", "share of what is masked"],
            [
                [name, f"{one['tokens']:,}", f"{one['masked']:,}"]
                + [f"{one[key]:.1%}" for key in ("share_of_its_tokens_masked", "share_of_masked_tokens")]
                for name, one in weights.report.get(f"masked_share_per_{kind}", {}).items()
            ],
        )
        for kind in ("label", "source")
    ]
    often = [
        [_visible("".join(pieces(tokenizer, [token]))), f"{count:,}", f"{every:,}", f"{count / every:.0%}"]
        for token, count, every in masked_tokens(run.scores, weights, MOST_MASKED)
    ]
    said = selected_words(weights.report)
    return Chapter(
        "What is masked",
        [f"{said[0].upper()}{said[1:]}."] if said else [],
        _places(masked, "share of the tokens masked", run, groups, share=True),
        tables,
        {"Tokens that are masked most often": (["", "masked", "occurs", "share"], often)},
    )


def _places(
    values: np.ndarray, title: str, run: FinishedRun, groups: Sequence[Group], share: bool = False
) -> list[str]:
    """A picture of means over the first places of the replies."""
    means = by_place(run.scores, values, groups)
    lines = [Line(one.name, [*enumerate(of, 1)]) for one, of in zip(groups, means, strict=True) if of]
    upward = Axis(title, share=share, low=0 if share else None)
    return [chart(lines, Axis("response token", low=1), upward)] if lines else []


def _rounds(run: FinishedRun) -> Chapter | None:
    rounds = run.summary.rounds
    if len(rounds) < 2:
        return None
    header = ["round", "rows promoted", "held-out harmful loss", "threshold", "mask shared with the round before"]
    lines = []
    for one in rounds:
        labels = ", ".join(f"{count} {label}" for label, count in one.get("promoted_per_label", {}).items())
        promoted = f"{one['promoted']}{f' ({labels})' if labels else ''}" if "promoted" in one else ""
        numbers = [one.get(key) for key in ("harmful_loss", "threshold")]
        shared = f"{one['jaccard']:.0%}" if "jaccard" in one else ""
        lines.append(
            [str(one["round"]), promoted, *("" if value is None else f"{value:.3f}" for value in numbers), shared]
        )
    return Chapter(
        "Rounds of TOSS-Pro",
        tables=[(header, lines)],
        after=["Shared: the tokens that both rounds would mask, of those that either would (Jaccard)."],
    )


# --- rows -------------------------------------------------------------------------------------------------------------


class Shade:
    """A colour for each score: the bluer, the better the first of the two sides likes a token; the other way, orange.

    Args:
        score: of all tokens.
    """

    def __init__(self, score: RiskScore | None) -> None:
        self.full = float(np.quantile(np.abs(score.values), FULL)) if score is not None else 0.0
        steps = range(1, len(DEPTHS))
        of = {f"c{step}": (COOL, step) for step in reversed(steps)} | {f"w{step}": (WARM, step) for step in steps}
        self.colours = {name: _mixed(colour, DEPTHS[step]) for name, (colour, step) in of.items()}
        """Class -> colour, from the lowest scores to the highest."""

    def __call__(self, score: float | None) -> str:
        """The class of a score; none for one about 0."""
        if score is None or not self.full:
            return ""
        step = round(min(1.0, abs(score) / self.full) * (len(DEPTHS) - 1))
        return f"{'w' if score > 0 else 'c'}{step}" if step else ""


def _mixed(colour: tuple[int, int, int], depth: float) -> str:
    return "#" + "".join(f"{round(255 + (part - 255) * depth):02x}" for part in colour)


def _shown(row: Row, shade: Shade) -> dict[str, Any]:
    """A row as the template reads it."""
    return {
        "row_id": row.row_id,
        "veiled": row.label != BENIGN,
        "facts": facts_of(row),
        "tokens": [
            {
                "text": _visible(token.text),
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
    numbers += [f"score {token.score:+.2f}"] if token.score is not None else []
    counts = {None: [], 0.0: ["masked"], 1.0: []}.get(token.weight, [f"weight {token.weight}"])
    return ", ".join([f"response token {token.ordinal}", *numbers, *counts]).replace("-", "−")


def _visible(said: str) -> str:
    """With a sign for what would not be seen."""
    return said.replace("\n", "⏎\n").replace("\t", "⇥\t")
