"""SafeGrad on whole gradients laid out as one vector, in numpy."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from toss_lightning.errors import ConfigError
from toss_lightning.gradients import Gradients, SafeGrad

SHAPES = {"A": (3, 11), "B": (7, 3)}


class Fixed:
    """A probe whose alignment gradient is given, and the one that rounding makes as a share of it."""

    def __init__(self, alignment: Gradients, size: int = 5, rounding: float = 1e-6) -> None:
        self.alignment, self.size, self.rounding = alignment, size, rounding
        self.asked, self.asked_rounding = [], []

    def gradient(self, rows: Sequence[int], kind: str = "loss") -> tuple[float, Gradients]:
        if kind == "rounding":
            self.asked_rounding.append(list(rows))
            return 0.002, {name: self.rounding * value for name, value in self.alignment.items()}
        assert kind == "kl"
        self.asked.append(list(rows))
        return 0.25, {name: value.clone() for name, value in self.alignment.items()}


def gradients_of(vector: np.ndarray) -> Gradients:
    pieces = np.split(vector.astype(np.float32), [33])
    return {name: torch.tensor(piece.reshape(SHAPES[name])) for name, piece in zip(SHAPES, pieces, strict=True)}


def vector_of(gradients: Gradients) -> np.ndarray:
    return np.concatenate([gradients[name].double().numpy().ravel() for name in SHAPES])


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A task gradient and an alignment gradient that conflict."""
    generator = np.random.default_rng(0)
    user, alignment = generator.normal(size=54), 0.3 * generator.normal(size=54)
    user, alignment = (value.astype(np.float32).astype(np.float64) for value in (user, alignment))
    return user, alignment if user @ alignment < 0 else -alignment


def corrected(user: np.ndarray, alignment: np.ndarray, **options) -> tuple[np.ndarray, SafeGrad]:
    safegrad, gradients, probe = SafeGrad(**options), gradients_of(user), Fixed(gradients_of(alignment))
    safegrad.begin_stage(probe, 3)
    safegrad.correct(gradients, probe)
    return vector_of(gradients), safegrad


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_a_conflict_loses_its_part_along_the_alignment_gradient(pair, rho: float) -> None:
    user, alignment = pair
    after, safegrad = corrected(user, alignment, rho=rho)
    unit = alignment / np.linalg.norm(alignment)
    np.testing.assert_allclose(after, user - (user @ unit) * unit + rho * alignment, rtol=0, atol=1e-6)
    assert after @ unit == pytest.approx(rho * np.linalg.norm(alignment), abs=1e-6)
    report = safegrad.report()
    assert (report["steps"], report["conflicts"], report["corrected"]) == (1, 1, 1)
    cosine = user @ alignment / np.linalg.norm(user) / np.linalg.norm(alignment)
    assert report["mean_cosine"] == pytest.approx(cosine)
    assert report["mean_norm_removed"] == pytest.approx(-cosine)
    assert report["mean_kl"] == 0.25


def test_agreement_only_adds(pair) -> None:
    user, alignment = pair
    after, safegrad = corrected(user, -alignment)
    np.testing.assert_allclose(after, user - alignment, rtol=0, atol=1e-6)
    report = safegrad.report()
    assert (report["conflicts"], report["corrected"], report["mean_norm_removed"]) == (0, 1, 0.0)
    after, safegrad = corrected(user, -alignment, rho=0.0)
    assert after.tobytes() == user.tobytes()
    assert safegrad.report()["corrected"] == 0


def test_the_conflict_is_one_of_all_parameters_together(pair) -> None:
    """A conflict in the matrix A that the matrix B outweighs is none."""
    user, alignment = pair
    alignment = np.concatenate([-0.1 * user[:33], user[33:]])
    after, _ = corrected(user, alignment, rho=0.0)
    assert after.tobytes() == user.tobytes()


def test_where_the_target_still_is_the_base_nothing_happens(pair) -> None:
    """The KL and its gradient are 0 there."""
    user, alignment = pair
    after, safegrad = corrected(user, 0 * alignment)
    assert after.tobytes() == user.tobytes()
    report = safegrad.report()
    assert (report["steps"], report["conflicts"], report["corrected"], report["mean_cosine"]) == (1, 0, 0, 0.0)


@pytest.mark.parametrize(("rounding", "ignored"), [(0.6, True), (0.4, False)])
def test_what_is_not_twice_what_rounding_makes_is_left_alone(pair, rounding: float, ignored: bool) -> None:
    user, alignment = pair
    safegrad, gradients, probe = SafeGrad(), gradients_of(user), Fixed(gradients_of(alignment), rounding=rounding)
    safegrad.begin_stage(probe, 3)
    safegrad.correct(gradients, probe)
    assert (vector_of(gradients).tobytes() == user.tobytes()) == ignored
    report = safegrad.report()
    assert (report["below_rounding"], report["corrected"], report["rounding_kl"]) == (ignored, not ignored, 0.002)
    assert (report["mean_cosine"] == 0) == ignored, "what says nothing is not compared"


def test_rounding_is_measured_once_in_a_stage_where_the_target_is_the_base(pair) -> None:
    safegrad, probe = SafeGrad(examples=2), Fixed(gradients_of(pair[1]), 20, rounding=0.6)
    safegrad.begin_stage(probe, 3)
    for _ in range(2):
        safegrad.correct(gradients_of(pair[0]), probe)
    again = SafeGrad(examples=2)
    again.load_state(safegrad.state())
    again.begin_stage(probe, 3)
    again.correct(gradients_of(pair[0]), probe)
    assert probe.asked_rounding == probe.asked[:1]
    assert again.report()["below_rounding"] == 3
    again.begin_stage(probe, 3)
    again.correct(gradients_of(pair[0]), probe)
    assert len(probe.asked_rounding) == 2, "another stage measures anew"


def test_a_task_gradient_of_zero_still_gets_the_alignment(pair) -> None:
    user, alignment = pair
    after, _ = corrected(0 * user, alignment)
    np.testing.assert_allclose(after, alignment, rtol=1e-6)


def draws(safegrad: SafeGrad, pair, size: int, steps: int) -> list[list[int]]:
    probe = Fixed(gradients_of(pair[1]), size)
    safegrad.begin_stage(probe, 3)
    for _ in range(steps):
        safegrad.correct(gradients_of(pair[0]), probe)
    return probe.asked


def test_rows_are_drawn_anew_in_each_step_fixed_by_the_seed(pair) -> None:
    seed_everything(1, verbose=False)
    first = draws(SafeGrad(examples=4), pair, 20, 40)
    assert all(len(set(rows)) == 4 for rows in first)
    assert len({tuple(rows) for rows in first}) > 30
    assert set().union(*first) == set(range(20)), "every row has its turn"
    assert draws(SafeGrad(examples=4), pair, 20, 40) == first
    seed_everything(2, verbose=False)
    assert draws(SafeGrad(examples=4), pair, 20, 40) != first
    assert draws(SafeGrad(examples=4), pair, 3, 2) == [[0, 1, 2]] * 2, "all where there are fewer"


def test_a_resumed_stage_draws_on(pair) -> None:
    seed_everything(1, verbose=False)
    whole = draws(SafeGrad(examples=2), pair, 20, 6)
    first, second = SafeGrad(examples=2), SafeGrad(examples=2)
    draws(first, pair, 20, 4)
    second.load_state(first.state())
    assert draws(second, pair, 20, 2) == whole[4:]
    assert second.report()["steps"] == 6
    assert draws(second, pair, 20, 6) == whole, "another stage starts anew"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "rho: -1.0 cannot be used: give a number that is at least 0"),
        ({"examples": 0}, "examples: 0 cannot be used: give a number of rows, at least 1"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.correction\.{message}$"):
        SafeGrad(**options)


def test_no_reference_set() -> None:
    message = r"correction: 1 reference rows are needed, but data.safety has 0: give more rows$"
    with pytest.raises(ConfigError, match=message):
        SafeGrad().check(0, 3)
