"""SEAL: the selector's own step, and a small bilevel problem whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scores_on_disk import make_scores
from torch import Tensor

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import ScoreWriter
from toss_lightning.selection.seal import Seal, SelectorTraining

ROWS = 24
CONFLICTING = range(0, ROWS, 3)


def by_autograd(logits: Tensor, index: Tensor, losses: Tensor) -> Tensor:
    """The selector's loss as the paper writes it."""
    return (len(logits) * logits.softmax(0)[index] * losses.detach()).mean()


@pytest.mark.parametrize("index", [[3], [0, 5, 2], [4, 4, 1, 4], list(range(9))])
def test_the_gradient_is_that_of_autograd(index: list[int]) -> None:
    training, generator = SelectorTraining(9), torch.Generator().manual_seed(0)
    training.logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    losses = torch.rand(len(index), generator=generator, dtype=torch.float64) * 3
    by_autograd(training.logits, torch.tensor(index), losses).backward()
    torch.testing.assert_close(training.gradient(torch.tensor(index), losses), training.logits.grad)


def test_its_steps_are_those_of_torchs_adam() -> None:
    training, generator = SelectorTraining(ROWS, lr=0.03), torch.Generator().manual_seed(1)
    logits = torch.full((ROWS,), 0.1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.03, betas=(0.9, 0.95))
    for _ in range(50):
        index = torch.randperm(ROWS, generator=generator)[:5]
        losses = torch.rand(5, generator=generator)
        adam.zero_grad()
        by_autograd(logits, index, losses.double()).backward()
        adam.step()
        training.update(index, losses)
    torch.testing.assert_close(training.logits, logits.detach())


def test_factors_are_ones_at_first_and_average_one_over_all_rows() -> None:
    training, everything = SelectorTraining(ROWS), torch.arange(ROWS)
    assert training.factors(torch.tensor([7, 2])).tolist() == [1.0, 1.0]
    training.update(torch.tensor([7]), torch.tensor([2.0]))
    factors = training.factors(everything)
    assert factors.dtype == torch.float32
    assert factors.mean().item() == pytest.approx(1.0)
    assert factors.argmin() == 7
    assert training.factors(torch.tensor([7])).item() == factors[7].item() < 1, "also of a row by itself"


def learn(batch: int, epochs: int, seed: int = 0, lr: float = 0.02) -> SelectorTraining:
    """A linear model with safe rows ``y = x . a``, custom rows that agree, and custom rows that say ``y = -x . a``.

    The bilevel solution puts all weight on rows that agree: the safe optimum ``theta = a`` fits these exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    a = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    x += torch.outer(torch.ones(ROWS) - x @ a, a)  # x . a is 1 in every row, so that all conflict as much
    sign = torch.ones(ROWS, dtype=torch.float64)
    sign[list(CONFLICTING)] = -1
    safe_x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    model, training = torch.optim.SGD([theta], lr=0.05), SelectorTraining(ROWS, lr=lr)
    for epoch in range(epochs):
        gamma = training.gamma(epoch)
        for index in torch.randperm(ROWS, generator=generator).split(batch):
            losses = (x[index] @ theta - sign[index] * (x[index] @ a)).square()
            safe = (safe_x @ (theta - a)).square().mean()
            model.zero_grad()
            (gamma * safe + (1 - gamma) * (training.factors(index) * losses).mean()).backward()
            model.step()
            training.update(index, losses.detach())
    return training


@pytest.mark.parametrize("batch", [1, 4, ROWS])
def test_rows_that_conflict_with_the_safe_ones_end_lowest_at_any_batch_size(batch: int) -> None:
    training = learn(batch, epochs=20 if batch < ROWS else 100)
    lowest = training.logits.argsort()[: len(CONFLICTING)]
    assert sorted(lowest.tolist()) == list(CONFLICTING)
    factors = training.factors(torch.arange(ROWS))
    assert factors[list(CONFLICTING)].max() < 0.9 < factors.max()


def test_nothing_is_learned_from_rows_that_are_all_alike() -> None:
    training = SelectorTraining(6)
    for _ in range(10):
        training.update(torch.arange(6), torch.ones(6))
    torch.testing.assert_close(training.factors(torch.arange(6)), torch.ones(6))


def test_the_safe_loss_loses_weight_from_the_second_epoch_on() -> None:
    training = SelectorTraining(3)
    assert [training.gamma(epoch) for epoch in range(4)] == pytest.approx([1.0, 0.97, 0.94, 0.91])
    steep = SelectorTraining(3, gamma=0.5, gamma_decay=0.2)
    assert [steep.gamma(epoch) for epoch in range(5)] == pytest.approx([0.5, 0.3, 0.1, 0.0, 0.0])


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def train(training: SelectorTraining, steps: range) -> SelectorTraining:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            index = torch.randperm(ROWS, generator=generator)[:4]
            training.update(index, torch.rand(4, generator=generator))
        return training

    whole, half = train(SelectorTraining(ROWS), range(20)), train(SelectorTraining(ROWS), range(11))
    torch.save(half.state(), tmp_path / "state.pt")
    train(half, range(11, 15))  # what was saved stays as it was
    resumed = SelectorTraining(ROWS)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert train(resumed, range(11, 20)).logits.tolist() == whole.logits.tolist()
    with pytest.raises(StoreError, match=r"data.custom: the selector was trained on 24 rows, not on 23: start a new"):
        SelectorTraining(ROWS - 1).load_state(half.state())


def logits_of(path: Path, logits: list[float]):
    scores = make_scores(path, [[1.0, 0.0]] * len(logits), labels=["harmful", "benign"] * (len(logits) // 2))
    ScoreWriter(path, {}).write_feature("selector", "custom", range(len(logits)), logits, "made for this test")
    return scores


def test_the_rows_of_the_highest_logits_stay_ties_to_the_earliest(tmp_path: Path) -> None:
    scores = logits_of(tmp_path / "scores", [0.0, 2.0, 1.0, 1.0, 1.0, 3.0])
    chosen = Seal(discard=0.5).select(scores)
    assert [bool(weight.any()) for weight in chosen.weights.values()] == [False, True, True, False, False, True]
    assert chosen.report["rows_left_out_per_label"] == {"benign": 1, "harmful": 2}
    assert chosen.report["threshold"] == 1.0
    assert chosen.report["logits"] == {"lowest": 0.0, "mean": pytest.approx(8 / 6), "highest": 3.0}
    # floor(0.2 * 6) rows go, so that at least the share that was asked for stays
    assert Seal().select(scores).report["rows_kept"] == 5


def test_a_trained_selector_keeps_the_rows_that_agree(tmp_path: Path) -> None:
    scores = logits_of(tmp_path / "scores", learn(4, epochs=20).logits.tolist())
    weights = Seal(discard=0.34).select(scores).weights
    assert [row_id for row_id, weight in weights.items() if not weight.any()] == list(CONFLICTING)


def test_an_untrained_selector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the selector prefers no row: put seal before score in loop.plan"):
        Seal().select(logits_of(tmp_path / "scores", SelectorTraining(4).logits.tolist()))


def test_the_settings_reach_the_training() -> None:
    selection = Seal(lr=0.5, init=0.3, gamma=0.8, gamma_decay=0.1)
    training = selection.training(5)
    assert training.logits.tolist() == [0.3] * 5
    assert training.gamma(1) == pytest.approx(0.7)
    training.update(torch.tensor([0]), torch.tensor([1.0]))
    assert training.logits[0].item() == pytest.approx(-0.2), "the first step of Adam is as long as lr"
    assert selection.features == {"selector": ("custom",)}
    assert (Seal().safe, Seal().epochs, Seal().columns) == ("safety", 3, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discard": -0.5}, r"selection.discard: -0.5 is not a share"),
        ({"safe": "harmful"}, r"selection.safe: 'harmful' is none of its values: use safety, utility"),
        ({"epochs": 0}, r"selection.epochs: 0 would train no selector"),
        ({"lr": 0.0}, r"selection.lr: 0.0 would train no selector"),
        ({"lr": float("nan")}, r"selection.lr: nan would train no selector"),
        ({"lr": float("inf")}, r"selection.lr: inf would train no selector"),
        ({"init": float("nan")}, r"selection.init: nan is no logit: give a finite number"),
        ({"gamma": 1.5}, r"selection.gamma: 1.5 is not a share"),
        ({"gamma": float("nan")}, r"selection.gamma: nan is not a share"),
        ({"gamma_decay": float("nan")}, r"selection.gamma_decay: nan is not a share"),
        ({"gamma_decay": -0.1}, r"selection.gamma_decay: -0.1 is not a share"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Seal(**options)


def test_no_more_than_the_logits_of_one_row_is_no_preference(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0]])
    ScoreWriter(tmp_path / "scores", {}).write_feature("selector", "custom", [0], [0.1], "made for this test")
    assert np.array_equal(Seal(0.5).select(scores).weights[0], [1.0])
