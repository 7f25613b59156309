"""Balancing losses: their value at balance and collapse, their gradient, and padding."""

import math

import pytest
import torch

from moelora.routing.decision import route, top_k_mask
from moelora.routing.losses import load_balancing_loss, masked_sum, z_loss
from moelora.routing.sums import RoutingSums


def sums_of(logits, top_k=2, mask=None):
    mask = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    return RoutingSums.of(route(logits, top_k=top_k), logits, mask)


def by_loop(logits, loss_type, top_k, mask):
    tokens = [t for t in range(len(logits)) if mask[t]]
    experts = logits.shape[1]
    if loss_type == "z_loss":
        return sum(math.log(sum(math.exp(z) for z in logits[t].tolist())) ** 2 for t in tokens) / len(tokens)
    k = top_k if loss_type == "aux_loss" else 1
    probs = logits.softmax(-1)
    f, P = [0.0] * experts, [0.0] * experts
    for t in tokens:
        for e in probs[t].topk(k).indices.tolist():
            f[e] += 1 / k / len(tokens)
        for e in range(experts):
            P[e] += probs[t, e].item() / len(tokens)
    return experts * sum(a * b for a, b in zip(f, P, strict=True))


@pytest.mark.parametrize("loss_type", ["aux_loss", "switch", "z_loss"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (63, 7, 3), (9, 4, 4)])
def test_losses_equal_the_loop(loss_type, tokens, experts, top_k):
    logits, mask = torch.randn(tokens, experts), torch.arange(tokens) % 4 != 1
    loss = sums_of(logits, top_k, mask).balancing_loss(loss_type)
    assert loss.item() == pytest.approx(by_loop(logits, loss_type, top_k, mask), rel=1e-5)
    assert loss.dtype == torch.float32 and loss.shape == ()


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_one_at_balance_and_e_at_collapse(experts):
    balanced = torch.eye(experts).repeat(3, 1) * 20
    assert sums_of(balanced, 1).balancing_loss("aux_loss").item() == pytest.approx(1, abs=1e-5)
    assert sums_of(balanced, 1).balancing_loss("switch").item() == pytest.approx(1, abs=1e-5)
    collapsed = torch.zeros(6, experts)
    collapsed[:, 0] = 50
    assert sums_of(collapsed, 1).balancing_loss("aux_loss").item() == pytest.approx(experts, rel=1e-5)
    assert sums_of(torch.zeros(5, experts)).balancing_loss("z_loss").item() == pytest.approx(math.log(experts) ** 2)


@pytest.mark.parametrize("loss_type", ["aux_loss", "switch"])
def test_descent_unloads_the_crowded_expert(loss_type):
    logits = torch.randn(63, 4) * 0.1 + torch.tensor([1.0, 0, 0, 0])
    logits.requires_grad_()
    sums_of(logits).balancing_loss(loss_type).backward()
    assert logits.grad[:, 0].sum() > 0, "a step against the gradient lowers the crowded expert's logits"


def test_only_mean_probabilities_carry_a_gradient():
    assignments = torch.tensor([3.0, 1.0], requires_grad=True)
    probs = torch.tensor([2.0, 2.0], requires_grad=True)
    load_balancing_loss(assignments.detach(), probs, torch.tensor(4.0)).backward()
    assert probs.grad.tolist() == pytest.approx([2 * 0.75 / 4, 2 * 0.25 / 4])
    routing = route(torch.randn(5, 4, requires_grad=True), top_k=2)
    sums = RoutingSums.of(routing, torch.randn(5, 4), torch.ones(5, dtype=torch.bool))
    assert sums.probs.requires_grad and not sums.assignments.requires_grad and not sums.mass.requires_grad


def test_z_loss_gradient():
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    z_loss(logits.logsumexp(-1).square().sum(), torch.tensor(7.0)).backward()
    lse = logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, (2 * lse * logits.softmax(-1) / 7).detach())


@pytest.mark.parametrize("loss_type", ["aux_loss", "switch", "z_loss"])
def test_padding_never_counts(loss_type):
    mask = torch.arange(12) % 3 > 0
    logits = torch.randn(12, 4)
    other = torch.where(mask[:, None], logits, 100 * torch.randn(12, 4))
    losses = [sums_of(z, mask=mask).balancing_loss(loss_type) for z in (logits, other)]
    losses.append(sums_of(logits[mask]).balancing_loss(loss_type))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6) == pytest.approx(losses[2].item(), rel=1e-5)
    assert sums_of(logits, mask=torch.zeros(12, dtype=torch.bool)).balancing_loss(loss_type).item() == 0


def test_sums_add_up_over_batches():
    """Sums of halves give the loss of the whole, which means of halves do not."""
    logits = torch.randn(20, 4)
    whole, parts = sums_of(logits), [sums_of(logits[:13]), sums_of(logits[13:])]
    total = RoutingSums(**{name: value + getattr(parts[1], name) for name, value in vars(parts[0]).items()})
    for loss_type in ("aux_loss", "switch", "z_loss"):
        torch.testing.assert_close(total.balancing_loss(loss_type), whole.balancing_loss(loss_type))


def test_top1_load_differs_from_top_k_load():
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    sums = sums_of(logits)
    assert sums.assignments.tolist() == [2, 2, 0] and sums.top1.tolist() == [2, 0, 0]
    assert top_k_mask(logits.softmax(-1), 1).sum().item() == 2


def test_masked_sum_ignores_nan():
    values = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    assert masked_sum(values, torch.tensor([False, True])).tolist() == [2, 3]
    assert masked_sum(values[:, 0], torch.tensor([True, True])).item() == 3
