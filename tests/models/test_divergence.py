"""KL(p_base || p_target) by chunks, against full matrices and against torch's own divergence."""

import pytest
import torch
from torch.nn import functional as F

from toss_lightning.errors import ConfigError
from toss_lightning.models.divergence import base_divergence
from toss_lightning.models.losses import OutputHead

POSITIONS, HIDDEN, VOCABULARY = 23, 16, 37


@pytest.fixture
def head() -> OutputHead:
    torch.manual_seed(0)
    return OutputHead(torch.nn.Linear(HIDDEN, VOCABULARY))


@pytest.fixture
def both() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the target, which want a gradient, and of the base."""
    generator = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(POSITIONS, HIDDEN, generator=generator)
    return (base + torch.randn(POSITIONS, HIDDEN, generator=generator)).requires_grad_(), base


def torch_divergence(hidden: torch.Tensor, base_hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    target, base = head(hidden).log_softmax(-1), head(base_hidden).log_softmax(-1)
    return F.kl_div(target, base.detach(), log_target=True, reduction="none").sum(-1)


def coarse_divergence(hidden: torch.Tensor, base_hidden: torch.Tensor, head: OutputHead, top: int) -> list[float]:
    """Position by position in float64: the base's likeliest tokens, and the sum of the others."""
    found = []
    for target_logits, base_logits in zip(head(hidden), head(base_hidden), strict=True):
        base, target = base_logits.double().softmax(-1), target_logits.double().softmax(-1)
        order = base.argsort(descending=True)
        pairs = [(base[token].item(), target[token].item()) for token in order[:top]]
        pairs.append((base[order[top:]].sum().item(), target[order[top:]].sum().item()))
        found.append(sum(p * torch.log(torch.tensor(p / q, dtype=torch.float64)).item() for p, q in pairs if p))
    return found


@pytest.mark.parametrize("chunk", [1, 5, POSITIONS, 512])
def test_equals_torchs_divergence_of_full_matrices_in_value_and_gradient(head, both, chunk: int) -> None:
    hidden, base_hidden = both
    weight = torch.rand(POSITIONS, generator=torch.Generator().manual_seed(2))
    wanted = torch_divergence(hidden, base_hidden, head)
    ours = base_divergence(hidden, base_hidden, head, chunk)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((values * weight).sum(), hidden)[0] for values in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_target_is_drawn_to_the_base_and_not_the_other_way_round(head, both) -> None:
    """KL(p_base || p_target) has the gradient p_target - p_base at the target's logits."""
    hidden, base_hidden = both
    logits = head(hidden).detach().requires_grad_()
    divergence = base_divergence(logits, head(base_hidden), lambda logits: logits).sum()
    (gradient,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - head(base_hidden).softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top", [None, 1, 5])
def test_zero_at_equality_with_no_pull(head, both, top: int | None) -> None:
    hidden = both[1].clone().requires_grad_()
    divergence = base_divergence(hidden, both[1], head, 4, top)
    assert divergence.tolist() == [0.0] * POSITIONS
    (gradient,) = torch.autograd.grad(divergence.sum(), hidden)
    assert gradient.abs().max() < 1e-5


def test_no_gradient_reaches_the_base(head, both) -> None:
    base_hidden = both[1].requires_grad_()
    base_divergence(both[0], base_hidden, head, 4).sum().backward()
    assert both[0].grad is not None
    assert base_hidden.grad is None


@pytest.mark.parametrize("top", [1, 2, 8, VOCABULARY - 1])
@pytest.mark.parametrize("chunk", [4, 512])
def test_the_top_tokens_and_one_bucket_for_the_others(head, both, top: int, chunk: int) -> None:
    hidden, base_hidden = both
    ours = base_divergence(hidden, base_hidden, head, chunk, top)
    torch.testing.assert_close(
        ours.double(), torch.tensor(coarse_divergence(*both, head, top)).double(), rtol=1e-4, atol=1e-5
    )


def test_more_tokens_told_apart_never_lower_the_divergence_and_all_of_them_are_the_full_one(head, both) -> None:
    full = base_divergence(*both, head)
    divergences = [base_divergence(*both, head, top=top) for top in (1, 2, 4, 8, 16, VOCABULARY - 1)]
    for coarser, finer in zip(divergences, [*divergences[1:], full], strict=True):
        assert (coarser <= finer + 1e-6).all()
    torch.testing.assert_close(divergences[-1], full, rtol=1e-5, atol=1e-6)
    assert torch.equal(base_divergence(*both, head, top=VOCABULARY), full)
    assert torch.equal(base_divergence(*both, head, top=10 * VOCABULARY), full)


def test_the_top_tokens_follow_the_base_and_leave_a_gradient_to_every_token(head, both) -> None:
    logits = head(both[0]).detach().requires_grad_()
    base_logits = head(both[1]).detach()
    base_divergence(logits, base_logits, lambda logits: logits, top=3).sum().backward()
    base, target = base_logits.softmax(-1), logits.detach().softmax(-1)
    likeliest = base.topk(3).indices
    assert logits.grad is not None
    # at the top tokens as in the full divergence; the others share what the bucket is off by
    expected = target - base
    torch.testing.assert_close(logits.grad.gather(-1, likeliest), expected.gather(-1, likeliest), rtol=1e-4, atol=1e-6)
    rest = torch.ones_like(base).scatter(-1, likeliest, 0.0)
    off = (expected * rest).sum(-1, keepdim=True)
    shares = target * rest / (target * rest).sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad * rest, off * shares, rtol=1e-4, atol=1e-6)


def test_a_base_that_is_sure_leaves_finite_numbers() -> None:
    base = torch.zeros(3, 5)
    base[:, 0] = 300.0
    for top in (None, 1, 4):
        target = torch.zeros(3, 5, requires_grad=True)
        divergence = base_divergence(target, base, lambda logits: logits, top=top)
        torch.testing.assert_close(divergence, torch.full((3,), 5.0).log())
        divergence.sum().backward()
        assert target.grad.isfinite().all()


def test_no_logits_outlive_their_chunk(both) -> None:
    """Training memory stays at one chunk: nothing of the size [N, V] is kept for the backward pass."""
    head = OutputHead(torch.nn.Linear(HIDDEN, 500))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        base_divergence(*both, head, chunk=4).sum()
    assert kept
    assert max(kept) < 4 * 500


def test_the_head_as_the_model_computes_it_and_float32_whatever_the_hidden_states_are() -> None:
    layer = torch.nn.Linear(8, 11).to(torch.bfloat16)
    target, base = torch.randn(2, 4, 8).to(torch.bfloat16)
    divergence = base_divergence(target, base, OutputHead(layer, softcap=0.5))
    assert divergence.dtype == torch.float32
    log_t, log_b = ((0.5 * torch.tanh(layer(states).float() / 0.5)).log_softmax(-1) for states in (target, base))
    torch.testing.assert_close(divergence, (log_b.exp() * (log_b - log_t)).sum(-1))


def test_no_positions_no_divergence(head) -> None:
    assert base_divergence(torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN), head).shape == (0,)


@pytest.mark.parametrize("top", [0, -1])
def test_no_tokens_to_tell_apart(head, both, top: int) -> None:
    with pytest.raises(ConfigError, match=f"top: {top} tokens tell no distributions apart: give 1 or more"):
        base_divergence(*both, head, top=top)
