"""Which rows a round of TOSS-Pro promotes: Algorithm 1 of arXiv 2603.01185, walked token by token."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError
from toss_lightning.scores import TokenScores
from toss_lightning.selection import promote


def walk(scores: TokenScores, count: int, taken: Collection[int] = ()) -> list[int]:
    """Down the ranked tokens, taking the row of each unless it is taken, until there are enough."""
    lengths = np.diff(scores.offsets)
    row_of = [row_id for row_id, length in zip(scores.row_ids.tolist(), lengths, strict=True) for _ in range(length)]
    score, chosen = scores.score().tolist(), []
    for token in sorted(range(len(score)), key=lambda token: -score[token]):
        if row_of[token] not in taken and row_of[token] not in chosen and len(chosen) < count:
            chosen.append(row_of[token])
    return chosen


def highest_means(scores: TokenScores, count: int, taken: Collection[int] = ()) -> list[int]:
    rows = zip(scores.row_ids.tolist(), scores.per_row(scores.score()), strict=True)
    means = {row_id: sum(row.tolist()) / len(row) for row_id, row in rows if row_id not in taken}
    return sorted(means, key=lambda row_id: -means[row_id])[:count]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenScores]:
    """Many small stores of few different scores, so that most tokens tie; single rows and single tokens among them."""
    folder, generator = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    found = []
    for number in range(80):
        sizes = generator.integers(1, 7, generator.integers(1, 9))
        # quarters: their sums and differences are exact
        columns = [[generator.integers(0, 1 + number % 5, size) / 4 for size in sizes] for _ in range(2)]
        found.append(make_scores(folder / str(number), *columns))
    return found


@pytest.mark.parametrize(("how", "naive"), [("top_tokens", walk), ("row_mean", highest_means)])
def test_equals_a_naive_implementation_ties_included(stores: list[TokenScores], how: str, naive) -> None:
    generator = np.random.default_rng(1)
    for scores in stores:
        rows = len(scores.row_ids)
        for taken in ((), generator.choice(rows, generator.integers(0, rows), replace=False).tolist()):
            for count in {0, 1, int(generator.integers(0, rows - len(taken) + 1)), rows - len(taken)}:
                chosen = promote(scores, count, how, taken)
                assert chosen == naive(scores, count, taken), (scores.path, count, taken)
                assert all(type(row_id) is int for row_id in chosen), "they go into JSON and checkpoints"


def test_the_paper_takes_the_row_of_the_riskiest_token_and_row_mean_the_riskiest_row(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[9.0, 0.0, 0.0, 0.0], [5.0, 5.0], [6.0, 1.0]])
    assert promote(scores, 2) == [0, 2]
    assert promote(scores, 2, "row_mean") == [1, 2]


def test_a_row_is_promoted_once_however_many_of_its_tokens_are_on_top(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.1], [9.0, 8.0, 7.0], [0.2]])
    assert promote(scores, 2) == [1, 2]


def test_rows_that_were_taken_before_make_room_for_the_next(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[3.0], [2.0], [1.0], [0.0]])
    assert promote(scores, 2) == [0, 1]
    assert promote(scores, 2, taken=[0, 1]) == [2, 3]
    assert promote(scores, 2, taken={0, 99}) == [1, 2]


def test_promotion_follows_the_last_round(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[2.0], [2.0]], [[0.0], [1.0]], later_rounds=[[[1.0], [0.0]]])
    assert promote(scores, 1) == [1]
    assert promote(TokenScores(scores.path, 0), 1) == [0]


def test_random_rows_are_fixed_by_the_seed_and_reach_every_row(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[float(row), 0.0] for row in range(10)])
    assert promote(scores, 4, "random", seed=[1, 2]) == promote(scores, 4, "random", seed=[1, 2])
    draws = [promote(scores, 4, "random", taken=[3], seed=[1, round]) for round in range(40)]
    assert all(len(set(draw)) == 4 for draw in draws)
    assert {row for draw in draws for row in draw} == set(range(10)) - {3}
    assert len({tuple(draw) for draw in draws}) > 30, "each round draws others"
    assert promote(scores, 0, "random") == []


@pytest.mark.parametrize("how", ["top_tokens", "row_mean", "random"])
def test_more_rows_than_are_left(tmp_path: Path, how: str) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0], [2.0], [3.0]])
    with pytest.raises(ConfigError, match=r"loop.promote: 3 rows .* only 2 of the custom set's 3 rows are left: lower"):
        promote(scores, 3, how, taken=[1])
    assert sorted(promote(scores, 2, how, taken=[1])) == [0, 2]
