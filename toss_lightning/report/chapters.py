"""What a run's report says beside its rows: a chapter for each thing there is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from toss_lightning.evaluation.cells import Cells
from toss_lightning.evaluation.divergence_svg import draw_divergence, has_moved
from toss_lightning.evaluation.tables import differences_of, rows_of
from toss_lightning.report.charts import Axis, Line, Mark, chart
from toss_lightning.report.figures import (
    Group,
    by_place,
    found_by_share,
    histogram,
    knowledge,
    masked_tokens,
)
from toss_lightning.report.finished import FinishedRun
from toss_lightning.report.summary import held_out_cells, selected_words, stage_name
from toss_lightning.report.tokens import RiskScore, pieces, visible
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights

MOST_MASKED = 15
"""Tokens of the vocabulary that are listed."""
SHARES = [at / 50 for at in range(31)]
"""Discard ratios at which it is drawn what a mask by these scores would hit."""


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
        ["Mean token loss on held-out rows, of the base and after each stage."],
        tables=[held_out_cells(run.summary, list(run.summary.held_out))],
    )


def probe(run: FinishedRun) -> Chapter | None:
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
        ["The safety probe: by how much a safe reply is likelier than a harmful one. Higher is safer."],
        [chart(lines, Axis("optimizer step", low=0), Axis("margin of the safe reply, nats per token"))],
    )


def evaluation(run: FinishedRun) -> Chapter | None:
    """What judges said, and how far adapters have moved from the base."""
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


def sets(run: FinishedRun) -> Chapter | None:
    """What was read, and what was left out."""
    sets = run.facts.get("data", [])
    if not sets:
        return None
    header = ["", "rows", "response tokens", "rows dropped", "truncated", "longest"]
    keys = ("rows", "response_tokens", "dropped", "truncated", "longest")
    return Chapter("Data", tables=[(header, [[one["set"], *(f"{one[key]:,}" for key in keys)] for one in sets])])


def scores(scores: TokenScores, weights: TokenWeights | None, score: RiskScore, groups: Sequence[Group]) -> Chapter:
    """How scores lie, where in a reply, and what they know of labels."""
    edges, shares = histogram(score, groups)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    lines = [Line(one.name, [*zip(middles, of.tolist(), strict=True)]) for one, of in zip(groups, shares, strict=True)]
    pictures = [
        chart(lines, Axis("token score, nats"), Axis("share of the tokens", share=True, low=0), _cut(weights, score)),
        *_places(score.values, "mean token score, nats", scores, groups),
    ]
    before = [f"The score of a token: {score.said}, in nats. A higher one is riskier."]
    known = knowledge(scores, score)
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


def _cut(weights: TokenWeights | None, score: RiskScore) -> Mark | None:
    """Where the mask begins, if it is a cut through these scores."""
    if weights is None or (cut := weights.report.get("threshold")) is None:
        return None
    masked = weights.flat() == 0
    if not masked.any() or score.values[masked].min() < cut:
        return None
    return Mark(cut, f"masked from {cut:.2f}".replace("-", "−"))


def masked(
    scores: TokenScores, weights: TokenWeights, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Group]
) -> Chapter:
    """How much is masked of each label and source, where in a reply, and which tokens."""
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
        [visible("".join(pieces(tokenizer, [token]))), f"{count:,}", f"{every:,}", f"{count / every:.0%}"]
        for token, count, every in masked_tokens(scores, weights, MOST_MASKED)
    ]
    said = selected_words(weights.report)
    return Chapter(
        "What is masked",
        [f"{said[0].upper()}{said[1:]}."] if said else [],
        _places(masked, "share of the tokens masked", scores, groups, share=True),
        tables,
        {"Tokens that are masked most often": (["", "masked", "occurs", "share"], often)},
    )


def _places(
    values: np.ndarray, title: str, scores: TokenScores, groups: Sequence[Group], share: bool = False
) -> list[str]:
    """A picture of means over the first places of the replies."""
    means = by_place(scores, values, groups)
    lines = [Line(one.name, [*enumerate(of, 1)]) for one, of in zip(groups, means, strict=True) if of]
    upward = Axis(title, share=share, low=0 if share else None)
    return [chart(lines, Axis("response token", low=1), upward)] if lines else []


def rounds(run: FinishedRun) -> Chapter | None:
    """What the rounds of TOSS-Pro did."""
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
