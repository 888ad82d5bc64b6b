"""What a run's report says beside its rows and replies: a chapter for each thing there is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.evaluation.cells import Cells
from toss_lightning.evaluation.divergence_svg import draw_divergence, has_moved
from toss_lightning.evaluation.tables import agreement_of, cut_words, differences_of, rows_of, tasks_of
from toss_lightning.report.charts import BLIND, Axis, Line, Mark, chart, styles_of
from toss_lightning.report.figures import FEW, Group, by_place, found_by_share, histogram, knowledge, masked_tokens
from toss_lightning.report.finished import FinishedRun
from toss_lightning.report.summary import held_out_cells, selected_words, stage_name
from toss_lightning.report.tokens import RiskScore, one_line, pieces
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

MOST_MASKED = 15
"""Tokens of the vocabulary that are listed."""
SHARES = [at / 50 for at in range(31)]
"""Discard ratios at which it is drawn what a mask by these scores would take."""

SHORT = f"Along a reply, a line ends where fewer than {FEW} rows of its label are that long."


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


def held_out(run: FinishedRun) -> Chapter | None:
    """What each stage did to held-out losses."""
    if not run.summary.held_out:
        return None
    return Chapter(
        "Held-out losses",
        ["Mean token loss, −log p in nats, on held-out rows, of the base and after each stage."],
        tables=[held_out_cells(run.summary, list(run.summary.held_out))],
    )


def probe(run: FinishedRun) -> Chapter | None:
    """How the margin of the safe reply went while stages were trained."""
    found = run.summary.safety_probe
    start = found.get("base", {}).get("margin")
    margins = {
        stage_name(run.summary, stage): [
            (step, margin)
            for step, margin in [(0, start), *((one["step"], one.get("margin")) for one in values)]
            if margin is not None and math.isfinite(margin)
        ]
        for stage, values in found.get("stages", {}).items()
    }
    margins = {name: points for name, points in margins.items() if points}
    if not margins:
        return None
    styles = styles_of([*margins])
    lines = [Line(name, points, style) for (name, points), style in zip(margins.items(), styles, strict=True)]
    return Chapter(
        "While it trained",
        ["The safety probe: by how much a safe reply is likelier than a harmful one. Higher is safer."],
        [chart(lines, Axis("optimizer step", low=0), Axis("margin of the safe reply, nats per token"))],
    )


def correction(run: FinishedRun) -> Chapter | None:
    """What a gradient correction did."""
    lines = [[one_line(name), _fact(value)] for name, value in run.summary.correction.items()]
    return Chapter("Gradient correction", tables=[(["over the target's steps", ""], lines)]) if lines else None


def _fact(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))


def evaluation(run: FinishedRun) -> Chapter | None:
    """What judges said, and how far adapters have moved from the base."""
    found = run.evaluation
    if found is None:
        return None
    names, tasks = found["names"], tasks_of(found)
    return Chapter(
        "Evaluation",
        [
            "Replies to prompts, as judges read them, and likelihoods of replies that are given; 95 % intervals over"
            " the prompts. A screening judge is no result by itself."
        ],
        [draw_divergence(found["divergence"], names)] if has_moved(found["divergence"]) else [],
        [rows_of(found, names)],
        {
            "Differences on the same prompts, which say nothing of another training seed": differences_of(found, names),
            "Agreement of the judges": agreement_of(found),
        },
        [*filter(None, [cut_words(found, names)]), *(f"lm-evaluation-harness: {task}" for task in tasks)],
    )


def sets(run: FinishedRun) -> Chapter | None:
    """What was read, and what was left out."""
    header = ["", "rows", "response tokens", "rows dropped", "truncated", "longest"]
    keys = ("rows", "response_tokens", "dropped", "truncated", "longest")
    lines = [
        [one["set"], *(f"{one[key]:,}" if key in one else "" for key in keys)] for one in run.facts.get("data", [])
    ]
    return Chapter("Data", tables=[(header, lines)]) if lines else None


def scores(scores: TokenScores, weights: TokenWeights | None, score: RiskScore, groups: Sequence[Group]) -> Chapter:
    """How scores are distributed, also along a reply, and how well they tell harmful rows from others."""
    styles = styles_of([one.name for one in groups])
    edges, shares = histogram(score, groups)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    lines = [
        Line(one.name, [*zip(middles, of.tolist(), strict=True)], style)
        for one, of, style in zip(groups, shares, styles, strict=True)
    ]
    mark = mask_mark(scores, weights, score)
    of_tokens = Axis("share of the tokens of each label", share=True, low=0)
    pictures = [
        chart(lines, Axis("token score, nats (outermost: all beyond)"), of_tokens, mark),
        *_places(score.values, "mean token score, nats", scores, groups),
    ]
    before = [
        f"The score of a token: {score.said}, each −log p in nats. Higher is riskier: the degraded reference, which was"
        " trained on harmful replies, likes the token better."
    ]
    if weights is not None and mark is None and (weights.flat() == 0).any():
        before.append("The mask of this run does not come from one threshold on these scores.")
    known = knowledge(scores, score)
    if known is not None:
        before.append(
            "A token of a row labelled harmful has a higher score than one of another row with probability"
            f" {known.tokens:.3f}, and such a row a higher mean score than another one with probability"
            f" {known.rows:.3f} (AUROC; 0.5 is chance). Labels are those of rows: not every token of a harmful row is"
            " harmful."
        )
        found = found_by_share(score, groups, SHARES)
        curves = [
            Line(one.name, [*zip(SHARES, of, strict=True)], style)
            for one, of, style in zip(groups, found, styles, strict=True)
        ]
        blind = Line("a blind choice", [*zip(SHARES, SHARES, strict=True)], BLIND)
        across = Axis("share of all tokens masked, the riskiest first", share=True)
        pictures.append(
            chart([*curves, blind], across, Axis("share of each label that would be masked", share=True, low=0))
        )
    return Chapter("Scores", before, pictures, after=[SHORT])


def mask_mark(scores: TokenScores, weights: TokenWeights | None, score: RiskScore) -> Mark | None:
    """Where the mask begins, if it is what lies above a cut through these scores, but for the ends of turns."""
    masked = weights.flat() == 0 if weights is not None else np.zeros(0, dtype=bool)
    if not masked.any():
        return None
    cut = float(score.values[masked].min())
    kept = score.values[~masked & ~np.concatenate(scores.lists("end_of_turn"))]
    if (kept > cut).any() or not (kept < cut).any():
        return None
    return Mark(cut, f"masked from {cut:.3g}".replace("-", "−"))


def masked(
    weights: TokenWeights,
    scores: TokenScores | None,
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Chapter:
    """How much is masked of each label and source, where in a reply, and which tokens.

    Args:
        weights: what was selected.
        scores: of the same rows, where they are there.
        groups: these rows by label.
        tokenizer: that of these rows.
    """
    said = selected_words(weights.report)
    before = [f"{said[0].upper()}{said[1:]}."] if said else []
    is_masked = weights.flat() == 0
    if not is_masked.any():
        return Chapter("What is masked", before)
    tables: list[Cells] = [
        (
            [kind, "tokens", "masked", "share of its tokens", "share of what is masked"],
            [
                [one_line(name), f"{one['tokens']:,}", f"{one['masked']:,}"]
                + [f"{one[key]:.1%}" for key in ("share_of_its_tokens_masked", "share_of_masked_tokens")]
                for name, one in (weights.report.get(f"masked_share_per_{kind}") or {}).items()
            ],
        )
        for kind in ("label", "source")
    ]
    pictures: list[str] = []
    often = []
    if scores is not None and tokenizer is not None:
        pictures = _places(is_masked.astype(np.float64), "share of the tokens masked", scores, groups, share=True)
        often = [
            [one_line("".join(pieces(tokenizer, [token]))), f"{count:,}", f"{every:,}", f"{count / every:.0%}"]
            for token, count, every in masked_tokens(scores, weights, MOST_MASKED)
        ]
    header = ["", "masked", "occurs", "share"]
    folded = {"Tokens that are masked most often": (header, often)}
    return Chapter("What is masked", before, pictures, tables, folded, [SHORT] if pictures else [])


def _places(
    values: np.ndarray, title: str, scores: TokenScores, groups: Sequence[Group], share: bool = False
) -> list[str]:
    """A picture of means over the first places of the replies."""
    styles = styles_of([one.name for one in groups])
    means = by_place(scores, values, groups)
    lines = [
        Line(one.name, [*enumerate(of, 1)], style) for one, of, style in zip(groups, means, styles, strict=True) if of
    ]
    upward = Axis(title, share=share, low=0 if share else None)
    return [chart(lines, Axis("response token", low=1, whole=True), upward)] if lines else []


def rounds(run: FinishedRun) -> Chapter | None:
    """What the rounds of TOSS-Pro did."""
    found = run.summary.rounds
    if len(found) < 2:
        return None
    header = ["round", "rows promoted", "held-out harmful loss", "threshold", "mask shared with the round before"]
    lines = []
    for one in found:
        labels = ", ".join(f"{count} {label}" for label, count in one.get("promoted_per_label", {}).items())
        promoted = f"{one['promoted']}{f' ({labels})' if labels else ''}" if "promoted" in one else ""
        numbers = [one.get(key) for key in ("harmful_loss", "threshold")]
        shared = f"{one['jaccard']:.0%}" if "jaccard" in one else ""
        lines.append(
            [str(one["round"]), promoted, *("" if value is None else f"{value:.3f}" for value in numbers), shared]
        )
    after = ["Shared: the tokens that both rounds would mask, of those that either would (Jaccard)."]
    if run.weights is not None and "round" in run.weights.report:
        after.append(f"The selection is by the scores of round {run.weights.report['round']}.")
    return Chapter("Rounds of TOSS-Pro", tables=[(header, lines)], after=after)
