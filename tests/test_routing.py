"""Routing decisions against a slow loop over tokens, and what routers keep exact."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import every_pair

from moelora.routing import FixedRouter, Router, rms_norm
from moelora.routing.decision import route, top_k_mask, within_capacity

SHAPES = [(1, 4, 2), (63, 7, 3), (9, 4, 4), (20, 2, 1), (16, 8, 2)]  # tokens, experts, top-k


def by_loop(logits, top_k, temperature=1.0, maturity=None, mask=None, factor=None):
    """Design, section 3, token by token in Python floats: weights, and the assignments within capacity."""
    tokens, experts = logits.shape
    mask = [True] * tokens if mask is None else mask.tolist()
    probs, chosen = [], []
    for row in logits.tolist():
        exps = [math.exp((z - max(row)) / temperature) for z in row]
        probs.append([value / sum(exps) for value in exps])
        chosen.append(set(sorted(range(experts), key=lambda e: -probs[-1][e])[:top_k]))
    kept = [set(selected) for selected in chosen]
    if factor is not None and top_k < experts:
        capacity = math.ceil(round(factor * sum(mask) * top_k / experts, 9))
        for e in range(experts):
            takers = sorted((t for t in range(tokens) if mask[t] and e in chosen[t]), key=lambda t: -probs[t][e])
            for t in takers[capacity:]:
                kept[t].discard(e)
    weights = torch.zeros(tokens, experts, dtype=torch.float64)
    for t in range(tokens):
        outside = [0.0 if maturity is None else 1 - maturity[e] for e in range(experts)]
        shares = [probs[t][e] * (1 if e in chosen[t] else outside[e]) for e in range(experts)]
        for e in range(experts):
            weights[t, e] = probs[t][e] * (1 if e in kept[t] else outside[e]) / sum(shares)
    return weights, kept


@every_pair(
    shape=SHAPES,
    temperature=[0.5, 1.0, 2.0],
    factor=[None, 0.5, 1.0, 1.25],
    maturity=[None, "new", "mixed", "mature"],
)
def test_route_equals_the_loop(shape, temperature, factor, maturity):
    tokens, experts, top_k = shape
    logits = torch.randn(tokens, experts)
    values = {"new": [0.0] * experts, "mature": [1.0] * experts, "mixed": [e / experts for e in range(experts)]}
    given = values.get(maturity)
    mask = torch.rand(tokens) > 0.3
    routing = route(
        logits, top_k=top_k, temperature=temperature, maturity_E=None if given is None else torch.tensor(given),
        mask_T=mask, capacity_factor=factor,
    )  # fmt: skip
    weights, kept = by_loop(logits, top_k, temperature, given, mask, factor)
    torch.testing.assert_close(routing.weights.double(), weights, rtol=1e-5, atol=1e-6)
    assert [set(row.nonzero().flatten().tolist()) for row in routing.kept] == kept
    assert routing.selected.sum(-1).eq(top_k).all()
    torch.testing.assert_close(routing.probs, torch.softmax(logits / temperature, -1))


def test_learned_sums_to_one_and_is_sparse():
    routing = route(torch.randn(63, 7), top_k=3)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(63))
    assert (routing.weights > 0).sum(-1).eq(3).all()


def test_top_k_of_all_experts_is_a_dense_softmax():
    logits = torch.randn(9, 4)
    torch.testing.assert_close(route(logits, top_k=4, capacity_factor=0.1).weights, logits.softmax(-1))


def test_all_new_is_dense_and_all_mature_is_learned():
    logits = torch.randn(9, 4)
    torch.testing.assert_close(route(logits, top_k=2, maturity_E=torch.zeros(4)).weights, logits.softmax(-1))
    learned = route(logits, top_k=2).weights
    torch.testing.assert_close(route(logits, top_k=2, maturity_E=torch.ones(4)).weights, learned, rtol=0, atol=0)


def test_ties_still_select_exactly_k():
    assert top_k_mask(torch.full((5, 7), 1 / 7), 3).sum(-1).eq(3).all()


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extreme_logits_stay_finite(scale):
    logits = (torch.randn(9, 4) * scale).requires_grad_()
    weights = route(logits, top_k=2, maturity_E=torch.rand(4), capacity_factor=0.5).weights
    weights.square().sum().backward()
    assert weights.isfinite().all() and logits.grad.isfinite().all()


# ---- capacity ----


def test_capacity_keeps_the_most_probable_and_the_rest_is_left_over():
    """Four tokens want expert 0 first; it has room for ceil(1.0 * 4 * 1 / 2) = 2."""
    logits = torch.tensor([[1.0, 0.0], [4.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    routing = route(logits, top_k=1, capacity_factor=1.0)
    assert routing.kept[:, 0].tolist() == [False, True, False, True]
    assert routing.weights.tolist() == [[0, 0], [1, 0], [0, 0], [1, 0]]


def test_dropped_assignment_leaves_its_share_unassigned():
    """Room for one each: expert 0 keeps the last token, expert 1 the first; nobody else's share grows."""
    logits = torch.tensor([[3.0, 2.0, 0.0], [4.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    weights = route(logits, top_k=2, capacity_factor=1 / 2).weights
    first, last = torch.softmax(logits[0, :2], 0), torch.softmax(logits[2, :2], 0)
    expected = torch.tensor([[0.0, first[1], 0.0], [0.0, 0.0, 0.0], [last[0], 0.0, 0.0]])
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("tokens", [3, 6, 7, 12, 63])
def test_factor_one_has_room_for_a_perfect_balance(tokens):
    """ceil of an exact share, not of a share that rounding pushed above it."""
    experts, top_k = 3, 1
    logits = F.one_hot(torch.arange(tokens) % experts, experts).float() * 5
    routing = route(logits, top_k=top_k, capacity_factor=1.0)
    assert routing.kept.sum() == tokens


def test_padding_takes_no_room_and_changes_nothing():
    logits, mask = torch.randn(20, 4), torch.arange(20) % 3 > 0
    other = torch.where(mask[:, None], logits, torch.randn(20, 4) * 100)
    ours, theirs = (route(z, top_k=2, mask_T=mask, capacity_factor=0.7) for z in (logits, other))
    torch.testing.assert_close(ours.weights[mask], theirs.weights[mask], rtol=0, atol=0)
    alone = route(logits[mask], top_k=2, capacity_factor=0.7)
    torch.testing.assert_close(ours.weights[mask], alone.weights, rtol=0, atol=0)
    assert not alone.kept.equal(alone.selected), "nothing was dropped: the test would prove nothing"


def test_no_real_token():
    mask = torch.zeros(5, dtype=torch.bool)
    routing = route(torch.randn(5, 4), top_k=2, mask_T=mask, capacity_factor=1.0)
    assert routing.weights.isfinite().all()


def test_capacity_of_an_expert_without_tokens():
    probs = torch.tensor([[0.6, 0.4, 0.0]] * 4)
    selected = top_k_mask(probs, 2)
    kept = within_capacity(probs, selected, torch.ones(4, dtype=torch.bool), 10.0, 2)
    assert kept.equal(selected) and not kept[:, 2].any()


@pytest.mark.parametrize("factor", [None, 0.5])
def test_gradient_of_the_logits(factor):
    """By finite differences, where no decision flips."""
    logits = torch.randn(6, 4, dtype=torch.float64).requires_grad_()

    def weights(z):
        return route(
            z, top_k=2, temperature=2.0, maturity_E=torch.tensor([0, 0.3, 1, 1]), capacity_factor=factor
        ).weights

    assert torch.autograd.gradcheck(weights, (logits,))


# ---- routers ----


@pytest.mark.parametrize("hidden_size", [None, 5], ids=["linear", "two-layer"])
def test_router_is_the_formula(hidden_size):
    router = Router(8, 7, hidden_size)
    x = torch.randn(2, 3, 8)
    hidden = x if hidden_size is None else F.silu(x @ router.hidden_weight.T)
    torch.testing.assert_close(router(x), hidden @ router.weight.T)
    assert sum(p.numel() for p in router.parameters()) == (8 * 7 if hidden_size is None else 8 * 5 + 5 * 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_computes_in_float32(dtype):
    router = Router(64, 4, 16).to(dtype)
    x = torch.randn(9, 64)
    logits = router(rms_norm(x.to(dtype)))
    assert logits.dtype == torch.float32
    exact = Router(64, 4, 16)
    exact.load_state_dict(router.state_dict())
    torch.testing.assert_close(logits, exact(rms_norm(x.to(dtype).float())), rtol=0, atol=0)


@pytest.mark.parametrize("build", [lambda: Router(8, 4), lambda: FixedRouter(4)], ids=["learned", "fixed"])
@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()], ids=["bf16", "half", "double"]
)
def test_buffers_keep_their_dtype_and_value(build, cast):
    router = build()
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router.maturity.fill_(0.1234567)
    exact = router.maturity.clone()
    cast(router)
    assert router.maturity.dtype == torch.float32 and torch.equal(router.maturity, exact)
    assert {n: b.dtype for n, b in router.named_buffers()} == {n: b.dtype for n, b in before.items()}
    assert router.tokens_per_expert.dtype == torch.int64


def test_buffers_follow_the_device():
    assert Router(8, 4).to("meta").maturity.is_meta


def test_rms_norm_sees_direction_not_scale():
    x = torch.randn(5, 16)
    torch.testing.assert_close(rms_norm(x * 1000), rms_norm(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rms_norm(x).square().mean(-1), torch.ones(5), rtol=1e-4, atol=1e-4)
    assert rms_norm(torch.zeros(1, 4)).eq(0).all() and rms_norm(x.half()).dtype == torch.float32


def test_no_two_experts_start_tied():
    weight = Router(64, 8).weight
    assert torch.pdist(weight).min() > 0.1


def test_fixed_router():
    router = FixedRouter(2)
    assert router(5).tolist() == pytest.approx([0.2, 0.2])
    router.set_weights(torch.tensor([0.7, -0.1]))
    assert router(5).tolist() == pytest.approx([0.7, -0.1])
    assert not list(router.parameters())
