"""What the probe answers, against full logits of single rows and plain autograd; on one process and on two.

The module that is asked has dropout, a coarse anchor and chunks of a few tokens, none of which an answer may show.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Dense, assert_close, vector
from torch import Tensor
from watched import ASKED_AT, ROW_WEIGHTS, ROWS

both = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture
def asked(seen: Any, dense: Dense, ranks: int) -> tuple[dict[str, Any], Dense]:
    """What one rank saw, and the oracle at the weights of the step that asked."""
    first, *others = seen("probe", ranks)
    assert first["accumulate"] > 1, "the tests are about several micro-batches"
    for other in others:
        for kind in ("loss", "kl"):
            assert torch.equal(vector(first["answers"][kind][1]), vector(other["answers"][kind][1]))
        for kind in ("task", "reference"):
            assert all(torch.equal(value, other["answers"][kind][name]) for name, value in _tensors(first, kind))
    return first, dense.at(first["before"][ASKED_AT])


def _tensors(seen: dict[str, Any], kind: str) -> list[tuple[str, Tensor]]:
    return list(seen["answers"][kind].items())


@both
@pytest.mark.parametrize("kind", ["loss", "kl"])
def test_the_gradient_of_a_mean_over_reference_tokens(asked: Any, kind: str) -> None:
    seen, dense = asked
    measure = dense.losses if kind == "loss" else dense.divergences
    mean = torch.cat([measure(seen["reference"][row]) for row in ROWS]).mean()
    found, gradient = seen["answers"][kind]
    assert found == pytest.approx(mean.item(), rel=1e-4)
    assert_close(gradient, dense.gradient(mean))


@both
def test_a_weighted_sum_of_the_gradients_of_rows(asked: Any) -> None:
    seen, dense = asked
    means = [dense.losses(seen["reference"][row]).mean() for row in ROWS]
    whole = sum(weight * mean for weight, mean in zip(ROW_WEIGHTS, means, strict=True))
    assert_close(seen["answers"]["rows"], dense.gradient(whole))


@both
@pytest.mark.parametrize("kind", ["reference", "task"])
def test_losses_norms_and_products_of_single_rows(asked: Any, kind: str) -> None:
    seen, dense = asked
    rows = sorted(seen["steps"][ASKED_AT]) if kind == "task" else list(range(len(seen["reference"])))
    found = seen["answers"][kind]
    assert found["rows"].tolist() == rows
    direction = vector(seen["raw"][ASKED_AT - 1])
    for at, index in enumerate(rows):
        row = (seen["rows"] if kind == "task" else seen["reference"])[index]
        weight = row["weight"]
        mean = (weight * dense.losses(row)).sum() / weight.sum()
        gradient = vector(dense.gradient(mean))
        assert found["tokens"][at] == (weight != 0).sum()
        assert float(found["loss"][at]) == pytest.approx(mean.item(), rel=1e-4)
        assert float(found["norm"][at]) == pytest.approx(float(gradient.norm()), rel=1e-3)
        scale = float(gradient.norm() * direction.norm())
        assert float(found["product"][at]) == pytest.approx(float(gradient @ direction), abs=1e-4 * scale)


@both
@pytest.mark.parametrize(("name", "step"), [("poisoned", 2), ("poisoned_rows", 3), ("poisoned_gradient", 2)])
def test_an_answer_that_is_not_finite_ends_the_run_on_all_ranks_and_says_where(
    watched: Path, ranks: int, name: str, step: int
) -> None:
    for rank in range(ranks):
        message = (watched / f"{name}-{ranks}" / f"error-{rank}.txt").read_text()
        where = "data.safety" if name == "poisoned_gradient" else "row 4 of data.safety"
        assert message == (
            f"stage target, step {step}: a loss or gradient that model.correction asks for is not finite on {where}:"
            " look there, or lower model.optim.lr"
        )
