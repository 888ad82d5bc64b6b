"""What steps in training minimise, against full logits of single rows and plain autograd; on one process and on two."""

from typing import Any

import pytest
import torch
from dense import Dense, assert_close, vector
from watched import row_factor

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


@both
def test_a_coming_step_may_be_weighed_row_by_row(seen: Any, dense: Dense, ranks: int) -> None:
    for name in ("rows_kept", "rows_row"):
        found = seen(name, ranks)
        for step in steps_of(found):
            dense.at(found[0]["before"][step])
            members = [index for index in found[0]["steps"][step] if row_factor(index)]
            assert 0 < len(members) < len(found[0]["steps"][step])
            rows = [found[0]["rows"][index] for index in members]
            weights = [row_factor(index) * row["weight"] for index, row in zip(members, rows, strict=True)]
            sums = [(weight * dense.losses(row)).sum() for weight, row in zip(weights, rows, strict=True)]
            totals = [weight.sum() for weight in weights]
            if name == "rows_kept":
                loss = sum(sums) / sum(totals)
            else:
                loss = sum(one / total for one, total in zip(sums, totals, strict=True)) / len(rows)
            assert_close(found[0]["raw"][step], dense.gradient(loss))


@both
def test_safety_rows_are_held_to_the_base_and_not_trained_on(seen: Any, dense: Dense, ranks: int) -> None:
    found = seen("safety_rows", ranks)
    own = found[0]["own"]
    for step in steps_of(found):
        dense.at(found[0]["before"][step])
        members = found[0]["steps"][step]
        custom = [found[0]["rows"][index] for index in members if index < own]
        safety = [found[0]["rows"][index] for index in members if index >= own]
        assert len(safety) == 2
        # 0.5 is the anchor's weight
        task = sum((row["weight"] * dense.losses(row)).sum() for row in custom)
        anchors = sum((0.5 * (row["weight"] == 0) * dense.divergences(row)).sum() for row in custom)
        beside = sum(0.5 * dense.divergences(row).sum() for row in safety)
        tokens = sum(len(row["positions"]) for row in custom)
        of_custom, of_safety = (dense.gradient(part / tokens) for part in (task + anchors, beside))
        share = float(vector(of_safety).norm() / vector(of_custom).norm())
        assert step < 2 or share > 1e-3, "safety rows that say something"
        assert_close(found[0]["raw"][step], {name: value + of_safety[name] for name, value in of_custom.items()})


@both
@pytest.mark.parametrize("name", ["dr_sft", "constrained"])
def test_weights_made_in_training_have_no_gradient_of_their_own(seen: Any, dense: Dense, ranks: int, name: str) -> None:
    def weights(row: dict[str, Any]) -> torch.Tensor:
        now = -dense.losses(row).detach()
        base = -row["loss_base"]
        if name == "constrained":
            betas = torch.tensor([0.5, 2.0, 2.0, *[0.1] * len(now)])[: len(now)]
            return 2 * (1 - torch.sigmoid(betas * (now - base)))
        degraded = -row["loss_degraded"]
        eta = 1 - 4 * torch.sigmoid(base - degraded).clamp(0, 0.5)
        return (1 - eta) * (1 - torch.sigmoid(0.5 * 0.5 * (now - base - eta * (now - degraded))))

    found = seen(name, ranks)
    for step in steps_of(found):
        dense.at(found[0]["before"][step])
        rows = [found[0]["rows"][index] for index in found[0]["steps"][step]]
        wanted = [weights(row).clamp(min=1e-3) for row in rows]
        loss = sum((weight * dense.losses(row)).sum() for weight, row in zip(wanted, rows, strict=True))
        assert_close(found[0]["raw"][step], dense.gradient(loss / sum(len(row["positions"]) for row in rows)))
        flat = torch.cat(wanted)
        assert step == 0 or float(flat.std()) > 1e-3, "weights that say something"


@both
def test_what_is_logged_of_a_step_is_of_the_whole_step(seen: Any, dense: Dense, ranks: int) -> None:
    for one in seen("optim", ranks):
        for step in steps_of([one]):
            dense.at(one["before"][step])
            rows = [one["rows"][index] for index in one["steps"][step]]
            tokens = sum(len(row["positions"]) for row in rows)
            loss = float(sum((row["weight"] * dense.losses(row)).sum() for row in rows)) / tokens
            logged = one["logged"][step]
            assert logged["loss"] == pytest.approx(loss, rel=1e-4)
            assert logged["grad_norm"] == pytest.approx(float(vector(one["raw"][step]).norm()), rel=1e-4)
            kept = float(sum(row["weight"].sum() for row in rows)) / tokens
            assert logged["kept_share"] == pytest.approx(kept, rel=1e-4)


@both
def test_steps_are_those_of_adamw_at_the_scheduled_rate(seen: Any, ranks: int) -> None:
    found = seen("optim", ranks)[0]
    # a warm-up over a quarter of six steps, rounded up, then down to 0
    rates = [1e-2 * factor for factor in (0.5, 1.0, 1.0, 0.75, 0.5, 0.25)]
    weights = {name: value.clone().requires_grad_() for name, value in found["before"][0].items()}
    oracle = torch.optim.AdamW(list(weights.values()), betas=(0.8, 0.9), weight_decay=0.1)
    for step, rate in enumerate(rates):
        assert found["logged"][step]["lr"] == pytest.approx(rate)
        for name, value in weights.items():
            torch.testing.assert_close(found["before"][step][name], value.detach(), rtol=1e-4, atol=1e-6)
            value.grad = found["corrected"][step][name].clone()
        oracle.param_groups[0]["lr"] = rate
        oracle.step()


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
