"""Triton's weighting of rank blocks, and the product for few tokens, against the torch forms."""

import pytest
import torch
from helpers import every_pair

from moelora.ops import ExpertPool, Reader, mixture_fused
from moelora.ops.weighted import weighted, weighted_backward

SHAPES = [(1, 1, 2, 1), (5, 3, 8, 16), (63, 2, 7, 3), (64, 1, 1, 20), (130, 1, 17, 5)]  # T, G, E, r
shape_id = "{0[0]} tokens, {0[1]} linears, {0[2]} experts, rank {0[3]}".format
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(dtype):
    """One rounding to dtype may fall either way; float32 sums of products in another order differ by some 1e-6."""
    step = max(torch.finfo(dtype).eps, 2e-6)
    return {"rtol": step, "atol": step}


def tensors(shape, dtype, device):
    T, G, E, r = shape
    g, h = (torch.randn(T, G * E * r).to(device, dtype) for _ in range(2))
    weights = torch.rand(T, E + 1).to(device)[:, 1:]  # strided
    return g, h, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_weighting(kernel_device, shape, dtype, monkeypatch):
    g, h, weights = tensors(shape, dtype, kernel_device)
    actual = (weighted(h, weights, shape[3]), *weighted_backward(g, h, weights, shape[3], 0.75))
    monkeypatch.setattr("moelora.ops.weighted.kernels_for", lambda _: False)
    exact = [t.double() for t in (g, h, weights)]
    expected = (weighted(*exact[1:], shape[3]), *weighted_backward(*exact, shape[3], 0.75))
    for mine, its in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, its.to(dtype), **close(dtype))
    # d loss / d weights is a float32 sum over G * r products of about 1.
    torch.testing.assert_close(actual[3], expected[3].float(), rtol=1e-5, atol=1e-5)


@every_pair(shape=SHAPES, dtype=DTYPES, width=[1, 33])
def test_expanding_for_few_tokens(kernel_device, shape, dtype, width):
    from moelora.ops.triton.expand import add_expanded

    T, _, E, r = shape
    _, h, weights = tensors(shape, dtype, kernel_device)
    B = torch.randn(width, E * r, device=kernel_device).to(dtype)
    y = torch.randn(T, width, device=kernel_device).to(dtype)
    share = h[:, -E * r :]  # the last linear's columns
    shared = weights[:1].expand(T, E)  # one row for all tokens
    for w in (weights, shared):
        products = share.double() * (w.double() * 0.75).repeat_interleave(r, dim=1)
        expected = y.double() + products.to(dtype).double() @ B.double().t()
        actual = y.clone()
        add_expanded(actual, share, w, B, r, 0.75)
        largest = (products.abs() @ B.double().abs().t()).max().item()  # each product may be rounded either way
        step = close(dtype)["rtol"]
        torch.testing.assert_close(actual.double(), expected, rtol=step, atol=step * largest)


@pytest.mark.parametrize("base", ["plain", "biased", "outside"])
def test_few_tokens_equal_many(kernel_device, base, monkeypatch):
    """The output does not depend on which form expands, whatever the frozen part is."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(20, 33, bias=base == "biased").to(kernel_device).requires_grad_(False)
    if base == "outside":
        linear = torch.nn.Sequential(linear)
    pools = [
        ExpertPool(*(torch.randn(*s).to(kernel_device) for s in ((12, 20), (33, 12))), 4, scaling, torch.nn.Identity())
        for scaling in (0.5, 2.0)
    ]
    x, weights = torch.randn(2, 3, 20).to(kernel_device), torch.rand(2, 3, 8).to(kernel_device)
    results = []
    for limit, is_free in ((64, True), (64, False), (0, False)):
        monkeypatch.setattr("moelora.ops.fused.FEW_TOKENS", limit)
        monkeypatch.setattr("moelora.ops.fused.launches_are_free", lambda _, is_free=is_free: is_free)
        with torch.no_grad():
            (y,) = mixture_fused(x, [Reader(linear, pools)], weights)
        results.append(y)
    for few in results[:2]:
        torch.testing.assert_close(few, results[2], rtol=1e-5, atol=1e-5 * results[2].abs().max().item())
