"""What steps in training minimise, against full logits of single rows and plain autograd; on one process and on two."""

from typing import Any

import pytest
import torch
from dense import Dense, assert_close, vector

from toss_lightning.selection import Seal

both = pytest.mark.parametrize("ranks", [1, 2])


def steps_of(seen: list[dict[str, Any]]) -> range:
    assert seen[0]["accumulate"] > 1, "the tests are about several micro-batches"
    for other in seen[1:]:
        for step, gradients in enumerate(seen[0]["raw"]):
            assert all(torch.equal(value, other["raw"][step][name]) for name, value in gradients.items())
    assert len(seen[0]["raw"]) == 6
    return range(6)


@both
@pytest.mark.parametrize(("name", "top"), [("anchor", None), ("anchor_top", 7)])
def test_weighted_losses_and_anchors_to_the_base(seen: Any, dense: Dense, ranks: int, name: str, top: Any) -> None:
    found = seen(name, ranks)
    for step in steps_of(found):
        rows = [found[0]["rows"][index] for index in found[0]["steps"][step]]
        dense.at(found[0]["before"][step])
        task = sum((row["weight"] * dense.losses(row)).sum() for row in rows)
        anchors = sum((row["anchor"] * dense.divergences(row, top)).sum() for row in rows)
        tokens = sum(len(row["positions"]) for row in rows)
        of_task, of_anchors = (dense.gradient(part / tokens) for part in (task, anchors))
        share = float(vector(of_anchors).norm() / vector(of_task).norm())
        assert step == 0 or share > 0.002, "an anchor that says something"
        assert_close(found[0]["raw"][step], {name: value + of_anchors[name] for name, value in of_task.items()})


def rho1(dense: Dense, rows: list[dict[str, Any]], discard: float = 0.4) -> list[torch.Tensor]:
    """Weights of a step's rows, token by token: the lowest excess losses go, but for ends of turns."""
    tokens = []
    for at, row in enumerate(rows):
        excess = (dense.losses(row).detach() - row["loss_utility"]).tolist()
        tokens += [(excess[place], at, place) for place in range(len(excess)) if not row["end"][place]]
    weights = [torch.ones(len(row["positions"])) for row in rows]
    everything = sum(len(weight) for weight in weights)
    for _, at, place in sorted(tokens)[: int(discard * everything)]:
        weights[at][place] = 0
    return weights


@both
@pytest.mark.parametrize("name", ["rho1", "rho1_dropout"])
def test_a_whole_step_is_weighed_at_once_and_without_dropout(seen: Any, dense: Dense, ranks: int, name: str) -> None:
    found = seen(name, ranks)
    for step in steps_of(found):
        dense.at(found[0]["before"][step])
        members = sorted(found[0]["steps"][step])
        rows = [found[0]["rows"][index] for index in members]
        weights = rho1(dense, rows)
        held = {index: weight for one in found for index, weight in one["weights"][step].items()}
        assert {index: weight.tolist() for index, weight in zip(members, weights, strict=True)} == held
        if name == "rho1":
            loss = sum((weight * dense.losses(row)).sum() for weight, row in zip(weights, rows, strict=True))
            assert_close(found[0]["raw"][step], dense.gradient(loss / sum(weight.sum() for weight in weights)))


@both
def test_the_bilevel_training_of_seal(seen: Any, dense: Dense, ranks: int) -> None:
    found = seen("seal", ranks)
    first, own = found[0], found[0]["own"]
    settings = Seal(epochs=2, gamma=0.6, lr=0.05)
    logits = torch.full((own,), settings.init, dtype=torch.float64, requires_grad=True)
    selector = torch.optim.Adam([logits], lr=settings.lr, betas=(0.9, 0.95))
    for step in steps_of(found):
        dense.at(first["before"][step])
        members = sorted(first["steps"][step])
        gamma = settings.gamma - settings.gamma_decay * (step // 3)
        safe = torch.cat([dense.losses(first["rows"][index]) for index in members if index >= own]).mean()
        custom = [index for index in members if index < own]
        means = torch.stack([dense.losses(first["rows"][index]).mean() for index in custom])
        factors = own * logits.softmax(0)[custom]
        task = (factors.detach() * means).mean()
        assert_close(first["raw"][step], dense.gradient(gamma * safe + (1 - gamma) * task))

        selector.zero_grad()
        (factors * means.detach()).mean().backward()
        selector.step()
        for one in found:
            torch.testing.assert_close(one["logits"][step], logits.detach(), rtol=0, atol=1e-4)
