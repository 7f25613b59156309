"""Every backend of the mixture against a loop over tokens and experts, in float64: outputs and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from moelora.ops import BACKENDS, ExpertPool, mixture

D_IN, D_OUT = 6, 5


@dataclass(frozen=True)
class Case:
    name: str
    experts: tuple[int, ...] = (4,)  # per pool
    ranks: tuple[int, ...] = (3,)
    lead: tuple[int, ...] = (2, 9)
    active: int | None = None  # experts with weight for each token; None: all
    silent: int | None = None  # an expert that no token chose
    strided: bool = False


CASES = [
    Case("top-2 of 4", active=2),
    Case("dense"),
    Case("one token", lead=(1, 1), active=2),
    Case("63 tokens", lead=(63,), active=2),
    Case("7 experts, top-3", experts=(7,), active=3),
    Case("k = E", experts=(2,), active=2),
    Case("rank 1", ranks=(1,), active=1),
    Case("one expert", experts=(1,)),
    Case("an expert without tokens", silent=1),
    Case("no weight at all", active=0),
    Case("three pools of different ranks", experts=(4, 1, 2), ranks=(3, 5, 1), active=2),
    Case("eight single experts", experts=(1,) * 8, ranks=(2,) * 8, active=2),
    Case("4-D input", lead=(2, 3, 2), active=2),
    Case("no token", lead=(0, 4)),
    Case("strided input", strided=True, active=2),
]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def build(case):
    total = sum(case.experts)
    x = leaf(*case.lead[:-1], D_IN, case.lead[-1]) if case.strided else leaf(*case.lead, D_IN)
    weights = torch.rand(*case.lead, total, dtype=torch.float64)
    if case.active is not None and weights.numel():
        chosen = weights.topk(case.active, dim=-1).indices
        weights = weights * torch.zeros_like(weights).scatter(-1, chosen, 1.0)
    if case.silent is not None:
        weights[..., case.silent] = 0
    factors = [
        (leaf(num * rank, D_IN), leaf(D_OUT, num * rank)) for num, rank in zip(case.experts, case.ranks, strict=True)
    ]
    pools = [
        ExpertPool(A, B, num, 0.5 + index, nn.Identity())
        for index, ((A, B), num) in enumerate(zip(factors, case.experts, strict=True))
    ]
    leaves = {"x": x, "weights": weights.requires_grad_()}
    for index, (A, B) in enumerate(factors):
        leaves |= {f"A of pool {index}": A, f"B of pool {index}": B}
    return leaves, pools


def by_definition(x, pools, weights):
    """sum_e w_e * scaling_e * B_e A_e x, a token and an expert at a time."""
    flat, flat_weights = x.reshape(-1, D_IN), weights.reshape(-1, weights.shape[-1])
    rows = []
    for token, row in zip(flat, flat_weights, strict=True):
        total, expert = torch.zeros(D_OUT, dtype=x.dtype), 0
        for pool in pools:
            rank = len(pool.lora_A) // pool.num_experts
            for i in range(pool.num_experts):
                A, B = pool.lora_A[i * rank : (i + 1) * rank], pool.lora_B[:, i * rank : (i + 1) * rank]
                total = total + row[expert] * pool.scaling * (B @ (A @ token))
                expert += 1
        rows.append(total)
    stacked = torch.stack(rows) if rows else flat.new_zeros(0, D_OUT) + 0 * flat.sum()
    return stacked.view(*x.shape[:-1], D_OUT)


def run(function, case):
    torch.manual_seed(0)
    leaves, pools = build(case)
    x = leaves["x"].transpose(-1, -2) if case.strided else leaves["x"]
    assert x.is_contiguous() is not case.strided
    output = function(x, pools, leaves["weights"])
    probe = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    (output * probe).sum().backward()
    return output, {name: tensor.grad for name, tensor in leaves.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backend_equals_definition(case, backend):
    expected, expected_grads = run(by_definition, case)
    output, grads = run(lambda *args: mixture(*args, backend=backend), case)
    assert output.shape == (*case.lead, D_OUT)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for name, grad in expected_grads.items():
        grad = torch.zeros_like(grads[name]) if grad is None else grad
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, A, B, weights = leaf(3, 4), leaf(6, 4), leaf(5, 6), leaf(3, 3)

    def function(x, A, B, weights):
        return mixture(x, [ExpertPool(A, B, 3, 1.5, nn.Identity())], weights, backend=backend)

    assert torch.autograd.gradcheck(function, (x, A, B, weights), atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_silent_expert_gets_no_gradient_but_its_weight_does(backend):
    _, grads = run(lambda *args: mixture(*args, backend=backend), Case("silent", silent=1))
    assert grads["A of pool 0"][3:6].abs().max() == 0 and grads["B of pool 0"][:, 3:6].abs().max() == 0
    assert grads["weights"][..., 1].abs().max() > 0, "d w_e = <dy, B_e A_e x>, also where w_e is 0"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_on_the_input_of_its_own_pool(backend):
    def ones(x):
        return torch.ones_like(x)

    A, B = torch.eye(4), torch.eye(4)
    pools = [ExpertPool(A, B, 1, 1.0, ones), ExpertPool(A, B, 1, 1.0, nn.Identity())]
    x = torch.full((1, 4), 3.0)
    assert mixture(x, pools, torch.tensor([[10.0, 1.0]]), backend=backend).tolist() == [[13.0] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, dtype):
    """Routing weights arrive in float32; the result has the dtype of the factors and their accuracy."""
    torch.manual_seed(0)
    x, A, B, weights = torch.randn(9, 16), torch.randn(8, 16) / 4, torch.randn(12, 8) / 3, torch.rand(9, 4)

    def pool(to):
        return [ExpertPool(A.to(to), B.to(to), 4, 2.0, nn.Identity())]

    exact = mixture(x.double(), pool(torch.float64), weights.double())
    actual = mixture(x.to(dtype), pool(dtype), weights, backend=backend)
    assert actual.dtype == dtype
    error = (actual.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"`backend` \('cuda'\).*concat, reference"):
        mixture(torch.ones(1, 2), [], torch.ones(1, 1), backend="cuda")
