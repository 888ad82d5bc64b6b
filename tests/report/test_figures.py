"""The numbers of a report: each against the loop that one would write down first."""

from pathlib import Path

import numpy as np
import pytest
from scores_on_disk import make_scores
from sklearn.metrics import roc_auc_score

from toss_lightning.report.figures import (
    FEW,
    Group,
    auroc,
    by_place,
    found_by_share,
    groups_of,
    histogram,
    knowledge,
    masked_tokens,
)
from toss_lightning.report.tokens import RiskScore, risk_score
from toss_lightning.scores import TokenScores
from toss_lightning.selection.base import mask_weights

LENGTHS = [3, 1, 12, 7, 5, 9, 2, 30, 4, 8, 6, 11]


def made(path: Path, labels: list[str | None] | None = None, lengths: list[int] = LENGTHS) -> TokenScores:
    generator = np.random.default_rng(0)
    utility, degraded = ([generator.integers(0, 4, size).tolist() for size in lengths] for _ in range(2))
    return make_scores(path, utility, degraded, labels)


def score_of(values: np.ndarray) -> RiskScore:
    return RiskScore(values.astype(np.float32), ("utility", "degraded"))


def halves(count: int) -> list[Group]:
    is_first = np.arange(count) % 3 == 0
    return [Group("first", is_first), Group("second", ~is_first)]


# --- AUROC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [2, 5, 100000])
def test_auroc_is_that_of_scikit_learn_with_many_ties_and_few(kinds: int) -> None:
    generator = np.random.default_rng(kinds)
    for _ in range(20):
        values = (generator.integers(0, kinds, 200) / 7).astype(np.float32)
        positive = generator.random(200) < 0.3
        assert auroc(values, positive) == pytest.approx(roc_auc_score(positive, values), abs=1e-12)


def test_auroc_of_scores_that_know_everything_nothing_and_the_opposite() -> None:
    positive = np.array([False, False, True, True, True])
    assert auroc(np.array([0.0, 1, 2, 3, 4]), positive) == 1
    assert auroc(np.zeros(5), positive) == 0.5
    assert auroc(-np.array([0.0, 1, 2, 3, 4]), positive) == 0


def test_what_scores_know_is_of_tokens_and_of_rows_that_have_a_label(tmp_path: Path) -> None:
    labels = ["harmful", "benign", None, "chat", "harmful", "benign", None, "harmful", "benign", "chat", "chat", None]
    scores = made(tmp_path / "scores", labels)
    score = risk_score(scores)
    assert score is not None
    rows = [row for row, label in zip(scores.per_row(score.values), labels, strict=True) if label is not None]
    harmful = [label == "harmful" for label in labels if label is not None]
    of_tokens = np.repeat(harmful, [len(row) for row in rows])
    known = knowledge(scores, score)
    assert known is not None
    assert known.tokens == pytest.approx(roc_auc_score(of_tokens, np.concatenate(rows)))
    assert known.rows == pytest.approx(roc_auc_score(harmful, [row.mean() for row in rows]))


@pytest.mark.parametrize("labels", [None, ["benign"] * 12, ["harmful"] * 12, ["harmful"] * 6 + [None] * 6])
def test_without_both_kinds_of_rows_there_is_nothing_to_know(tmp_path: Path, labels: list[str | None] | None) -> None:
    scores = made(tmp_path / "scores", labels)
    score = risk_score(scores)
    assert score is not None
    assert knowledge(scores, score) is None


# --- groups ---------------------------------------------------------------------------------------------------------


def grouped(path: Path, labels: list[str | None] | None, lengths: list[int]) -> dict[str, list[int]]:
    """Name of a group -> its rows, all of whose tokens must be in it."""
    scores = made(path, labels, lengths)
    found = {}
    for group in groups_of(scores):
        rows = scores.per_row(group.tokens)
        assert all(row.all() or not row.any() for row in rows)
        found[group.name] = [at for at, row in enumerate(rows) if row.all()]
    return found


def test_harmful_rows_come_first_and_then_the_label_with_most_tokens(tmp_path: Path) -> None:
    labels: list[str | None] = ["few", "many", "harmful", "many"]
    found = grouped(tmp_path / "scores", labels, [5, 4, 1, 4])
    assert list(found.items()) == [("harmful", [2]), ("many", [1, 3]), ("few", [0])]


def test_more_labels_than_are_told_apart(tmp_path: Path) -> None:
    labels: list[str | None] = ["a", "b", "c", "harmful", "d"]
    found = grouped(tmp_path / "scores", labels, [2, 9, 3, 1, 4])
    assert list(found.items()) == [("harmful", [3]), ("b", [1]), ("(3 more)", [0, 2, 4])]


def test_rows_without_a_label_are_told_from_others(tmp_path: Path) -> None:
    labels: list[str | None] = [None, "benign", "harmful", None]
    found = grouped(tmp_path / "scores", labels, [2, 9, 3, 1])
    assert list(found.items()) == [("harmful", [2]), ("benign", [1]), ("no label", [0, 3])]


def test_more_labels_than_are_told_apart_and_rows_without_one(tmp_path: Path) -> None:
    labels: list[str | None] = ["a", None, "b", "c", "d", None]
    found = grouped(tmp_path / "scores", labels, [5, 1, 4, 3, 2, 1])
    assert list(found.items()) == [("a", [0]), ("b", [2]), ("(2 more)", [3, 4]), ("no label", [1, 5])]


def test_all_rows_are_one_group_where_none_has_a_label(tmp_path: Path) -> None:
    assert grouped(tmp_path / "scores", None, [2, 9, 3]) == {"all rows": [0, 1, 2]}


# --- how scores lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 9, 150, 1000])
def test_the_shares_of_a_histogram_are_all_tokens_of_a_group(size: int) -> None:
    for seed in range(20):
        score = score_of(np.random.default_rng(seed).normal(size=size))
        edges, shares = histogram(score, halves(size))
        assert len(edges) == 49
        assert [len(one) for one in shares] == [48, 48]
        assert [one.sum() for one in shares] == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize("value", [0.0, -3.3, 0.1, 1e5])
def test_a_histogram_of_scores_that_are_all_equal(value: float) -> None:
    edges, shares = histogram(score_of(np.full(7, value)), halves(7))
    assert edges[0] < value < edges[-1]
    for one in shares:
        assert one.max() == one.sum() == 1


def test_what_lies_far_out_is_in_the_outermost_bins() -> None:
    values = np.concatenate([[-1e6], np.linspace(0, 1, 998), [1e6]])
    edges, (shares,) = histogram(score_of(values), [Group("all", np.ones(1000, dtype=bool))], bins=10)
    assert -0.1 < edges[0] < edges[-1] < 1.1
    assert shares == pytest.approx(np.full(10, 0.1), abs=0.01)


def test_what_a_mask_of_the_highest_scores_would_hit() -> None:
    """Equal scores are taken together: no order among them says anything."""
    for values in (np.random.default_rng(0).integers(0, 9, 50), np.random.default_rng(1).normal(size=50)):
        groups, shares = halves(50), [0.0, 0.1, 0.5, 0.62, 1.0]
        ranked = sorted(values.astype(np.float32).tolist(), reverse=True)
        for group, found in zip(groups, found_by_share(score_of(values), groups, shares), strict=True):
            own = values.astype(np.float32)[group.tokens].tolist()
            hit = [sum(value >= ranked[round(share * 50) - 1] for value in own) for share in shares[1:]]
            assert found == pytest.approx([0, *(count / len(own) for count in hit)])
            assert (found[0], found[-1]) == (0, 1)


def test_the_share_of_tokens_is_that_of_a_discard_ratio() -> None:
    """0.29 of 100 is 29, though 0.29 * 100 is 28.999..."""
    (found,) = found_by_share(score_of(np.arange(100.0)), [Group("all", np.ones(100, dtype=bool))], [0.29, 0.58])
    assert found == [0.29, 0.58]


# --- where in a reply -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [40, 4])
def test_means_at_each_place_of_a_reply(tmp_path: Path, most: int) -> None:
    labels: list[str | None] = ["harmful" if at % 2 else "benign" for at in range(30)]
    lengths = np.random.default_rng(1).integers(1, 14, 30).tolist()
    scores = made(tmp_path / "scores", labels, lengths)
    values = np.random.default_rng(2).normal(size=sum(lengths)).astype(np.float32)
    found = dict(zip(["harmful", "benign"], by_place(scores, values, groups_of(scores), most), strict=True))
    for name, means in found.items():
        rows = [row for row, label in zip(scores.per_row(values), labels, strict=True) if label == name]
        expected = []
        for place in range(most):
            there = [row[place] for row in rows if len(row) > place]
            if len(there) < FEW:
                break
            expected.append(np.mean(there))
        assert len(means) == len(expected) > 0
        assert means == pytest.approx(expected, abs=1e-6)


def test_a_group_of_few_tokens_has_no_means(tmp_path: Path) -> None:
    labels: list[str | None] = ["harmful"] * (FEW - 1) + ["benign"] * FEW
    scores = made(tmp_path / "scores", labels, [2] * len(labels))
    values = np.ones(2 * len(labels))
    assert by_place(scores, values, groups_of(scores)) == [[], [1.0, 1.0]]


def test_the_tokens_that_are_masked_most_often(tmp_path: Path) -> None:
    scores = made(tmp_path / "scores")
    masked = np.random.default_rng(3).random(sum(LENGTHS)) < 0.4
    counts: dict[int, list[int]] = {}
    flat = iter(masked.tolist())
    for size in LENGTHS:
        for token in range(2, size + 2):  # as make_scores numbers them
            of_token = counts.setdefault(token, [0, 0])
            of_token[0] += next(flat)
            of_token[1] += 1
    expected = [(token, *counts[token]) for token in sorted(counts, key=lambda token: (-counts[token][0], token))]
    weights = mask_weights(scores, masked)
    assert masked_tokens(scores, weights, 5) == expected[:5]
    assert masked_tokens(scores, weights, 1000) == [one for one in expected if one[1]]


def test_nothing_masked_is_nothing_to_list(tmp_path: Path) -> None:
    scores = made(tmp_path / "scores")
    assert masked_tokens(scores, mask_weights(scores, np.zeros(sum(LENGTHS), dtype=bool)), 5) == []
