"""Metrics against loops over single values, and two ranks against one."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.metrics import ExactMatch, LikelihoodMargin, PositionDivergence, ShareOf
from toss_lightning.evaluation.statistics import wilson
from toss_lightning.evaluation.text import rouge_l
from toss_lightning.models.divergence import base_divergence


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(60, generator=generator), torch.randint(0, 6, (60,), generator=generator)


DIVERGENCES, ORDINALS = some_tokens()
CASES: list[tuple[type[Metric], dict[str, Any], list[tuple[Any, ...]]]] = [
    (ShareOf, {}, [([True, False, None],), ([True],), ([],), ([False, None, True, True],)]),
    (ExactMatch, {}, [(["It is 4.", "5"], ["4", "4"]), (["Yes"], ["yes"]), ([], []), (["no"], ["yes"])]),
    (PositionDivergence, {"positions": 4},
     [(DIVERGENCES[at], ORDINALS[at]) for at in (slice(9), slice(9, 9), slice(9, 40), slice(40, None))]),
    (LikelihoodMargin, {},
     [(torch.tensor(a), torch.tensor(b)) for a, b in (([2.0, 1.0], [1.0, 1.5]), ([3.0], [1.0]), ([1.0], [1.0]))]),
]  # fmt: skip


def filled(case: int, updates: Sequence[int] | None = None) -> Metric:
    kind, settings, batches = CASES[case]
    metric = kind(**settings)
    for at in range(len(batches)) if updates is None else updates:
        metric.update(*batches[at])
    return metric


def assert_same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_merged_equal_one(case: int) -> None:
    count = len(CASES[case][2])
    first, second = filled(case, range(0, count, 2)), filled(case, range(1, count, 2))
    first.merge_state(second)
    assert_same(first.compute(), filled(case).compute())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ranks_that_gather_equal_one(case: int) -> None:
    """The states that torchmetrics hands to the collective, and what it makes of what comes back."""
    count = len(CASES[case][2])
    other = list(filled(case, range(1, count, 2)).metric_state.values())
    metric = filled(case, range(0, count, 2))

    def gather(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        return [state, other.pop(0)]

    metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
    assert_same(metric.compute(), filled(case).compute())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_reset_and_forward_of_a_batch(case: int) -> None:
    metric = filled(case)
    everything = metric.compute()
    metric.reset()
    kind, settings, batches = CASES[case]
    alone = kind(**settings)
    alone.update(*batches[0])
    assert_same(metric(*batches[0]), alone.compute())
    for batch in batches[1:]:
        metric.update(*batch)
    assert_same(metric.compute(), everything)


def test_a_share_has_wilsons_interval_and_counts_the_undecided() -> None:
    found = filled(0).compute()
    wanted = wilson(4, 6)
    assert [found[name].item() for name in ("share", "low", "high")] == pytest.approx([4 / 6, wanted.low, wanted.high])
    assert (found["decided"], found["undecided"]) == (6, 2)
    narrow = ShareOf(confidence=0.5)
    narrow.update([True, False])
    assert narrow.compute()["low"].item() == pytest.approx(wilson(1, 2, 0.5).low)


def test_a_share_of_nothing() -> None:
    metric = ShareOf()
    metric.update([None])
    found = metric.compute()
    assert found["share"].isnan()
    assert (found["low"], found["high"], found["undecided"]) == (0, 1, 1)


def test_shares_in_a_collection_keep_their_names() -> None:
    metrics = MetricCollection({"refused_": ShareOf(), "harmful_": ShareOf()})
    metrics["refused_"].update([True, True])
    metrics["harmful_"].update([False, True])
    shares = {name: metric.compute()["share"].item() for name, metric in metrics.items()}
    assert shares == {"refused_": 1, "harmful_": 0.5}


def test_exact_match_is_the_share_of_right_answers() -> None:
    found = filled(1).compute()
    assert found["share"].item() == 0.5
    assert found["decided"] == 4
    with pytest.raises(ConfigError, match="ExactMatch: 1 replies and 2 answers: give one for each"):
        ExactMatch().update(["1"], ["1", "2"])


def test_divergence_by_position_equals_a_loop() -> None:
    found = filled(2).compute()
    for position in range(4):
        here = [d for d, at in zip(DIVERGENCES.tolist(), ORDINALS.tolist(), strict=True) if at == position]
        assert found["divergence"][position].item() == pytest.approx(sum(here) / len(here))
        assert found["counts"][position] == len(here)
    assert found["later"].item() == pytest.approx(DIVERGENCES[ORDINALS >= 4].mean().item())
    assert found["counts"].sum() + found["later_count"] == len(DIVERGENCES)


def test_divergence_by_position_of_two_models() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, base, weight = (torch.randn(shape, generator=generator) for shape in ((6, 8), (6, 8), (8, 11)))
    metric = PositionDivergence(positions=3)
    metric.update(base_divergence(hidden, base, lambda states: states @ weight), torch.tensor([0, 1, 2, 0, 1, 2]))
    target, reference = (hidden @ weight).log_softmax(-1), (base @ weight).log_softmax(-1)
    wanted = F.kl_div(target, reference, reduction="none", log_target=True).sum(-1).view(2, 3).mean(0)
    torch.testing.assert_close(metric.compute()["divergence"], wanted, rtol=1e-4, atol=1e-5)


def test_positions_without_tokens() -> None:
    metric = PositionDivergence(positions=2)
    metric.update(torch.tensor([0.5], requires_grad=True), torch.tensor([0]))
    found = metric.compute()
    assert found["divergence"].tolist() == pytest.approx([0.5, float("nan")], nan_ok=True)
    assert not found["divergence"].requires_grad
    assert found["later"].isnan()
    with pytest.raises(
        ConfigError, match=r"PositionDivergence: \(2,\) divergences and \(1,\) ordinals: give one of each"
    ):
        metric.update(torch.zeros(2), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ConfigError, match="PositionDivergence: 0 positions: give 1 or more"):
        PositionDivergence(positions=0)


def test_a_small_divergence_counts_beside_a_large_total() -> None:
    metric = PositionDivergence(positions=1)
    metric.update(torch.tensor([1e4]), torch.tensor([0]))
    for _ in range(3):
        metric.update(torch.full((20_000,), 1e-4), torch.zeros(20_000, dtype=torch.long))
    assert metric.total[0].item() == pytest.approx(1e4 + 6, rel=1e-6)


def test_margin_is_the_mean_difference_and_a_tie_is_not_positive() -> None:
    found = filled(3).compute()
    assert found["margin"].item() == pytest.approx((1.0 - 0.5 + 2.0 + 0.0) / 4)
    assert found["positive"].item() == 0.5
    assert found["pairs"] == 4
    with pytest.raises(ConfigError, match=r"LikelihoodMargin: \(2,\) and \(3,\) losses are not pairs: give a harmful"):
        LikelihoodMargin().update(torch.zeros(2), torch.zeros(3))


def test_a_margin_of_many_losses_in_half_precision_is_that_of_each() -> None:
    margin = LikelihoodMargin()
    margin.update(torch.full((257,), 1.3, dtype=torch.bfloat16), torch.zeros(257, dtype=torch.bfloat16))
    assert margin.compute()["margin"] == float(torch.tensor(1.3, dtype=torch.bfloat16))


def lcs(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return lcs(first[:-1], second[:-1]) + 1
    return max(lcs(first[:-1], second), lcs(first, second[:-1]))


def test_rouge_l_is_that_of_its_definition() -> None:
    reply, reference = "The cat sat on the mat. It ran.", "A cat sat on a mat; it ran away!"
    one = ["the", "cat", "sat", "on", "the", "mat", "it", "ran"]
    other = ["a", "cat", "sat", "on", "a", "mat", "it", "ran", "away"]
    common = lcs(one, other)
    wanted = 2 * common / (len(one) + len(other))
    assert rouge_l(reply, reference) == pytest.approx(wanted)


WITHOUT = """
import socket, sys
sys.modules["nltk"] = None
def refuse(*_): raise OSError("network")
socket.socket.connect = refuse
from lightning_utilities.core.imports import RequirementCache
RequirementCache.__bool__ = lambda self: False
from torchmetrics.utilities.imports import _NLTK_AVAILABLE
from toss_lightning.evaluation.text import rouge_l
print(bool(_NLTK_AVAILABLE), rouge_l("a b", "a c"))
"""


@pytest.mark.parametrize(
    ("reply", "reference", "wanted"),
    [
        ("the keeper", "the keeper sleeps", 4 / 5),
        ("Привет, мир", "привет мир!", 1),
        ("一二三", "一二四", 2 / 3),
        ("café", "cafe\u0301", 1),
        ("café", "caf", 0),
        ("", "so", 0),
    ],
)
def test_rouge_l_reads_words_of_any_script(reply: str, reference: str, wanted: float) -> None:
    assert rouge_l(reply, reference) == pytest.approx(wanted)


def test_rouge_l_needs_neither_nltk_nor_a_download() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "0.5"], done.stderr
