"""SOT: the push-pull objective against POT, and sets of points whose answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from scores_on_disk import make_scores
from torch import Tensor

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import ScoreWriter, TokenScores
from toss_lightning.selection import TokenWeights
from toss_lightning.selection.sot import Sot, push_pull
from toss_lightning.selection.transport import cosine_cost

EXACT = {"tolerance": 1e-12, "max_iterations": 100_000}
TASK, HARM = 40, 10


def around(center: int, count: int, seed: int, spread: float = 0.6) -> np.ndarray:
    """Points around one of three directions; all lean one way, as the embeddings of a language model do."""
    generator = np.random.default_rng(seed)
    points = 2 * np.eye(3, 8)[center] + spread * generator.normal(size=(count, 8)) + 1
    return points.astype(np.float32)


SETS = {
    "custom": np.concatenate([around(0, TASK, 0), around(1, HARM, 1)]),
    "utility": around(0, 12, 2),
    "harmful": around(1, 60, 3),
    "safety": around(2, 12, 4),
}


def store(path: Path, **sets: np.ndarray) -> TokenScores:
    labels = ["benign"] * TASK + ["harmful"] * HARM
    custom = sets.get("custom", SETS["custom"])
    scores = make_scores(path, [[1.0, 0.0]] * len(custom), labels=labels[: len(custom)])
    for name, values in {**SETS, **sets}.items():
        ScoreWriter(path, {}).write_feature("embedding", name, range(len(values)), list(values), "made for this test")
    return scores


def of_rows(weights: TokenWeights) -> np.ndarray:
    return np.array([weight[0] for weight in weights.weights.values()])


def cosines(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines of all pairs, one by one in float64."""
    points, others = points.astype(np.float64), others.astype(np.float64)
    return np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in others] for x in points])


def costs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points, anchor, harmful = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (19, 7, 11))
    return cosine_cost(points, anchor), cosine_cost(points, harmful)


def objective_by_pot(weights: Tensor, both: tuple[Tensor, Tensor], push: float, epsilon: float) -> float:
    near, far = (
        ot.solve(
            cost.numpy(),
            weights.numpy(),
            np.full(cost.shape[1], 1 / cost.shape[1]),
            reg=epsilon,
            reg_type="KL",
            max_iter=100_000,
            tol=1e-10,
        ).value
        for cost in both
    )
    return near - push * far


@pytest.mark.parametrize("push", [0.0, 0.7, 1.0])
def test_a_step_goes_down_the_gradient_that_pot_has(push: float) -> None:
    both, epsilon, small = costs(), 0.1, 1e-5
    uniform = torch.full((19,), 1 / 19, dtype=torch.float64)
    found = push_pull(*both, push, epsilon, steps=1, lr=1.0, **EXACT)
    assert found.objective[0] == pytest.approx(objective_by_pot(uniform, both, push, epsilon))
    assert found.objective[1] == pytest.approx(objective_by_pot(found.log_weights.exp(), both, push, epsilon), abs=1e-9)
    # from uniform weights, log w moves by minus the gradient, whose mean over rows is taken out
    gradient = found.log_weights.mean() - found.log_weights
    for row in range(0, 19, 5):
        direction = -uniform
        direction[row] += 1
        up, down = (objective_by_pot(uniform + sign * small * direction, both, push, epsilon) for sign in (1, -1))
        assert float((gradient * direction).sum()) == pytest.approx((up - down) / (2 * small), abs=1e-7)


def test_every_step_lowers_the_objective() -> None:
    for seed in range(2):
        objective = push_pull(*costs(seed), steps=12, lr=0.2).objective
        assert len(objective) == 13
        assert (np.diff(objective) < 0).all()


def test_without_a_push_all_weight_goes_to_the_rows_that_are_the_anchors() -> None:
    anchor, elsewhere = torch.eye(4, 6), torch.eye(6)[4:]
    found = push_pull(
        cosine_cost(torch.cat([anchor, elsewhere]), anchor), torch.ones(6, 1), push=0.0, epsilon=0.01, steps=100, lr=0.2
    )
    np.testing.assert_allclose(found.log_weights.exp().numpy(), [0.25] * 4 + [0.0] * 2, atol=1e-4)
    assert found.objective[-1] == pytest.approx(0.01 * np.log(4), abs=1e-3), "only the entropy term is left"


@pytest.mark.parametrize("weights", ["exp", "proportional", "uniform"])
def test_harmful_rows_go_first(tmp_path: Path, weights: Any) -> None:
    scores = store(tmp_path / "scores")
    chosen = Sot(discard=HARM / (TASK + HARM), weights=weights).select(scores)
    assert np.flatnonzero(of_rows(chosen) == 0).tolist() == list(range(TASK, TASK + HARM))
    assert chosen.report["rows_left_out_per_label"] == {"harmful": HARM}
    assert chosen.report["transport_problems_unsolved"] == 0
    assert chosen.report["marginal_error"] <= 1e-4
    for name, direction in (("objective", -1), ("transport_to_anchor", -1), ("transport_to_harmful", 1)):
        first, last = chosen.report[name]
        assert (last - first) * direction > 0, name
    assert 1 < chosen.report["effective_rows"] < TASK + HARM


def test_an_anchor_of_another_task_chooses_other_rows(tmp_path: Path) -> None:
    scores = store(tmp_path / "scores", custom=np.concatenate([around(0, 12, 5, 0.3), around(2, 12, 6, 0.3)]))
    for anchor, kept in (("utility", range(12)), ("safety", range(12, 24))):
        selection = Sot(discard=0.5, anchor=anchor, steps=10)  # type: ignore[arg-type]
        assert np.flatnonzero(of_rows(selection.select(scores))).tolist() == list(kept)
        assert selection.features == {"embedding": ("custom", anchor, "harmful")}
        assert selection.columns == ()


def test_the_harmful_set_decides_where_the_anchor_cannot(tmp_path: Path) -> None:
    rows = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0.1], [1, 0.1, 1]], dtype=np.float32)
    anchor, harmful = np.array([[1.0, 0, 0]], dtype=np.float32), np.array([[0, 0, 1.0]], dtype=np.float32)
    scores = store(tmp_path / "scores", custom=rows, utility=anchor, harmful=harmful)
    assert np.flatnonzero(of_rows(Sot(discard=0.5).select(scores))).tolist() == [0, 2]


def test_weights_of_kept_rows_average_one_in_each_of_three_forms(tmp_path: Path) -> None:
    scores = store(tmp_path / "scores")
    names: tuple[Any, ...] = ("exp", "proportional", "uniform")
    found = {name: of_rows(Sot(0.3, weights=name, steps=10, lr=0.2).select(scores)) for name in names}
    kept = found["uniform"] > 0
    assert kept.sum() == 35
    for values in found.values():
        np.testing.assert_array_equal(values > 0, kept)
        assert values[kept].mean() == pytest.approx(1.0, abs=1e-6)
    assert set(found["uniform"][kept].tolist()) == {1.0}
    assert found["exp"][kept].std() < 0.1 * found["proportional"][kept].std(), "almost uniform"


def test_the_scale_of_embeddings_does_not_matter_and_the_same_comes_out_twice(tmp_path: Path) -> None:
    scores = store(tmp_path / "scores")
    larger = store(tmp_path / "larger", **{name: 64 * values for name, values in SETS.items()})
    selection = Sot(0.3, steps=10, lr=0.2)
    first = selection.select(scores)
    assert selection.select(scores).digest() == first.digest()
    np.testing.assert_allclose(of_rows(selection.select(larger)), of_rows(first), rtol=1e-5)


def test_costs_are_in_units_of_their_mean_and_the_rest_is_push_and_pull(tmp_path: Path) -> None:
    options: dict[str, Any] = {"push": 0.7, "epsilon": 0.1, "steps": 8, "lr": 0.3}
    scores = store(tmp_path / "scores")
    chosen = Sot(0.4, weights="proportional", **options).select(scores)
    both = [torch.from_numpy(1 - cosines(SETS["custom"], SETS[name])) for name in ("utility", "harmful")]
    mean = sum(float(cost.mean()) for cost in both) / 2
    assert chosen.report["mean_cost"] == pytest.approx(mean, rel=1e-5)
    assert abs(mean - 1) > 0.2, "a unit of 1 would be another"
    found = push_pull(*(cost / mean for cost in both), **options)
    assert chosen.report["objective"] == pytest.approx([found.objective[0], found.objective[-1]], rel=1e-3)
    assert chosen.report["transport_to_anchor"] == pytest.approx(found.pull, rel=1e-3)
    w = found.log_weights.exp().numpy()
    kept = np.sort(np.argsort(-w, kind="stable")[:30])
    assert np.flatnonzero(of_rows(chosen)).tolist() == kept.tolist()
    np.testing.assert_allclose(of_rows(chosen)[kept], w[kept] / w[kept].mean(), rtol=1e-3)
    # the paper's Eq. 7
    by_exp = of_rows(Sot(0.4, weights="exp", **options).select(scores))[kept]
    np.testing.assert_allclose(by_exp, np.exp(w[kept]) / np.exp(w[kept]).mean(), rtol=1e-4)


def test_an_anchor_that_is_the_harmful_set_prefers_no_row(tmp_path: Path) -> None:
    for name, anchor in (("same", SETS["harmful"]), ("shuffled", SETS["harmful"][::-1].copy())):
        scores = store(tmp_path / name, utility=anchor)
        with pytest.raises(
            ConfigError, match=r"data.utility: SOT finds no row of data.custom nearer .* sets the same\?"
        ):
            Sot(steps=5).select(scores)
        assert of_rows(Sot(0.0, weights="uniform", steps=5).select(scores)).tolist() == [1.0] * (TASK + HARM)
    assert of_rows(Sot(steps=5, push=0.5).select(scores)).astype(bool).sum() == 40, "half a push is a preference"


def test_a_single_row_stays(tmp_path: Path) -> None:
    scores = store(tmp_path / "scores", custom=SETS["custom"][:1])
    assert of_rows(Sot(0.9, steps=2).select(scores)).tolist() == [1.0]


def test_problems_that_are_not_solved_are_counted_and_said(tmp_path: Path) -> None:
    scores = store(tmp_path / "scores")
    with pytest.warns(UserWarning, match=r"selection.max_iterations: \d+ of 8 transport .* in 1 iterations .*: raise"):
        report = Sot(epsilon=0.01, steps=3, max_iterations=1, tolerance=1e-6).select(scores).report
    assert 0 < report["transport_problems_unsolved"] <= 8
    assert report["marginal_error"] > 1e-6


@pytest.mark.parametrize(("device", "message"), [("gpu", "'gpu' is none: give cpu"), ("xpu:7", "not to be had here")])
def test_a_device_that_is_not_there(tmp_path: Path, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"loop.selection.device: .*{message}") as error:
        Sot(device=device).select(store(tmp_path / "scores"))
    assert "\n" not in str(error.value)


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = SETS["harmful"].copy()
    broken[3, 2] = np.nan
    with pytest.raises(StoreError, match="embeddings of the harmful set are not finite: score again"):
        Sot().select(store(tmp_path / "scores", harmful=broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discard": 1.0}, r"selection.discard: 1.0 is not a share"),
        ({"anchor": "harmful"}, r"selection.anchor: 'harmful' is none of its values: use utility, safety"),
        ({"weights": "softmax"}, r"selection.weights: 'softmax' is none of its values: use exp, proportional, uniform"),
        ({"epsilon": 0.0}, r"selection.epsilon: 0.0 cannot be used: give a number above 0"),
        ({"epsilon": np.nan}, r"selection.epsilon: nan cannot be used: give a number above 0"),
        ({"steps": 0}, r"selection.steps: 0 cannot be used: give 1 or more"),
        ({"max_iterations": 0}, r"selection.max_iterations: 0 cannot be used: give 1 or more"),
        ({"lr": -1.0}, r"selection.lr: -1.0 cannot be used: give a number above 0"),
        ({"lr": np.nan}, r"selection.lr: nan cannot be used"),
        ({"lr": np.inf}, r"selection.lr: inf cannot be used"),
        ({"tolerance": 0.0}, r"selection.tolerance: 0.0 cannot be used"),
        ({"tolerance": np.nan}, r"selection.tolerance: nan cannot be used"),
        ({"push": -1.0}, r"selection.push: -1.0 is no number, or would pull towards the harmful set: give 0 or more"),
        ({"push": np.nan}, r"selection.push: nan is no number"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sot(**options)
