"""Rho-1 and token cleaning, against plain stable sorts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scores_on_disk import add_base, make_scores

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import TokenScores
from toss_lightning.selection.excess_loss import Rho1, TokenCleaning


def naive_kept(score: list[float], end: list[bool], discard: float, protect_end: bool) -> list[bool]:
    """Down a stable sort of what may go, until all but the wanted number are kept."""
    free = [index for index in range(len(score)) if not (protect_end and end[index])]
    going = min(round(discard * 1000) * len(score) // 1000, len(free))
    staying = sorted(free, key=lambda index: -score[index])[: len(free) - going]
    return [index in staying or index not in free for index in range(len(score))]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenScores]:
    """Stores of few different losses, so that most scores tie."""
    folder, generator = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    found = []
    for number in range(12):
        sizes = generator.integers(3, 12, 9)
        utility, base = ([generator.integers(0, 2 + number % 4, size) / 4 for size in sizes] for _ in range(2))
        found.append(add_base(make_scores(folder / str(number), utility), base))
    return found


@pytest.mark.parametrize("protect_end", [True, False])
@pytest.mark.parametrize("discard", [0.0, 0.29, 0.4, 0.6])
def test_token_cleaning_keeps_what_a_naive_stable_sort_keeps(
    stores: list[TokenScores], discard: float, protect_end: bool
) -> None:
    for scores in stores:
        score = (scores.flat("loss_base") - scores.flat("loss_utility")).tolist()
        chosen = TokenCleaning(discard, protect_end).select(scores)
        wanted = naive_kept(score, scores.flat("end_of_turn").tolist(), discard, protect_end)
        assert (chosen.flat() == 1).tolist() == wanted
        assert chosen.report["masked"] == round(discard * 1000) * len(score) // 1000


def test_token_cleaning_keeps_what_the_utility_reference_has_learned(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 3.0, 2.0, 5.0], [0.5, 4.0]])
    add_base(scores, [[3.0, 3.0, 9.0, 5.0], [0.6, 3.0]])
    chosen = TokenCleaning(discard=0.5).select(scores)
    assert TokenCleaning().columns == ("base", "utility")
    # scores 2, 0, 7, (0) and 0.1, (-1): the ends in brackets stay
    assert [row.tolist() for row in chosen.weights.values()] == [[0, 0, 1, 1], [0, 1]]
    assert chosen.report["threshold"] == pytest.approx(2.0)
    assert chosen.report["end_tokens_protected"] == 2
    letter = TokenCleaning(discard=0.5, protect_end=False).select(scores)
    assert [row.tolist() for row in letter.weights.values()] == [[1, 0, 1, 0], [1, 0]]
    assert letter.report["end_tokens_protected"] == 0


def test_token_cleaning_of_more_than_may_be_masked(tmp_path: Path) -> None:
    scores = add_base(make_scores(tmp_path / "scores", [[1.0, 0.0], [1.0, 0.0]]), [[0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ConfigError, match="asks for 3 of 4 tokens, but only 2 are not end-of-turn tokens"):
        TokenCleaning(0.9).select(scores)


def test_token_cleaning_by_a_reference_that_learned_nothing(tmp_path: Path) -> None:
    losses = [[1.0, 3.0, 2.0, 5.0], [0.5, 4.0]]
    scores = add_base(make_scores(tmp_path / "scores", losses), losses)
    with pytest.raises(
        StoreError, match=r"scores: all 4 tokens that may go have the same score \(0\), .* learned nothing"
    ):
        TokenCleaning(0.5).select(scores)
    assert TokenCleaning(0.0).select(scores).flat().tolist() == [1.0] * 6
    assert TokenCleaning(0.67).select(scores).flat().tolist() == [0, 0, 0, 1, 0, 1], "everything that may go goes"
    one = add_base(make_scores(tmp_path / "one", [[1.0]]), [[1.0]])
    assert TokenCleaning(0.9, protect_end=False).select(one).flat().tolist() == [1.0]


def test_scores_that_are_missing_or_no_numbers(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, float("nan"), 0.0]])
    with pytest.raises(StoreError, match="no column loss_base here"):
        TokenCleaning().select(scores)
    with pytest.raises(StoreError, match="1 values of loss_utility are not finite: score the custom set again"):
        Rho1().select(scores)
    with pytest.raises(StoreError, match="1 token scores are not a number: score the custom set again"):
        TokenCleaning().select(add_base(scores, [[0.0, 0.0, 0.0]]))
    infinite = add_base(make_scores(tmp_path / "infinite", [[1.0, 2.0, 0.0]]), [[0.0, float("inf"), 0.0]])
    with pytest.raises(StoreError, match=r"1 token scores are not a number: .* \(not so: 1 of loss_base\)"):
        TokenCleaning().select(infinite)


def step(stores: list[TokenScores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An optimizer step over the tokens of all stores; losses in quarters, so that many tie."""
    columns = {name: np.concatenate([scores.flat(name) for scores in stores]) for name in ("loss_utility", "loss_base")}
    end = np.concatenate([scores.flat("end_of_turn") for scores in stores]).astype(np.float32)
    return torch.from_numpy(columns["loss_base"].copy()), {
        "loss_utility": torch.from_numpy(columns["loss_utility"].copy()),
        "end_of_turn": torch.from_numpy(end),
    }


@pytest.mark.parametrize("protect_end", [True, False])
@pytest.mark.parametrize("discard", [0.0, 0.29, 0.4, 0.99])
def test_rho_1_keeps_what_a_naive_stable_sort_of_the_step_keeps(
    stores: list[TokenScores], discard: float, protect_end: bool
) -> None:
    losses, tokens = step(stores)
    weights = Rho1(discard, protect_end).weigh(losses, tokens)
    assert weights.dtype == torch.float32
    assert set(weights.tolist()) <= {0.0, 1.0}
    excess, end = (losses - tokens["loss_utility"]).tolist(), tokens["end_of_turn"].bool().tolist()
    assert (weights == 1).tolist() == naive_kept(excess, end, discard, protect_end)


def test_rho_1_follows_the_target_as_it_learns() -> None:
    tokens = {"loss_utility": torch.tensor([1.0, 1.0, 1.0, 1.0]), "end_of_turn": torch.zeros(4)}
    rule = Rho1(discard=0.5)
    assert rule.weigh(torch.tensor([5.0, 4.0, 3.0, 2.0]), tokens).tolist() == [1, 1, 0, 0]
    assert rule.weigh(torch.tensor([0.5, 0.6, 3.0, 2.0]), tokens).tolist() == [0, 0, 1, 1]


def test_rho_1_sees_the_whole_step_and_is_handed_the_utility_losses(tmp_path: Path) -> None:
    assert Rho1.whole_step
    assert Rho1().columns == ("utility",)
    chosen = Rho1().select(make_scores(tmp_path / "scores", [[1.0, 2.0], [3.0]]))
    assert chosen.flat().tolist() == [1, 1, 1]
    assert {name: [row.tolist() for row in rows.values()] for name, rows in chosen.columns.items()} == {
        "loss_utility": [[1, 2], [3]],
        "end_of_turn": [[0, 1], [1]],
    }


def test_rho_1_of_one_token_and_of_none() -> None:
    for count in (0, 1):
        tokens = {"loss_utility": torch.zeros(count), "end_of_turn": torch.zeros(count)}
        assert Rho1().weigh(torch.ones(count), tokens).tolist() == [1.0] * count


@pytest.mark.parametrize("method", [Rho1, TokenCleaning])
@pytest.mark.parametrize("discard", [-0.1, 1.0, float("nan")])
def test_a_discard_that_is_no_share(method: type, discard: float) -> None:
    with pytest.raises(ConfigError, match=rf"selection.discard: {discard} is not a share: give a number in \[0, 1\)"):
        method(discard)
