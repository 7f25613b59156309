"""The router's fused normalisation and product against the readable one."""

import pytest
import torch
import torch.nn.functional as F

from moelora.ops.norm_linear import _terms, norm_linear
from moelora.routing import rms_norm


def reference(hidden, weight):
    rms = (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return F.linear(hidden / rms, weight)


@pytest.mark.parametrize("shape", [(1, 4), (63, 7), (2, 5, 8), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_outputs_and_gradients(shape, rows):
    torch.manual_seed(0)
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, shape[-1], dtype=torch.float64, requires_grad=True)
    actual, expected = norm_linear(hidden, weight), reference(hidden, weight)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(actual, (hidden, weight), upstream)
    theirs = torch.autograd.grad(expected, (hidden, weight), upstream)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def test_gradcheck_and_parts_without_gradient():
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm_linear, (hidden, weight))
    assert torch.autograd.gradcheck(norm_linear, (hidden.detach(), weight))
    assert torch.autograd.gradcheck(norm_linear, (hidden, weight.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_float32_maths_whatever_the_hidden_states(dtype):
    hidden, weight = torch.randn(9, 64).to(dtype), torch.randn(5, 64)
    actual = norm_linear(hidden, weight)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, F.linear(rms_norm(hidden), weight), rtol=1e-5, atol=1e-5)


def test_where_no_gradient_is_wanted_it_is_the_same_to_the_last_bit():
    hidden, weight = torch.randn(2, 5, 64).bfloat16(), torch.randn(3, 64, requires_grad=True)
    expected = norm_linear(hidden, weight)
    with torch.no_grad():
        actual = norm_linear(hidden, weight)
    assert torch.equal(actual, expected) and expected.requires_grad and not actual.requires_grad


def test_zero_hidden_states_score_zero():
    hidden = torch.zeros(2, 4, requires_grad=True)
    norm_linear(hidden, torch.ones(3, 4)).sum().backward()
    assert hidden.grad.isfinite().all()


def test_three_bfloat16_terms_hold_a_float32():
    exact = torch.randn(1000)
    assert (sum(term.float() for term in _terms(exact, 3)) - exact).abs().max() <= exact.abs().max() * 2**-23


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensor_cores_lose_nothing():
    torch.manual_seed(0)
    hidden = torch.randn(513, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, 4096, device="cuda", requires_grad=True)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    actual, expected = norm_linear(hidden, weight), reference(exact_hidden, exact_weight)
    upstream = torch.randn(513, 8, device="cuda")
    actual.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-4)  # a float32 sum of 4096 terms
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)
    # a difference of two terms, each rounded to bfloat16's 8 bits, and rounded once more
    largest = exact_hidden.grad.abs().max().item()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=2**-7, atol=2**-8 * largest)
