"""Whole rows: random ones, and TOSS on the level of rows."""

import math
from pathlib import Path

import numpy as np
import pytest
from runs import artifacts, tiny_fit
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import TokenScores
from toss_lightning.selection import TokenWeights
from toss_lightning.selection.rows import RandomRows, TossRows, keep_rows


def left_out(weights: TokenWeights) -> list[int]:
    """The rows of weight 0; fails unless a weight is the same over its row."""
    assert all(len(set(weight.tolist())) == 1 for weight in weights.weights.values())
    return [row_id for row_id, weight in weights.weights.items() if not weight.any()]


@pytest.fixture
def scores(tmp_path: Path) -> TokenScores:
    rows = [[9.0, -9.0, 0.0], [2.0, 2.0, 2.0], [3.0, 3.0, -3.0], [1.0, 1.0], [8.0] + [-1.0] * 9]
    return make_scores(tmp_path / "scores", rows, labels=["harmful", "harmful", "benign", "benign", "benign"])


def test_random_rows_are_as_many_as_asked_and_fixed_by_the_seed(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0] * (1 + row % 3) for row in range(50)])
    draws = [tuple(left_out(RandomRows(0.29, seed).select(scores))) for seed in range(200)]
    assert all(len(draw) == 14 for draw in draws), "floor(0.29 * 50), whatever the lengths of the rows"
    assert draws[0] == tuple(left_out(RandomRows(0.29, 0).select(scores)))
    assert len(set(draws)) == 200
    often = np.bincount(np.concatenate(draws), minlength=50) / 200
    assert abs(often - 0.28).max() < 0.16, "5 standard deviations: every row is as likely as any other"


def test_random_rows_follow_the_seed_of_the_run_unless_they_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0]] * 40)
    own = left_out(RandomRows(0.5, seed=7).select(scores))
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert left_out(RandomRows(0.5).select(scores)) == own
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert left_out(RandomRows(0.5).select(scores)) != own
    assert left_out(RandomRows(0.5, seed=7).select(scores)) == own


def test_random_rows_read_no_token_loss(tmp_path: Path) -> None:
    assert RandomRows().columns == ()
    assert RandomRows().features == {}


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("mean", [1, 2, 3, 0, 4]),  # 2, 1, 1, 0, -0.1
        ("max", [0, 4, 2, 1, 3]),  # 9, 8, 3, 2, 1
        ("top_share", [0, 2, 1, 3, 4]),  # of 2, 2, 2, 1 and 7 tokens: 4.5, 3, 2, 1, 0.29
    ],
)
def test_the_riskiest_rows_go_by_any_of_three_row_scores(scores: TokenScores, by: str, order: list[int]) -> None:
    for count in range(5):
        selection = TossRows(count / 5, by, top_share=0.7)
        assert left_out(selection.select(scores)) == sorted(order[:count])


def test_a_top_share_is_at_least_one_token_and_at_most_the_row(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    scores = make_scores(tmp_path / "scores", [generator.normal(size=size) for size in generator.integers(1, 30, 40)])
    for share, same_as in ((1e-9, "max"), (1.0, "mean")):
        assert left_out(TossRows(0.4, "top_share", share).select(scores)) == left_out(
            TossRows(0.4, same_as).select(scores)
        )


def test_a_top_share_is_rounded_down(tmp_path: Path) -> None:
    # 0.6 of 3 tokens is 1.8 and 0.6 of 6 is 3.6: one and three, where rounding would give two and four
    rows = [[9.0, 0.0, 0.0], [8.0, 7.0, 0.0], [6.0, 6.0, 6.0, -9.0, -9.0, -9.0], [5.0, 5.0, 5.0]]
    scores = make_scores(tmp_path / "scores", rows)
    naive = [np.mean(sorted(row)[len(row) - math.floor(0.6 * len(row)) :]) for row in rows]
    assert naive == [9.0, 8.0, 6.0, 5.0]
    for count in range(4):
        assert left_out(TossRows(count / 4, "top_share", 0.6).select(scores)) == list(range(count))
    assert TossRows(0.5, "top_share", 0.6).select(scores).report["threshold"] == 8.0
    assert TossRows(0.75, "top_share", 0.6).select(scores).report["threshold"] == 6.0


@pytest.mark.parametrize("by", ["mean", "max", "top_share"])
def test_rows_whose_scores_are_all_equal_are_not_told_apart(tmp_path: Path, by: str) -> None:
    losses = [[1.5, 0.5, 2.0], [0.25], [3.0, 1.0]]
    scores = make_scores(tmp_path / "scores", losses, losses)
    with pytest.raises(
        StoreError, match=r"scores: all 3 rows have the same score \(0\), .*: are both references the same"
    ):
        TossRows(0.4, by).select(scores)
    assert left_out(TossRows(0.0, by).select(scores)) == []
    assert left_out(TossRows(0.9, by).select(make_scores(tmp_path / "one", [[3.0]]))) == []


def test_losses_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[math.inf, 0.0], [1.0, 2.0]])
    with pytest.raises(StoreError, match="1 token scores are not a number: score the custom set again"):
        TossRows(0.5).select(scores)


@pytest.mark.parametrize("name", ["utility_weight", "degraded_weight"])
def test_weights_of_the_two_losses_that_make_no_score_are_refused(name: str) -> None:
    for value in (math.nan, -math.inf):
        with pytest.raises(ConfigError, match=f"loop.selection.{name}: {value} is no weight: give a finite number"):
            TossRows(**{name: value})
    with pytest.raises(ConfigError, match=r"loop.selection.utility_weight: with degraded_weight it is 0"):
        TossRows(utility_weight=0.0, degraded_weight=0.0)


def test_weights_of_the_two_losses_change_the_row_scores(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[3.0], [1.0]], [[3.0], [0.0]])
    assert left_out(TossRows(0.5).select(scores)) == [1]
    assert left_out(TossRows(0.5, degraded_weight=0.0).select(scores)) == [0]
    assert left_out(TossRows(0.5, utility_weight=0.0, degraded_weight=-1.0).select(scores)) == [0]


def test_ties_go_to_the_earliest_row(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0], [2.0], [1.0], [2.0], [1.0]])
    assert left_out(TossRows(0.6).select(scores)) == [0, 1, 3]


def test_the_report_says_which_rows_and_how_many_tokens_went(scores: TokenScores) -> None:
    report = TossRows(0.4).select(scores).report
    assert {"rows": 5, "rows_kept": 3, "rows_fully_masked": 2, "tokens": 21, "masked": 6}.items() <= report.items()
    assert {"discard": 0.4, "by": "mean", "threshold": 1.0}.items() <= report.items()
    assert report["rows_left_out_per_label"] == {"benign": 1, "harmful": 1}
    assert report["masked_share_per_label"]["harmful"]["share_of_its_tokens_masked"] == 0.5
    assert TossRows(0.0).select(scores).report["threshold"] is None
    assert RandomRows(0.4, seed=3).select(scores).report["seed"] == 3


def test_rows_of_many_labels_are_counted_under_the_names_of_the_other_tables(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0]] * 60, labels=[f"{row:02}" for row in range(60)])
    report = keep_rows(scores, np.zeros(60, dtype=bool)).report
    assert report["rows_left_out_per_label"].keys() == report["masked_share_per_label"].keys()
    assert report["rows_left_out_per_label"]["(10 more)"] == 10


def test_kept_rows_may_count_differently(scores: TokenScores) -> None:
    kept = np.array([True, False, True, True, True])
    weights = keep_rows(scores, kept, np.array([0.5, 9.0, 2.0, 1.0, 1.0])).weights
    assert [weight[0] for weight in weights.values()] == [0.5, 0.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("selection", [RandomRows, TossRows])
@pytest.mark.parametrize("discard", [-0.1, 1.0])
def test_a_discard_that_is_no_share_is_refused(selection: type, discard: float) -> None:
    with pytest.raises(ConfigError, match=rf"selection.discard: {discard} is not a share: give a number in \[0, 1\)"):
        selection(discard)


def test_other_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"selection.by: 'median' is none of its values: use mean, max, top_share"):
        TossRows(by="median")  # type: ignore[arg-type]
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match=rf"selection.top_share: {share} is not a share"):
            TossRows(by="top_share", top_share=share)


def test_the_adapter_is_that_of_plain_fine_tuning_without_the_rows(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path
) -> None:
    loop = {"epochs": 2, "selection": RandomRows(0.4, seed=3)}
    fit = tiny_fit(tiny_model, tiny_sets, tmp_path / "ours", plan=("score", "select", "target"), loop=loop)
    out = TokenWeights.load(tmp_path / "ours" / "selection").left_out
    assert len(out) == 5
    kept = tmp_path / "kept.jsonl"
    lines = Path(tiny_sets["custom"]).read_text().splitlines(keepends=True)
    kept.write_text("".join(line for row, line in enumerate(lines) if row not in out))
    plain = {**tiny_sets, "custom": str(kept)}
    other = tiny_fit(tiny_model, plain, tmp_path / "plain", plan=("target",), loop={"epochs": 2})
    name = "adapters/target/adapter_model.safetensors"
    assert artifacts(tmp_path / "ours")[name] == artifacts(tmp_path / "plain")[name]
    assert fit.global_step == other.global_step == 2 * 3
