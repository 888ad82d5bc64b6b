"""SPF against a dense linear-algebra oracle: full singular value decompositions of numpy, in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from toss_lightning.errors import ConfigError
from toss_lightning.gradients import SPF, Gradients

RANK = 6
SHAPES = {"q.A": (RANK, 30), "q.B": (40, RANK), "v.A": (RANK, 30), "v.B": (20, RANK), "gate": (25,)}


class Fixed:
    """A probe whose safety gradient is given."""

    def __init__(self, safety: Gradients, size: int = 3) -> None:
        self.safety, self.size, self.asked = safety, size, []

    def gradient(self, rows: Sequence[int], kind: str = "loss") -> tuple[float, Gradients]:
        self.asked.append((list(rows), kind))
        return 0.5, {name: value.clone() for name, value in self.safety.items()}


def random_gradients(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def total(first: Gradients, second: Gradients) -> float:
    return sum(float((value.double() * second[name].double()).sum()) for name, value in first.items())


def conflicting(seed: int = 0) -> tuple[Gradients, Gradients]:
    """A task gradient whose inner product with a safety gradient is negative, and that safety gradient."""
    task, safety = random_gradients(seed), random_gradients(seed + 100)
    if total(task, safety) > 0:
        safety = {name: -value for name, value in safety.items()}
    return task, safety


def copy_of(gradients: Gradients) -> Gradients:
    return {name: value.clone() for name, value in gradients.items()}


def same_bits(first: Gradients, second: Gradients) -> bool:
    return all(torch.equal(value.view(torch.int32), second[name].view(torch.int32)) for name, value in first.items())


def ready(probe: Fixed, rank: int = RANK, **options) -> SPF:
    spf = SPF(**options)
    spf.begin_stage(probe, rank)
    return spf


def projected(task: torch.Tensor, safety: torch.Tensor, k: int, energy: float = 1.0) -> np.ndarray:
    """``G - U_k U_k^T G``; a vector counts as a matrix of one column."""
    g, s = (value.double().numpy().reshape(len(value), -1) for value in (task, safety))
    u, singular, _ = np.linalg.svd(s, full_matrices=False)
    held = np.cumsum(singular**2) / np.sum(singular**2)
    count = min(k, int(np.searchsorted(held, energy - 1e-12)) + 1, int((singular > 1e-5 * singular[0]).sum()))
    return (g - u[:, :count] @ (u[:, :count].T @ g)).reshape(task.shape)


@pytest.mark.parametrize("energy", [None, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_conflict_is_projected_off_the_leading_directions(k: int, energy: float | None) -> None:
    task, safety = conflicting()
    before, probe = copy_of(task), Fixed(safety)
    ready(probe, k=k, energy=energy).correct(task, probe)
    assert probe.asked == [([0], "loss")]
    for name, value in task.items():
        expected = projected(before[name], safety[name], k, energy or 1.0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-6, err_msg=name)
        assert value.dtype == torch.float32


def test_agreement_leaves_every_bit_even_where_single_matrices_conflict() -> None:
    task, safety = conflicting()
    safety = {name: -value for name, value in safety.items()}
    safety["q.A"] = -0.01 * task["q.A"]
    before, probe = copy_of(task), Fixed(safety)
    spf = ready(probe, k=2)
    spf.correct(task, probe)
    assert same_bits(task, before)
    report = spf.report()
    assert (report["steps"], report["conflicts"], report["corrected"], report["mean_norm_removed"]) == (1, 0, 0, 0.0)
    assert report["mean_cosine"] > 0


def test_a_safety_gradient_of_zero_changes_nothing() -> None:
    task, safety = conflicting()
    before, probe = copy_of(task), Fixed({name: torch.zeros_like(value) for name, value in safety.items()})
    spf = ready(probe)
    spf.correct(task, probe)
    assert same_bits(task, before)
    assert spf.report()["mean_cosine"] == 0.0


def test_matrices_without_a_safety_gradient_keep_their_bits_as_all_of_a_do_while_b_is_zero() -> None:
    task, safety = conflicting()
    safety = {name: torch.zeros_like(value) if name.endswith("A") else value for name, value in safety.items()}
    if total(task, safety) > 0:
        safety = {name: -value for name, value in safety.items()}
    before, probe = copy_of(task), Fixed(safety)
    ready(probe, k=5).correct(task, probe)
    for name, value in task.items():
        assert torch.equal(value, before[name]) == name.endswith("A"), name


def test_directions_of_singular_value_zero_are_not_taken() -> None:
    """A safety gradient of rank 1 has one direction, whatever k asks for."""
    task, safety = conflicting()
    for name in ("q.A", "q.B"):
        safety[name] = torch.outer(safety[name][:, 0], safety[name][0]) / 3
    safety = safety if total(task, safety) < 0 else {name: -value for name, value in safety.items()}
    before, probe = copy_of(task), Fixed(safety)
    spf = ready(probe, k=5)
    spf.correct(task, probe)
    for name in ("q.A", "q.B"):
        direction = safety[name].double().numpy()[:, :1]
        direction /= np.linalg.norm(direction)
        g = before[name].double().numpy()
        np.testing.assert_allclose(task[name].numpy(), g - direction @ (direction.T @ g), rtol=0, atol=1e-6)
    # 1 + 1 of q, 5 + 5 of v, 1 of the vector
    assert spf.report()["mean_directions"] == pytest.approx(13 / 5)


def test_what_is_left_has_no_part_in_the_safety_subspace_and_is_not_projected_twice() -> None:
    task, safety = conflicting()
    probe = Fixed(safety)
    spf = ready(probe, k=3)
    spf.correct(task, probe)
    for name in ("q.A", "q.B", "v.A", "v.B"):
        u = np.linalg.svd(safety[name].double().numpy(), full_matrices=False)[0][:, :3]
        assert np.abs(u.T @ task[name].double().numpy()).max() < 1e-6, name


def test_the_report_counts_over_the_stage() -> None:
    task, safety = conflicting()
    calm = {name: -value for name, value in safety.items()}
    spf = ready(Fixed(safety), k=2)
    shares, cosines = [], []
    for number, current in enumerate([safety, calm, safety]):
        gradients = {name: value + 0.1 * number for name, value in task.items()}
        before = copy_of(gradients)
        spf.correct(gradients, Fixed(current))
        cosines.append(total(before, current) / (total(before, before) * total(current, current)) ** 0.5)
        removed = {name: before[name].double() - value.double() for name, value in gradients.items()}
        shares.append((total(removed, removed) / total(before, before)) ** 0.5)
    report = spf.report()
    assert (report["steps"], report["conflicts"], report["corrected"]) == (3, 2, 2)
    assert report["conflict_share"] == report["corrected_share"] == pytest.approx(2 / 3)
    assert report["mean_cosine"] == pytest.approx(np.mean(cosines), rel=1e-6)
    assert report["mean_norm_removed"] == pytest.approx((shares[0] + shares[2]) / 2, rel=1e-5)
    assert report["mean_safety_loss"] == 0.5


@pytest.mark.parametrize(("rank", "directions"), [(2, 1), (6, 1), (16, 4), (64, 16)])
def test_a_quarter_of_the_rank_is_taken_where_nobody_says(rank: int, directions: int) -> None:
    shapes = {"q.A": (rank, 80), "q.B": (90, rank)}
    task, safety = random_gradients(0, shapes), random_gradients(1, shapes)
    safety = safety if total(task, safety) < 0 else {name: -value for name, value in safety.items()}
    probe = Fixed(safety)
    spf = ready(probe, rank)
    spf.correct(task, probe)
    assert spf.report()["mean_directions"] == directions


def test_more_examples() -> None:
    task, safety = conflicting()
    probe = Fixed(safety)
    ready(probe, examples=3).correct(task, probe)
    assert probe.asked == [([0, 1, 2], "loss")]


def test_a_stage_forgets_the_last_one_but_not_what_a_checkpoint_brought() -> None:
    task, safety = conflicting()
    probe = Fixed(safety)
    first = ready(probe)
    first.correct(copy_of(task), probe)
    resumed = SPF()
    resumed.load_state(first.state())
    resumed.begin_stage(probe, RANK)
    for spf in (first, resumed):
        spf.correct(copy_of(task), probe)
    assert resumed.report() == first.report()
    assert resumed.report()["steps"] == 2
    resumed.begin_stage(probe, RANK)
    assert resumed.report()["steps"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: 0 cannot be used: give a number of directions, at least 1, or null"),
        ({"energy": 0.0}, r"energy: 0.0 cannot be used: give a share in \(0, 1\], or null"),
        ({"energy": 1.1}, r"energy: 1.1 cannot be used: give a share in \(0, 1\], or null"),
        ({"examples": 0}, "examples: 0 cannot be used: give a number of rows, at least 1"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.correction\.{message}$"):
        SPF(**options)


def test_arguments_that_do_not_fit_the_rank_or_the_set() -> None:
    with pytest.raises(
        ConfigError, match=r"correction\.k: 6 directions are all .* LoRA matrix of rank 6 .*: give at most 5"
    ):
        SPF(k=6).check(2, 6)
    with pytest.raises(
        ConfigError, match=r"correction\.k: 1 directions .* of rank 1 .*: raise model.lora.r to at least 2"
    ):
        SPF().check(2, 1)
    with pytest.raises(
        ConfigError, match=r"correction\.examples: 3 reference rows are needed, but data.safety has 2: give"
    ):
        SPF(examples=3).check(2, 6)
