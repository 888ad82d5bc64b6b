"""TOSS-Anchor: which tokens are held to the base, and how hard."""

import math
from pathlib import Path

import numpy as np
import pytest
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, PerRowTopFraction, TokenWeights, row_weights
from toss_lightning.selection.anchor import Anchored, Everything
from toss_lightning.selection.base import Selection
from toss_lightning.selection.chain import ChainSelection
from toss_lightning.selection.constrained import ConstrainedSft
from toss_lightning.selection.mask_first import MaskFirst


def anchors(weights: TokenWeights) -> np.ndarray:
    return np.concatenate([weights.anchor[row_id] for row_id in sorted(weights.anchor)])


@pytest.fixture
def scores(tmp_path: Path) -> TokenScores:
    """Risky tokens in the middle of the first row, and a risky end of the second."""
    return make_scores(tmp_path / "scores", [[0.1, 9.0, 8.0, 0.0], [0.2, 0.3, 7.0], [-5.0, 1.0, -6.0]])


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_masked_tokens_are_anchored_and_the_task_weights_stay(scores: TokenScores, weight: float) -> None:
    chosen = Anchored(GlobalTopFraction(0.3), weight).select(scores)
    assert chosen.flat().tolist() == GlobalTopFraction(0.3).select(scores).flat().tolist()
    assert anchors(chosen).tolist() == (weight * (chosen.flat() == 0)).tolist()
    assert chosen.report["anchored"] == chosen.report["masked"] == 3


def test_a_protected_end_is_trained_and_not_anchored(scores: TokenScores) -> None:
    for where in ("masked", "soft"):
        chosen = Anchored(GlobalTopFraction(0.3), where=where, temperature=2.0).select(scores)
        assert chosen.weights[1][2] == 1
        assert chosen.anchor[1][2] == 0
    letter = Anchored(GlobalTopFraction(0.3, protect_end=False)).select(scores)
    assert (letter.weights[1][2], letter.anchor[1][2]) == (0, 1)


def test_everything_anchored_everywhere_is_fine_tuning_with_a_kl(scores: TokenScores) -> None:
    chosen = Anchored(Everything(), 0.5, "everywhere").select(scores)
    assert chosen.flat().tolist() == [1] * 10
    assert anchors(chosen).tolist() == [0.5] * 10
    assert chosen.report["masked"] == 0
    assert chosen.report["anchored"] == 10
    masked = Anchored(GlobalTopFraction(0.3), where="everywhere").select(scores)
    assert masked.flat().tolist().count(0) == 3
    assert anchors(masked).tolist() == [1] * 10


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("protect_end", [True, False])
def test_a_soft_anchor_equals_its_formula(scores: TokenScores, temperature: float, protect_end: bool) -> None:
    inner = GlobalTopFraction(0.3, protect_end)
    chosen = Anchored(inner, 2.0, "soft", temperature).select(scores)
    cut = chosen.report["threshold"]
    for score, end, anchor in zip(
        scores.score().tolist(), scores.flat("end_of_turn").tolist(), anchors(chosen).tolist(), strict=True
    ):
        share = 1 / (1 + math.exp(min(-(score - cut) / temperature, 700)))
        wanted = 0.0 if share < 1e-3 or (protect_end and end) else 2.0 * share
        assert anchor == pytest.approx(wanted, rel=1e-5)
    assert chosen.flat().tolist() == inner.select(scores).flat().tolist()
    if temperature < 1:
        assert chosen.report["anchored"] == chosen.report["masked"], (
            "the others would be so weak that they are left out"
        )


def test_a_soft_anchor_grows_with_the_score_half_at_the_cut(scores: TokenScores) -> None:
    chosen = Anchored(GlobalTopFraction(0.3, protect_end=False), 1.0, "soft", 1.0).select(scores)
    order = np.argsort(scores.score())
    assert (np.diff(anchors(chosen)[order]) >= 0).all()
    assert anchors(chosen)[scores.score() == chosen.report["threshold"]].tolist() == [0.5]


def test_a_soft_anchor_becomes_the_mask_as_it_cools(scores: TokenScores) -> None:
    soft = Anchored(GlobalTopFraction(0.3), where="soft", temperature=1e-9).select(scores)
    hard = Anchored(GlobalTopFraction(0.3)).select(scores)
    at_cut = scores.score() == soft.report["threshold"]
    assert anchors(soft)[~at_cut].tolist() == anchors(hard)[~at_cut].tolist()


def test_the_weights_of_the_two_losses_are_those_of_the_wrapped_score(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[3.0, 1.0, 0.0, 0.0]], [[3.0, 0.0, 0.0, 0.0]])
    both = Anchored(GlobalTopFraction(0.25), where="soft").select(scores)
    utility = Anchored(GlobalTopFraction(0.25, degraded_weight=0.0), where="soft").select(scores)
    assert both.anchor[0][1] == utility.anchor[0][0] == 0.5
    assert both.anchor[0][0] < 0.5
    assert utility.anchor[0][1] == 0


def test_it_wraps_any_selection_that_decides_before_training(scores: TokenScores) -> None:
    class Rows(Selection):
        columns = ("base",)
        features = {"text": ("custom",)}  # noqa: RUF012

        def select(self, scores: TokenScores) -> TokenWeights:
            return row_weights(scores, np.array([1.0, 0.0, 0.5]), flavour="rows")

    wrapped = Anchored(Rows())
    assert (wrapped.columns, wrapped.features) == (("base",), {"text": ("custom",)})
    chosen = wrapped.select(scores)
    assert [row.tolist() for row in chosen.anchor.values()] == [[0] * 4, [1] * 3, [0] * 3]
    assert [row.tolist() for row in chosen.weights.values()] == [[1] * 4, [0] * 3, [0.5] * 3]
    assert chosen.report["flavour"] == "rows"
    assert (chosen.left_out, chosen.report.get("rows_left_out")) == (frozenset(), None)
    assert Anchored(PerRowTopFraction(0.34)).select(scores).report["anchored"] == 3
    assert Anchored(MaskFirst(2)).columns == ()
    assert Anchored().columns == ("utility", "degraded")
    assert Everything().columns == ()


def test_a_selection_that_finds_nothing_to_mask_by_itself_leaves_nothing_to_anchor(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "clean", [[-3.0] * 6, [-2.0] * 5])
    chosen = Anchored(ChainSelection(discard=None)).select(scores)
    assert (chosen.anchor, chosen.report["anchored"], chosen.report["masked"]) == ({}, 0, 0)
    with pytest.raises(ConfigError, match=r"masked anchors by what is masked, and nothing is: raise"):
        Anchored(ChainSelection(discard=0.0)).select(scores)


def test_anchors_are_written_and_read_back_and_count_in_the_digest(scores: TokenScores, tmp_path: Path) -> None:
    chosen = Anchored(GlobalTopFraction(0.3), 0.5).select(scores)
    chosen.save(tmp_path / "selection")
    again = TokenWeights.load(tmp_path / "selection")
    assert anchors(again).tolist() == anchors(chosen).tolist()
    assert again.digest() == chosen.digest() != GlobalTopFraction(0.3).select(scores).digest()
    assert again.report == chosen.report
    assert again.report["anchor"] == {"where": "masked", "weight": 0.5, "sum": 1.5}


def test_nothing_masked_is_nothing_to_anchor_by(scores: TokenScores) -> None:
    for where in ("masked", "soft"):
        with pytest.raises(ConfigError, match=rf"selection.where: {where} anchors by what is masked, and nothing is"):
            Anchored(GlobalTopFraction(0.0), where=where).select(scores)
    assert Anchored(GlobalTopFraction(0.0), where="everywhere").select(scores).report["anchored"] == 10


def test_what_cannot_be_wrapped_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ConfigError, match=r"selection.selection: ConstrainedSft weighs tokens during training, so what"
    ):
        Anchored(ConstrainedSft())
    with pytest.raises(ConfigError, match=r"selection.selection: it is anchored already"):
        Anchored(Anchored())
    with pytest.raises(
        ConfigError, match=r"selection.where: Everything masks no token to anchor: set it to everywhere"
    ):
        Anchored(Everything())
    for inner in (PerRowTopFraction(), MaskFirst(), Everything()):
        with pytest.raises(ConfigError, match=rf"soft grows from the one cut .*, and {type(inner).__name__} has none"):
            Anchored(inner, where="soft")
    with pytest.raises(ConfigError, match=r"loop.selection.where: 'here' is not one of masked, everywhere, soft"):
        Anchored(where="here")


@pytest.mark.parametrize("value", [-1, 2.5, 2.0, float("nan")])
def test_safety_rows_that_are_no_number_of_rows(value: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"loop.selection.safety_rows: {value} is not a number of rows: give 0 or more"
    ):
        Anchored(safety_rows=value)  # type: ignore[arg-type]
    assert Anchored(safety_rows=2).safety_rows == 2


@pytest.mark.parametrize("name", ["weight", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_anchor_of_no_weight(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"loop.selection.{name}: {value} does nothing or is no number: give one"):
        Anchored(**{name: value})
