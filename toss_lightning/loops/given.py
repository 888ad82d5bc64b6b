"""Scores and selections that a run takes as they are: whether they belong to its rows and to its method."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data import TossDataModule
from toss_lightning.errors import StoreError
from toss_lightning.loops.method import Method
from toss_lightning.scores import TokenScores
from toss_lightning.selection import OnlineSelection, Selection, TokenWeights


def check_scores(
    store: Path, round: int | None, data: TossDataModule, selection: Selection, computed: Mapping[str, str]
) -> None:
    """Looks at scores before anything is trained, and warns where they hold other rows of a set than this run has.

    Args:
        store: where they are.
        round: which of them; the last ones by default.
        data: whose custom rows they must be of; of other sets, what was scored counts.
        selection: which must find all that it reads.
        computed: the module's fingerprints, see :func:`_check_base`.

    Raises:
        StoreError: there are none, or they are of other rows or of another base, or lack something.
    """
    scores = TokenScores(store, round)
    scores.check(data.sets["custom"].hashes())
    _check_base(store, scores.fingerprints, selection, computed)
    if missing := scores.missing(selection.columns, selection.features, selection.held_out):
        raise StoreError(
            f"loop.scores_from: {store} has no {', no '.join(missing)}, which {type(selection).__name__} reads: score"
            " with this selection, or choose another"
        )
    rows_there = {name: scores.held_out(name).hashes() for name in selection.held_out}
    others = {name for name, hashes in rows_there.items() if name in data.sets and hashes != data.sets[name].hashes()}
    for kind, names in selection.features.items():
        of_sets = {name: scores.rows_of_feature(kind, name) for name in {*names} & {*data.sets} - {"custom"}}
        others |= {name for name, rows in of_sets.items() if rows != data.sets[name].tokens_digest()}
    for name in sorted(others):
        rank_zero_warn(
            f"loop.scores_from: {type(selection).__name__} reads the {name} rows of {store}, which are others than"
            f" data.{name} has now"
        )


def load_selection(
    path: Path, data: TossDataModule, selection: Selection, computed: Mapping[str, str], begun_with: str | None
) -> TokenWeights:
    """The token weights that a target is trained with.

    Args:
        path: where they are.
        data: whose custom rows they must be of.
        selection: of the kind that they must have been made with.
        computed: the module's fingerprints, see :func:`_check_base`.
        begun_with: their digest where the run was begun; None before that.

    Raises:
        StoreError: there are none, or others than these.
    """
    weights = TokenWeights.load(path)
    custom = data.sets["custom"]
    tokens = {row.row_id: len(row.response_positions) for row in custom.rows}
    weights.check(custom.hashes(), path, data.fingerprints(), tokens)
    if begun_with not in (None, weights.digest()):
        raise StoreError(
            f"{path}: this is not the selection that the run was begun with: select again with the same settings, or"
            " start a new run"
        )
    if isinstance(selection, OnlineSelection) != bool(weights.report.get("weighed_in_training", weights.columns)):
        raise StoreError(
            f"{path}: made for another kind of loop.selection than {type(selection).__name__}: give the one that it was"
            " made with, or select again"
        )
    _check_base(path, weights.made_from, selection, computed)
    return weights


def _check_base(path: Path, made_from: Mapping[str, str], selection: Selection, computed: Mapping[str, str]) -> None:
    """Refuses losses of another base where a selection weighs the target's own against them in training.

    The same base in another precision is warned of. Masks may come from another base with the same tokenizer, and so
    may a reference.
    """
    if not isinstance(selection, OnlineSelection) or "base" not in selection.columns:
        return
    name = type(selection).__name__
    if made_from.get("base") != computed["base"]:
        raise StoreError(
            f"{path}: scored with another base, against whose losses {name} would weigh those of this run's target:"
            " score with this base"
        )
    if (theirs := made_from.get("precision")) != (ours := computed["precision"]):
        rank_zero_warn(
            f"{path}: scored in {theirs}, against whose losses {name} weighs those of this run's target in {ours}: what"
            " lies between the two precisions counts as if it had been learned. Score in this one to be sure"
        )


def check_maker(path: Path, weights: TokenWeights, selection: Selection) -> None:
    """Refuses another run's selection that this run would train with otherwise than the one that made it.

    Raises:
        StoreError: they are such.
    """
    report, ours = weights.report, Method(selection)
    named = ours.selected(int(report.get("round", 0)))
    maker = report.get("method", named)
    rows = report.get("safety_rows", ours.companion_rows)
    in_training = weights.anchor or isinstance(selection, OnlineSelection)
    if (in_training and maker != named) or rows != ours.companion_rows:
        raise StoreError(
            f"{path}: made by {maker} with {rows} safety rows in each step, and loop.selection is {named} with"
            f" {ours.companion_rows}: give the one that it was made with"
        )
