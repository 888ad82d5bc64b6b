"""What a correction leaves of the gradient of a real step, against a dense formula on the gradient of all its rows."""

from typing import Any

import numpy as np
import pytest
import torch
from dense import Dense, assert_close, vector

both = pytest.mark.parametrize("ranks", [1, 2])


def task_gradient(dense: Dense, seen: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    dense.at(seen["before"][step])
    return dense.gradient(torch.cat([dense.losses(seen["rows"][index]) for index in seen["steps"][step]]).mean())


@both
def test_safegrad(seen: Any, dense: Dense, ranks: int) -> None:
    first, *others = seen("safegrad", ranks)
    assert first["accumulate"] > 1
    conflicts = 0
    for step in range(6):
        wanted = task_gradient(dense, first, step)
        assert_close(first["raw"][step], wanted)
        if step:
            safe = dense.gradient(torch.cat([dense.divergences(row) for row in first["reference"]]).mean())
            product, square = (float(vector(one) @ vector(safe)) for one in (wanted, safe))
            conflicts += product < 0
            factor = 1 - min(0.0, product) / square
            wanted = {name: value + factor * safe[name] for name, value in wanted.items()}
        assert_close(first["corrected"][step], wanted)
        assert all(torch.equal(vector(first["corrected"][step]), vector(one["corrected"][step])) for one in others)
    assert conflicts, "a run in which something is projected"
    report = first["report"]
    assert (report["steps"], report["corrected"], report["below_rounding"]) == (6, 5, 1)
    assert report["conflicts"] == conflicts


@both
def test_spf(seen: Any, dense: Dense, ranks: int) -> None:
    first, *others = seen("spf", ranks)
    assert first["accumulate"] > 1
    conflicts = 0
    for step in range(6):
        wanted = task_gradient(dense, first, step)
        safe = dense.gradient(torch.cat([dense.losses(row) for row in first["reference"][:2]]).mean())
        if float(vector(wanted) @ vector(safe)) < 0:
            conflicts += 1
            for name, value in wanted.items():
                left, singular, _ = np.linalg.svd(safe[name].double().numpy(), full_matrices=False)
                if singular[0]:
                    leading = torch.from_numpy(left[:, :1]).float()
                    wanted[name] = value - leading @ (leading.T @ value)
        assert_close(first["corrected"][step], wanted, tolerance=2e-3)
        assert all(torch.equal(vector(first["corrected"][step]), vector(one["corrected"][step])) for one in others)
    assert first["report"]["conflicts"] == conflicts > 0
