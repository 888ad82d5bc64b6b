from pathlib import Path

import numpy as np
import pytest
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError
from toss_lightning.selection.mask_first import MaskFirst


def test_the_first_tokens_of_each_row_go(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0] * 4, [0.0] * 6, [0.0] * 3])
    weights = MaskFirst(2).select(scores).weights
    assert [row.tolist() for row in weights.values()] == [[0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1]]


def test_five_by_default_and_nothing_of_any_reference(tmp_path: Path) -> None:
    assert MaskFirst().columns == ()
    scores = make_scores(tmp_path / "scores", [[9.0, -9.0] * 4])
    chosen = MaskFirst().select(scores)
    assert chosen.flat().tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert chosen.report["masked"] == chosen.report["count"] == 5


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("protect_end", [True, False])
def test_equals_a_walk_over_rows(tmp_path: Path, count: int, protect_end: bool) -> None:
    sizes = np.random.default_rng(0).integers(1, 12, 30)
    scores = make_scores(tmp_path / "scores", [[0.0] * size for size in sizes])
    chosen = MaskFirst(count, protect_end).select(scores)
    saved = 0
    for row, size in enumerate(sizes):
        for position in range(size):
            is_end = position == size - 1
            saved += position < count and is_end and protect_end
            wanted = position >= count or (is_end and protect_end)
            assert chosen.weights[row][position] == wanted
    assert chosen.report["end_tokens_protected"] == saved


def test_short_replies_keep_their_end(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0] * 2, [0.0] * 7])
    assert MaskFirst().select(scores).weights[0].tolist() == [0, 1]
    letter = MaskFirst(protect_end=False).select(scores)
    assert letter.weights[0].tolist() == [0, 0]
    assert letter.report["rows_fully_masked"] == 1


def test_a_count_that_leaves_nothing_to_learn(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[0.0] * 6, [0.0] * 3])
    for protect_end in (True, False):
        with pytest.raises(ConfigError, match=r"selection.count: 5 leaves no response token .* 6 tokens\): lower it"):
            MaskFirst(5, protect_end).select(scores)
    assert MaskFirst(4).select(scores).report["kept"] == 3


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_that_masks_nothing(count: int) -> None:
    with pytest.raises(ConfigError, match=f"loop.selection.count: {count} masks nothing: give 1 or more"):
        MaskFirst(count)
