"""The Triton router against the readable one: weights, every sum and both gradients."""

import pytest
import torch
from helpers import ARCHITECTURES, every_pair, mixture_of, train_step

from moelora.ops.norm_linear import norm_linear
from moelora.routing.decision import route
from moelora.routing.sums import RoutingSums

SHAPES = [  # tokens, experts, width, top-k
    (1, 8, 20, 2),
    (63, 3, 96, 1),
    (130, 8, 256, 2),
    (63, 17, 20, 5),
    (130, 64, 96, 4),
    (9, 1, 20, 1),
    (9, 7, 16, 7),
    (70, 200, 40, 2),
    (40, 512, 20, 2),
]
LOSSES = ["aux_loss", "switch", "z_loss"]
MASKS = {"all": None, "some": lambda T: torch.arange(T) % 3 > 0, "none": lambda T: torch.zeros(T, dtype=torch.bool)}
MATURITY = {"learned": None, "new": torch.zeros, "mature": torch.ones, "mixed": lambda E: torch.arange(E) / max(E, 2)}

# Both sides are float32 with sums in another order: some 1e-7 of the largest value a token, 1e-5 of sums over tokens.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What a kernel forgets to write is NaN (torch.utils.deterministic.fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(shape, dtype, device, weight_dtype=torch.float32):
    tokens, experts, width, _ = shape
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(experts, width, generator=generator).div(width**0.5).to(device, weight_dtype).requires_grad_()
    return hidden, weight


def fused(hidden, weight, scale=1.0, **options):
    from moelora.ops.triton.router import route_fused

    weights, packed, probs, squared_lse = route_fused(hidden, weight, scale=scale, **options)
    sums = RoutingSums.of_packed(packed)
    assert torch.equal(sums.probs, probs) and torch.equal(sums.squared_lse, squared_lse)
    return weights, RoutingSums(packed, probs, squared_lse)


def reference(hidden, weight, scale=1.0, **options):
    logits = norm_linear(hidden, weight)
    routing = route(logits, **options)
    return routing.weights * scale, RoutingSums.of(routing, logits, options.get("mask_T"))


def assert_same(hidden, weight, loss_type, **options):
    """All results, and the gradients of a loss that sees the weights and the balancing loss."""
    sides = [form(hidden, weight, **options) for form in (fused, reference)]
    (actual, actual_sums), (expected, expected_sums) = sides
    torch.testing.assert_close(actual, expected, **CLOSE)
    for name, value in vars(expected_sums).items():
        torch.testing.assert_close(getattr(actual_sums, name), value.float(), rtol=1e-5, atol=1e-4, msg=name)
    upstream = torch.randn_like(expected)
    gradients = []
    for weights, sums in sides:
        loss = (weights * upstream).sum() + 3 * sums.balancing_loss(loss_type)
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    (dh, dw), (expected_dh, expected_dw) = gradients
    assert dh.dtype == hidden.dtype and dw.dtype == weight.dtype
    # Each is rounded to its own dtype, which may fall either way: one step. Float32: as above.
    for mine, its in ((dh, expected_dh), (dw, expected_dw)):
        step = max(torch.finfo(mine.dtype).eps, 1e-5)
        largest = max(its.abs().max().item(), 1.0)
        torch.testing.assert_close(mine.float(), its.float(), rtol=step, atol=step * largest)


@every_pair(shape=SHAPES, loss_type=LOSSES, dtype=[torch.float32, torch.bfloat16], single=[64, 0])
def test_shapes(kernel_device, shape, loss_type, dtype, single, monkeypatch):
    """Up to `single` tokens have a program each, more are taken in blocks."""
    monkeypatch.setattr("moelora.ops.triton.router.MAX_SINGLE_TOKENS", single)
    hidden, weight = case(shape, dtype, kernel_device)
    assert_same(hidden, weight, loss_type, top_k=shape[3])


@every_pair(loss_type=LOSSES, mask=MASKS, maturity=MATURITY)
def test_masks_and_maturity(kernel_device, loss_type, mask, maturity):
    hidden, weight = case((63, 7, 20, 3), torch.float32, kernel_device)
    mask_T = MASKS[mask] and MASKS[mask](63).to(kernel_device)
    maturity_E = MATURITY[maturity] and MATURITY[maturity](7).to(kernel_device)
    options = {"temperature": 0.7, "scale": 1.5, "mask_T": mask_T, "maturity_E": maturity_E}
    assert_same(hidden, weight, loss_type, top_k=3, **options)


@every_pair(maturity=["learned", "mixed"], mask=MASKS, factor=[0.01, 0.5, 1.0, 1.25, 10.0])
def test_capacity(kernel_device, maturity, mask, factor):
    hidden, weight = case((70, 5, 20, 2), torch.float32, kernel_device)
    mask_T = MASKS[mask] and MASKS[mask](70).to(kernel_device)
    maturity_E = MATURITY[maturity] and MATURITY[maturity](5).to(kernel_device)
    options = {"scale": 1.5, "mask_T": mask_T, "maturity_E": maturity_E, "capacity_factor": factor}
    assert_same(hidden, weight, "aux_loss", top_k=2, **options)


@pytest.mark.parametrize("shape", [(1, 8, 20, 2), (63, 3, 96, 1), (63, 17, 20, 5), (9, 64, 20, 4), (9, 7, 16, 7)])
def test_capacity_on_shapes(kernel_device, shape):
    hidden, weight = case(shape, torch.bfloat16, kernel_device)
    assert_same(hidden, weight, "aux_loss", top_k=shape[3], capacity_factor=1.0)


def test_capacity_keeps_the_first_of_equal_tokens(kernel_device):
    """As the stable sort of `within_capacity` does."""
    hidden, weight = case((9, 3, 20, 1), torch.float32, kernel_device)
    same = hidden.detach()[:1].repeat(9, 1)
    (weights, sums), (expected, _) = (form(same, weight, top_k=1, capacity_factor=1.0) for form in (fused, reference))
    torch.testing.assert_close(weights, expected, **CLOSE)
    assert weights.sum(-1).tolist() == pytest.approx([1, 1, 1, 0, 0, 0, 0, 0, 0], abs=1e-6) and sums.dropped == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_routers(kernel_device, dtype, weight_dtype):
    hidden, weight = case((63, 8, 96, 2), dtype, kernel_device, weight_dtype)
    assert_same(hidden, weight, "aux_loss", top_k=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_product_where_partial_sums_would_be_large(kernel_device, dtype, monkeypatch):
    monkeypatch.setattr("moelora.ops.triton.router.MAX_PARTIAL_BYTES", 0)
    hidden, weight = case((63, 8, 96, 2), dtype, kernel_device)
    assert_same(hidden, weight, "aux_loss", top_k=2)


def test_strided_hidden_states(kernel_device):
    hidden, weight = case((63, 3, 40, 2), torch.float32, kernel_device)
    for view in (hidden[:, :20], hidden[:, ::2], hidden[::2, 20:]):
        assert_same(view, weight[:, :20], "aux_loss", top_k=2)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted(kernel_device, wanted):
    hidden, weight = case((63, 3, 20, 2), torch.float32, kernel_device)
    inputs = {"hidden": hidden.detach(), "weight": weight.detach()}
    inputs[wanted].requires_grad_()
    (actual, _), (expected, _) = fused(**inputs, top_k=2), reference(**inputs, top_k=2)
    upstream = torch.randn_like(expected)
    mine, its = (torch.autograd.grad(out, inputs[wanted], upstream)[0] for out in (actual, expected))
    torch.testing.assert_close(mine, its, **CLOSE)


@pytest.mark.parametrize("part", ["probs", "squared_lse"])
def test_gradient_of_one_sum_alone(kernel_device, part):
    hidden, weight = case((63, 3, 20, 2), torch.float32, kernel_device)
    upstream = torch.randn(3, device=kernel_device) if part == "probs" else torch.ones((), device=kernel_device)
    gradients = []
    for form in (fused, reference):
        _, sums = form(hidden, weight, top_k=2)
        gradients.append(torch.autograd.grad(getattr(sums, part), (hidden, weight), upstream))
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-4)


def test_ties_and_zero_hidden_states(kernel_device):
    hidden = torch.zeros(5, 20, device=kernel_device, requires_grad=True)
    weight = torch.ones(7, 20, device=kernel_device, requires_grad=True)
    weights, sums = fused(hidden, weight, top_k=3)
    assert (weights > 0).sum(-1).eq(3).all() and sums.assignments.sum() == 15 and sums.top1.sum() == 5
    weights.square().sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_padding_that_is_nan_counts_nothing(kernel_device):
    hidden, weight = case((9, 3, 20, 2), torch.float32, kernel_device)
    mask = torch.arange(9, device=kernel_device) > 2
    spoilt = torch.where(mask[:, None], hidden, float("nan"))
    with torch.no_grad():
        (_, sums), (_, clean) = (fused(h, weight, top_k=2, mask_T=mask) for h in (spoilt, hidden))
    assert torch.equal(sums.packed, clean.packed)


def test_nothing_is_kept_without_gradient(kernel_device, monkeypatch):
    from moelora.ops.triton import router

    kept, original = [], router._forward
    monkeypatch.setattr(router, "_forward", lambda *args, keep: kept.append(keep) or original(*args, keep=keep))
    hidden, weight = case((9, 3, 20, 2), torch.float32, kernel_device)
    with torch.no_grad():
        weights, _ = fused(hidden, weight, top_k=2)
    assert kept == [False] and weights.grad_fn is None
    fused(hidden, weight, top_k=2)
    assert kept == [False, True]


def test_no_tokens(kernel_device):
    hidden, weight = case((0, 3, 20, 2), torch.float32, kernel_device)
    weights, sums = fused(hidden, weight, top_k=2)
    assert weights.shape == (0, 3) and sums.packed.eq(0).all()
    weights.sum().backward()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_whole_model(kernel_device, loss_type, monkeypatch):
    """The same step, statistics and growth with the kernels as without."""
    from moelora.ops.triton import router

    calls, original = [], router.route_fused
    monkeypatch.setattr(router, "route_fused", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    options = {"router_type": "learned_with_maturity", "load_balance_loss_type": loss_type, "routing_scale": 1.5}
    inputs = {name: value.to(kernel_device) for name, value in ARCHITECTURES["llama"].batch(3, 7).items()}
    results = []
    for with_kernels in (True, False):
        monkeypatch.setattr("moelora.tuner.router.kernels_for", lambda _, answer=with_kernels: answer)
        model = mixture_of("llama", **options).to(kernel_device)
        loss, gradients = train_step(model, inputs)
        results.append((loss, gradients, model.base_model.routing_stats()))
    assert calls
    (loss, gradients, stats), (expected_loss, expected_gradients, expected_stats) = results
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    for name, expected in expected_stats.items():
        for key, value in vars(expected).items():
            assert getattr(stats[name], key) == pytest.approx(value, rel=1e-4, abs=1e-5), key
