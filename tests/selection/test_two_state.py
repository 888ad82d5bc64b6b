import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch

from toss_lightning.selection.two_state import Chain, expected_counts, fit, pack, posterior

LENGTHS = [3, 6, 1, 5, 5, 0, 2]
CHAINS = [Chain(0.8, 0.3), Chain(0.0, 0.1), Chain(0.99, 0.02), Chain(0.4, 0.9)]


class Enumerated(NamedTuple):
    """What summing over every path of the hidden states gives, and over every way to have drawn it."""

    log_odds: np.ndarray
    log_likelihood: float
    draws: float
    harmful_draws: float


def enumerate_paths(evidence: np.ndarray, chain: Chain) -> Enumerated:
    """One row, by brute force, from the definition of the chain alone."""
    size, prior = len(evidence), (1 - chain.prior, chain.prior)
    joint, draws, harmful = np.zeros((size, 2)), 0.0, 0.0
    for states in itertools.product((0, 1), repeat=size):
        for drawn in itertools.product((False, True), repeat=size - 1):
            weight = prior[states[0]]
            for before, state, new in zip(states, states[1:], drawn, strict=False):
                weight *= (1 - chain.stay) * prior[state] if new else chain.stay * (state == before)
            weight *= math.exp(np.dot(states, evidence))
            joint[np.arange(size), states] += weight
            draws += weight * (1 + sum(drawn))
            harmful += weight * (states[0] + np.dot(drawn, states[1:]))
    total = joint[0].sum()
    return Enumerated(np.log(joint[:, 1] / joint[:, 0]), math.log(total), draws / total, harmful / total)


def some_rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of rows of different lengths, an empty one among them, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return np.random.default_rng(seed).normal(0, 2, offsets[-1]), offsets


def smoothed(evidence: np.ndarray, offsets: np.ndarray, chain: Chain, limit: int = 1 << 20) -> np.ndarray:
    found = np.full(len(evidence), np.nan)
    for batch in pack(offsets, limit):
        found[batch.tokens] = posterior(torch.from_numpy(evidence)[batch.tokens], batch.sizes, chain)
    return found


@pytest.mark.parametrize("limit", [1, 8, 1000])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_posterior_is_that_of_all_paths(chain: Chain, limit: int) -> None:
    evidence, offsets = some_rows()
    rows = [enumerate_paths(row, chain) for row in np.split(evidence, offsets[1:-1]) if len(row)]
    np.testing.assert_allclose(
        smoothed(evidence, offsets, chain, limit), np.concatenate([row.log_odds for row in rows]), atol=1e-10
    )


@pytest.mark.parametrize("limit", [1, 8, 1000])
@pytest.mark.parametrize("chain", CHAINS)
def test_likelihood_and_draws_are_those_of_all_paths(chain: Chain, limit: int) -> None:
    evidence, offsets = some_rows()
    rows = [enumerate_paths(row, chain) for row in np.split(evidence, offsets[1:-1]) if len(row)]
    counts = [
        expected_counts(torch.from_numpy(evidence)[batch.tokens], batch.sizes, chain) for batch in pack(offsets, limit)
    ]
    for name in ("log_likelihood", "draws", "harmful_draws"):
        ours, wanted = (sum(getattr(one, name) for one in many) for many in (counts, rows))
        assert ours == pytest.approx(wanted, abs=1e-10), name


def test_every_token_is_packed_once_and_rows_keep_their_order() -> None:
    _, offsets = some_rows()
    for limit in (1, 8, 1000):
        batches = list(pack(offsets, limit))
        assert sorted(torch.cat([batch.tokens for batch in batches]).tolist()) == list(range(offsets[-1]))
        for batch in batches:
            assert batch.sizes == sorted(batch.sizes, reverse=True)
            steps = torch.split(batch.tokens, batch.sizes)
            for now, after in itertools.pairwise(steps):
                assert (now[: len(after)] + 1).equal(after)


def test_a_row_reads_the_same_backwards() -> None:
    evidence, _ = some_rows()
    offsets = np.array([0, len(evidence)])
    chain = Chain(0.9, 0.2)
    np.testing.assert_allclose(
        smoothed(evidence[::-1].copy(), offsets, chain)[::-1], smoothed(evidence, offsets, chain), atol=1e-12
    )


def test_a_chain_that_never_stays_judges_every_token_alone() -> None:
    evidence, offsets = some_rows()
    np.testing.assert_allclose(smoothed(evidence, offsets, Chain(0.0, 0.2)), evidence + math.log(0.2 / 0.8), atol=1e-12)


def test_long_rows_of_strong_evidence_stay_finite_and_right() -> None:
    evidence = np.where(np.arange(4000) < 2000, -50.0, 50.0)
    odds = smoothed(evidence, np.array([0, 4000]), Chain(0.999, 1e-6))
    assert np.isfinite(odds).all()
    np.testing.assert_array_equal(odds > 0, evidence > 0)


def test_it_costs_the_same_result_in_single_precision() -> None:
    evidence, offsets = some_rows()
    for batch in pack(offsets):
        double = torch.from_numpy(evidence)[batch.tokens]
        chain = Chain(0.95, 0.1)
        torch.testing.assert_close(
            posterior(double.float(), batch.sizes, chain), posterior(double, batch.sizes, chain).float()
        )


def drawn_rows(seed: int, chain: Chain, shift: float, rows: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores drawn from the model itself: they vary around ``shift`` where harmful and around its negative elsewhere.

    Returns:
        Scores, offsets, and which tokens are harmful.
    """
    generator = np.random.default_rng(seed)
    lengths = generator.integers(20, 120, rows)
    harmful = []
    for length in lengths:
        for position in range(length):
            if position == 0 or generator.random() >= chain.stay:
                state = generator.random() < chain.prior
            harmful.append(state)
    truth = np.array(harmful)
    noise = generator.normal(0, math.sqrt(2 * shift * chain.temperature), len(truth))
    return np.where(truth, shift, -shift) + noise, np.concatenate([[0], np.cumsum(lengths)]), truth


ALL = {"stay", "prior", "temperature"}
CENTRED = ALL | {"centre"}
STARTS = [Chain(0.95, 0.1, 2.0), Chain(0.5, 0.5, 1.0), Chain(0.999, 0.3, 20.0)]


@pytest.mark.parametrize("start", STARTS)
def test_em_finds_the_chain_that_the_scores_were_drawn_from(start: Chain) -> None:
    truth = Chain(stay=0.97, prior=0.25, temperature=2.0)
    scores, offsets, _ = drawn_rows(0, truth, shift=0.5)
    found = fit(torch.from_numpy(scores), offsets, start, ALL)
    assert found.converged
    assert found.chain.stay == pytest.approx(truth.stay, abs=0.01)
    assert found.chain.prior == pytest.approx(truth.prior, abs=0.05)
    assert found.chain.temperature == pytest.approx(truth.temperature, rel=0.1)


@pytest.mark.parametrize(
    "free", [ALL, {"stay"}, {"prior"}, {"temperature"}, {"stay", "temperature"}, CENTRED, {"centre"}]
)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("law", ["its own", "heavy tails", "all benign", "noise", "no noise", "positive"])
def test_em_never_lowers_the_likelihood(law: str, start: Chain, free: set[str]) -> None:
    scores, offsets, truth = drawn_rows(1, Chain(0.9, 0.3, 2.0), shift=0.5, rows=20)
    generator = np.random.default_rng(2)
    values = {
        "its own": scores,
        "heavy tails": generator.standard_t(1.5, len(scores)),
        "all benign": -np.abs(scores),
        "noise": generator.normal(0, 1, len(scores)),
        "no noise": np.where(truth, 3.0, -3.0),
        "positive": np.abs(scores) / 100,
    }[law]
    found = fit(torch.from_numpy(values), offsets, start, free, tolerance=0.0, max_iterations=20)
    scale = abs(found.log_likelihoods[-1])
    assert np.diff(found.log_likelihoods).min() > -1e-9 * scale
    assert {name for name in CENTRED if getattr(found.chain, name) != getattr(start, name)} <= free
    assert found.chain.temperature >= 1


@pytest.mark.parametrize("centre", [0.0, -0.7])
def test_the_likelihood_that_em_reports_is_that_of_all_paths(centre: float) -> None:
    scores, offsets = some_rows()
    start = Chain(0.8, 0.3, 1.5, centre)
    found = fit(torch.from_numpy(scores), offsets, start, free={"stay"}, max_iterations=0)
    rows = [row for row in np.split(scores, offsets[1:-1]) if len(row)]
    evidence = sum(enumerate_paths((row - centre) / start.temperature, start).log_likelihood for row in rows)
    # given tau, every m has a variance of 2 m tau; the likeliest one, by a fine grid
    candidates = [
        scipy.stats.norm.logpdf(scores, centre - shift, math.sqrt(2 * shift * start.temperature)).sum()
        for shift in np.linspace(0.01, 5, 5_000)
    ]
    assert found.evidence == pytest.approx(evidence, abs=1e-10)
    assert found.log_likelihoods == [pytest.approx(evidence + max(candidates), abs=1e-3)]


@pytest.mark.parametrize("name", ["stay", "prior", "temperature", "centre"])
def test_what_em_ends_in_is_the_top_of_the_likelihood(name: str) -> None:
    scores, offsets, _ = drawn_rows(3, Chain(0.9, 0.3, 2.0), shift=0.6)
    tensor = torch.from_numpy(scores) + 0.5
    found = fit(tensor, offsets, STARTS[0], CENTRED, tolerance=1e-6, max_iterations=5_000)
    value = getattr(found.chain, name)
    for other in (0.97 * value, 1.03 * value if name != "stay" else (1 + value) / 2):
        moved = fit(tensor, offsets, found.chain._replace(**{name: other}), set(), max_iterations=0)
        assert moved.log_likelihoods[-1] < found.log_likelihoods[-1]


def test_a_fitted_centre_follows_a_shift_of_all_scores_and_nothing_else_changes() -> None:
    truth = Chain(stay=0.97, prior=0.25, temperature=2.0)
    scores, offsets, _ = drawn_rows(0, truth, shift=0.5)
    chains = []
    for moved in (0.0, 1.5):
        values = torch.from_numpy(scores) + moved
        chains.append(fit(values, offsets, STARTS[0]._replace(centre=float(values.mean())), CENTRED).chain)
    assert chains[0].centre == pytest.approx(0, abs=0.1)
    assert chains[0].stay == pytest.approx(truth.stay, abs=0.01)
    assert chains[0].prior == pytest.approx(truth.prior, abs=0.1)
    assert chains[1] == pytest.approx(chains[0]._replace(centre=chains[0].centre + 1.5), rel=1e-6)


def test_scores_without_harm_are_found_to_be_without() -> None:
    generator = np.random.default_rng(4)
    scores = generator.normal(-0.5, 1.4, 20_000)
    found = fit(torch.from_numpy(scores), np.arange(0, 20_001, 100), STARTS[0], ALL)
    assert found.chain.prior < 1e-3
    assert found.evidence == pytest.approx(0, abs=1)


def test_scores_that_say_nothing_are_evidence_of_nothing() -> None:
    scores, offsets = torch.zeros(200, dtype=torch.float64), np.arange(0, 201, 50)
    found = fit(scores, offsets, STARTS[0], ALL)
    assert found.evidence == pytest.approx(0, abs=1e-9)
    assert found.chain.stay == pytest.approx(STARTS[0].stay)
    assert found.chain.prior == pytest.approx(STARTS[0].prior)
