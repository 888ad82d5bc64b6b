"""DualSelect in training a small linear model, against the algorithm written out with one gradient per row."""

import io
from collections.abc import Sequence
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor

from toss_lightning.errors import ConfigError
from toss_lightning.gradients import DualSelect, Gradients, RowProducts
from toss_lightning.gradients.dualselect import keep_lowest

Row = tuple[Tensor, Tensor]
"""Inputs ``[T, 5]`` and targets ``[T]`` of a row."""


class Classifier:
    """Scores of 4 classes as B A x; trained by plain gradient descent."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weights = {
            "A": torch.randn((2, 5), generator=generator, requires_grad=True),
            "B": torch.randn((4, 2), generator=generator, requires_grad=True),
        }

    def loss(self, row: Row) -> Tensor:
        inputs, targets = row
        return torch.nn.functional.cross_entropy(inputs @ self.weights["A"].T @ self.weights["B"].T, targets)

    def gradient(self, row: Row) -> Gradients:
        gradients = torch.autograd.grad(self.loss(row), self.weights.values())
        return dict(zip(self.weights, gradients, strict=True))

    def step(self, gradients: Gradients) -> None:
        for name, value in self.weights.items():
            value.data -= 0.5 * gradients[name]


def mixed(gradients: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    pairs = list(zip(gradients, weights, strict=True))
    return {name: sum(weight * one[name] for one, weight in pairs) for name in gradients[0]}


def flat(gradients: Gradients) -> np.ndarray:
    return np.concatenate([gradients[name].detach().double().numpy().ravel() for name in sorted(gradients)])


def cosine(first: Gradients, second: Gradients) -> float:
    one, other = flat(first), flat(second)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


class LinearProbe:
    """Answers with one backward pass for each row."""

    def __init__(self, model: Classifier, references: list[Row], task: list[Row]) -> None:
        self.model, self.references, self.task, self.step_rows = model, references, task, [0]
        self.size, self.asked = len(references), []

    def mean_row_gradient(self, rows: Sequence[int], weights: Tensor) -> Gradients:
        self.asked.append(list(rows))
        return mixed([self.model.gradient(self.references[row]) for row in rows], weights.tolist())

    def reference_products(self, direction: Gradients | None) -> RowProducts:
        return self._products(self.references, range(self.size), direction)

    def task_products(self, direction: Gradients | None) -> RowProducts:
        return self._products([self.task[row] for row in self.step_rows], self.step_rows, direction)

    def _products(self, rows: list[Row], names: Sequence[int], direction: Gradients | None) -> RowProducts:
        gradients = [flat(self.model.gradient(row)) for row in rows]
        return RowProducts(
            torch.tensor(list(names)),
            torch.tensor([len(targets) for _, targets in rows]),
            torch.tensor([float(self.model.loss(row)) for row in rows]),
            torch.tensor([np.linalg.norm(gradient) for gradient in gradients]),
            torch.tensor([gradient @ flat(direction) if direction else 0.0 for gradient in gradients]),
        )


def some_rows(count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
    return [
        (torch.randn((length, 5), generator=generator), torch.randint(0, 4, (length,), generator=generator))
        for length in lengths
    ]


REFERENCES, TASK = some_rows(23, 0), some_rows(30, 1)
EPOCHS = [[list(range(at, at + 6)) for at in range(0, 30, 6)]] * 2 + [[[29, 3, 8, 17, 0, 11]]]
"""The rows of each step of each epoch."""


def train(method: DualSelect, probe: LinearProbe, stop: int = 99, start: int = 0) -> None:
    """Trains on the mean over the kept rows of their mean losses, as ``normalize: row`` does."""
    steps = [(epoch, rows) for epoch, plan in enumerate(EPOCHS) for rows in plan]
    for epoch, rows in steps[start:stop]:
        probe.step_rows = rows
        factors = method.begin_step(probe, epoch) or {}
        kept = [row for row in rows if factors.get(row, 1.0)]
        gradients = mixed([probe.model.gradient(TASK[row]) for row in kept], [1 / len(kept)] * len(kept))
        method.correct(gradients, probe)
        probe.model.step(gradients)


def oracle(
    warmup: int,
    keep: float,
    share: float,
    rho: float,
    mu: float,
    mu_task: float,
    nu: float,
    softmax: bool,
    tau: float = 0.1,
) -> tuple[Classifier, list[list[int]], dict[str, float]]:
    """The algorithm as it is written: warm-up, then for each epoch references, and for each step rows.

    Returns the trained model, the references of each epoch, and what a report says of rows and directions.
    """
    model, count = Classifier(), 0
    direction: list[Gradients] = []
    chosen_references, rows_left_out, tokens, tokens_kept, lengths, angles = [], 0, 0, 0, [], []
    for plan in EPOCHS:
        reference, in_epoch = None, []
        for rows in plan:
            if count < warmup:
                update = mixed([model.gradient(TASK[row]) for row in rows], [1 / len(rows)] * len(rows))
                direction.append(update)
            else:
                if reference is None:
                    gradients = [model.gradient(row) for row in REFERENCES]
                    task = mixed(direction, [1.0] * len(direction)) if direction else None
                    score = [
                        mu * float(model.loss(row)) - nu * (cosine(gradient, task) if task else 0.0)
                        for row, gradient in zip(REFERENCES, gradients, strict=True)
                    ]
                    top = sorted(range(len(score)), key=lambda row: -score[row])[: ceil(share * len(score))]
                    weights = np.exp([score[row] / tau for row in top]) if softmax else np.ones(len(top))
                    reference = mixed([gradients[row] for row in top], (weights / weights.sum()).tolist())
                    chosen_references.append(sorted(top))
                gradients = [model.gradient(TASK[row]) for row in rows]
                score = [
                    mu_task * float(model.loss(TASK[row])) - nu * cosine(gradient, reference)
                    for row, gradient in zip(rows, gradients, strict=True)
                ]
                order = sorted(range(len(rows)), key=lambda at: score[at])
                sizes = np.cumsum([len(TASK[rows[at]][1]) for at in order])
                best = np.abs(sizes - keep * sizes[-1])
                kept = order[: len(order) - int(np.argmin(best[::-1]))]
                rows_left_out += len(rows) - len(kept)
                tokens += sizes[-1]
                tokens_kept += sizes[len(kept) - 1]
                task_part = mixed([gradients[at] for at in kept], [1 / len(kept)] * len(kept))
                lengths.append(rho * np.linalg.norm(flat(reference)) / np.linalg.norm(flat(task_part)))
                angles.append(cosine(task_part, reference))
                in_epoch.append(task_part)
                update = mixed([task_part, reference], [1.0, rho])
            model.step(update)
            count += 1
        direction = in_epoch or direction
    told = {
        "kept_token_share": tokens_kept / tokens,
        "rows_left_out_share": rows_left_out / (6 * len(angles)),
        "mean_norm_added": np.mean(lengths),
        "mean_cosine": np.mean(angles),
        "conflicts": sum(angle < 0 for angle in angles),
        "conflict_share": np.mean([angle < 0 for angle in angles]),
    }
    return model, chosen_references, told


SETTINGS = {
    "as published": {"warmup": 3, "keep": 0.7, "share": 0.1, "rho": 0.2, "mu": 1.0, "mu_task": 1.0, "nu": 1.0},
    "other weights": {"warmup": 2, "keep": 0.55, "share": 0.3, "rho": 0.5, "mu": 0.3, "mu_task": -0.4, "nu": 2.0},
    "a warm-up of an epoch": {"warmup": 5, "keep": 0.8, "share": 1.0, "rho": 0.2, "mu": 1.0, "mu_task": 0.0, "nu": 1.0},
    "a longer one": {"warmup": 7, "keep": 0.8, "share": 0.2, "rho": 0.2, "mu": 0.0, "mu_task": 1.0, "nu": 1.0},
    "none": {"warmup": 0, "keep": 0.6, "share": 0.2, "rho": 0.2, "mu": 1.0, "mu_task": 1.0, "nu": 1.0, "tau": 0.5},
}
NAMES = {
    "share": "reference_share",
    "mu": "reference_loss_weight",
    "mu_task": "task_loss_weight",
    "nu": "cosine_weight",
    "tau": "temperature",
}


def started(softmax: bool = False, **settings: float) -> tuple[DualSelect, LinearProbe]:
    options = {NAMES.get(name, name): value for name, value in settings.items()}
    method = DualSelect(**options, reference_weights="softmax" if softmax else "equal")
    probe = LinearProbe(Classifier(), REFERENCES, TASK)
    method.begin_stage(probe, 2)
    return method, probe


@pytest.mark.parametrize("softmax", [False, True], ids=["equal", "softmax"])
@pytest.mark.parametrize("name", SETTINGS)
def test_training_equals_the_algorithm_written_out(name: str, softmax: bool) -> None:
    method, probe = started(softmax, **SETTINGS[name])
    train(method, probe)
    model, references, told = oracle(**SETTINGS[name], softmax=softmax)
    assert probe.asked == references
    for key, value in probe.model.weights.items():
        torch.testing.assert_close(value, model.weights[key], rtol=1e-4, atol=1e-5)
    report, warmup = method.report(), SETTINGS[name]["warmup"]
    assert (report["steps"], report["warmup_steps"], report["corrected"]) == (11, warmup, 11 - warmup)
    assert report["compared"] == 11 - warmup
    assert report["reference_selections"] == len(references)
    assert report["references_per_selection"] == len(references[0])
    assert {name: report[name] for name in told} == pytest.approx(told, rel=1e-4)
    assert told["rows_left_out_share"] > 0, "the test is about rows that are left out"


def test_the_warm_up_asks_nothing_and_changes_nothing() -> None:
    method, probe = started(warmup=4)
    for _ in range(4):
        assert method.begin_step(probe, 0) is None
        gradients = probe.model.gradient(TASK[0])
        before = {name: value.clone() for name, value in gradients.items()}
        method.correct(gradients, probe)
        assert all(torch.equal(value, before[name]) for name, value in gradients.items())
    assert probe.asked == []
    assert method.report()["corrected"] == 0
    assert method.begin_step(probe, 0), "the first step after it"
    assert len(probe.asked) == 1


def test_all_rows_are_kept_without_asking_about_them() -> None:
    method, probe = started(warmup=0, keep=1.0)
    probe.task_products = None
    assert method.begin_step(probe, 0) is None
    method.correct(probe.model.gradient(TASK[0]), probe)
    assert method.report()["kept_token_share"] == 1.0


@pytest.mark.parametrize("stop", [2, 4, 5, 8])
def test_a_resumed_stage_ends_in_the_same_weights(stop: int) -> None:
    """Within the warm-up, in the middle of an epoch, at its end, and in a later one; through a safe checkpoint."""
    whole, whole_probe = started(**SETTINGS["as published"])
    train(whole, whole_probe)
    first, first_probe = started(**SETTINGS["as published"])
    train(first, first_probe, stop)
    file = io.BytesIO()
    torch.save(first.state(), file)
    train(first, first_probe, stop + 1, stop)  # what goes on after the checkpoint does not reach into it
    file.seek(0)
    second, second_probe = started(**SETTINGS["as published"])
    train(second, second_probe, stop)
    second = DualSelect(warmup=3, keep=0.7)
    second.load_state(torch.load(file, weights_only=True))
    second.begin_stage(second_probe, 2)
    train(second, second_probe, start=stop)
    for name, value in second_probe.model.weights.items():
        assert torch.equal(value, whole_probe.model.weights[name])
    assert second.report() == whole.report()
    second.begin_stage(second_probe, 2)
    assert second.state() == DualSelect().state(), "another stage starts anew"


@pytest.mark.parametrize(
    ("tokens", "share", "kept"),
    [
        ([10] * 8, 0.9, 7),  # 70 is nearer to 72 than 80
        ([10] * 4, 0.9, 4),  # 40 is nearer to 36 than 30
        ([10] * 64, 0.9, 58),  # of 57.6
        ([10], 0.1, 1),  # never none
        ([10] * 2, 0.75, 2),  # 10 and 20 are as near to 15: the larger
        ([1, 1, 100], 0.9, 3),
        ([100, 1, 1], 0.9, 1),
    ],
)
def test_rows_are_kept_until_their_tokens_come_nearest_to_the_share(tokens: list[int], share: float, kept: int) -> None:
    rows = keep_lowest(torch.arange(len(tokens)).double(), torch.tensor(tokens), share)
    assert rows.tolist() == [True] * kept + [False] * (len(tokens) - kept)


def test_ties_go_to_the_earliest_row_and_rows_without_a_token_count_for_nothing() -> None:
    score, tokens = torch.tensor([2.0, 1.0, 1.0, 1.0, -5.0]), torch.tensor([4, 4, 4, 4, 0])
    assert keep_lowest(score, tokens, 0.5).tolist() == [False, True, True, False, True]
    assert keep_lowest(score, torch.zeros(5), 0.5).all()
    assert keep_lowest(torch.zeros(0), torch.zeros(0), 0.5).tolist() == []


def test_a_row_without_a_gradient_has_cosine_zero_and_is_chosen_by_its_loss() -> None:
    method, probe = started(warmup=1, share=0.01)
    method.correct(probe.model.gradient(TASK[0]), probe)
    products = probe.reference_products(None)
    products.norm[5], products.loss[5] = 0.0, 100.0
    probe.reference_products = lambda direction: products
    method.begin_step(probe, 0)
    assert probe.asked == [[5]]
    report = method.report()
    assert (report["mean_reference_cosine"], report["mean_reference_loss"]) == (0.0, 100.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup: -1 cannot be used: give a number of updates, at least 0"),
        ({"keep": 0.0}, r"keep: 0.0 cannot be used: give a share in \(0, 1\]"),
        ({"reference_share": 1.5}, r"reference_share: 1.5 cannot be used: give a share in \(0, 1\]"),
        ({"rho": -0.1}, "rho: -0.1 cannot be used: give a number that is at least 0"),
        ({"temperature": 0.0}, "temperature: 0.0 cannot be used: give a number above 0"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.correction\.{message}$"):
        DualSelect(**options)


def test_no_reference_set() -> None:
    message = r"correction: 1 reference rows are needed, but data.safety has 0: give more rows$"
    with pytest.raises(ConfigError, match=message):
        DualSelect().check(0, 2)
