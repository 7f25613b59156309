"""Grouped products of native experts against the loop over them: outputs and all gradients, on awkward shapes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moelora.ops import native
from moelora.ops.native import NativePairs, native_experts, native_experts_reference


def experts_of(num_experts, hidden, inner, dtype, device="cpu", *, gate=True, transposed=False, bias=False, norm=False):
    """Random experts as transformers lays them out."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return (torch.randn(shape, generator=generator) * 0.5).to(device, dtype)

    first = "gate_up_proj" if gate else "up_proj"
    shapes = {first: ((2 if gate else 1) * inner, hidden), "down_proj": (hidden, inner)}
    made = {name: drawn(num_experts, *(reversed(shape) if transposed else shape)) for name, shape in shapes.items()}
    made |= {f"{name}_bias": drawn(num_experts, shape[0]) for name, shape in shapes.items() if bias}
    return SimpleNamespace(
        num_experts=num_experts, has_gate=gate, is_transposed=transposed, has_bias=bias, has_post_expert_norm=norm,
        post_expert_norm=lambda y: y * 3 / (1 + y.square().mean(-1, keepdim=True)), act_fn=nn.SiLU(),
        _apply_gate=lambda y: nn.functional.silu(y[..., ::2]) * y[..., 1::2], **made,
    )  # fmt: skip


def pairs_of(experts, ranks, sharing=()):
    """Two adapters for the first parameter, one for the other; those of these numbers share the factor on the hidden
    side."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name, adapters in ((native.first_parameter(experts), ranks), ("down_proj", ranks[:1])):
        weight = getattr(experts, name)
        out, width = weight.shape[1:] if not experts.is_transposed else weight.shape[1:][::-1]
        pairs[name] = []
        for number, rank in enumerate(adapters):
            shares = [number in sharing and (name == "down_proj") == is_B for is_B in (False, True)]
            ranks_A, ranks_B = (rank if is_shared else experts.num_experts * rank for is_shared in shares)
            A = torch.randn(ranks_A, width, generator=generator).to(weight) * 0.3
            B = torch.randn(out, ranks_B, generator=generator).to(weight) * 0.3
            pairs[name].append(NativePairs(A.requires_grad_(), B.requires_grad_(), 0.5 + number, *shares))
    return pairs


def tokens_of(tokens, hidden, num_experts, top_k, dtype, device="cpu"):
    """Hidden states, the native experts of each token (the last ones get none), their weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    scores = torch.randn(tokens, num_experts, generator=generator)
    scores[:, max(top_k, num_experts - 2) :] = -torch.inf
    weights, chosen = scores.softmax(-1).topk(top_k)
    return x, chosen.to(device), weights.to(device, dtype).detach().requires_grad_()


def outcome(form, experts, pairs, tokens, upstream):
    x, chosen, weights = tokens
    leaves = [x, weights, *(factor for own in pairs.values() for pair in own for factor in (pair.lora_A, pair.lora_B))]
    y = form(experts, pairs, x, chosen, weights)
    return y, torch.autograd.grad(y, leaves, upstream)


KINDS = {
    "concatenated": {},
    "transposed with bias": {"transposed": True, "bias": True},
    "without gate": {"gate": False},
    "normalised": {"norm": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "hidden", "inner", "ranks"),
    [(63, 7, 3, 32, 16, [3, 8]), (1, 4, 4, 16, 8, [8]), (5, 3, 1, 7, 5, [2, 1])],
    ids=["63 tokens", "one token", "odd widths"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharing", [(), (0,), (0, 1)], ids=["each its own", "one adapter shares", "both share"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_the_loop(kind, tokens, num_experts, top_k, hidden, inner, ranks, dtype, sharing, device):
    """Odd widths and float64 take the padded form, the others torch's grouped products."""
    experts = experts_of(num_experts, hidden, inner, dtype, device, **KINDS[kind])
    pairs = pairs_of(experts, ranks, sharing)
    given = tokens_of(tokens, hidden, num_experts, top_k, dtype, device)
    upstream = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3)).to(given[0])
    y, grads = outcome(native_experts, experts, pairs, given, upstream)
    expected, expected_grads = outcome(native_experts_reference, experts, pairs, given, upstream)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    scale = expected.abs().max()
    assert scale > 0.1
    torch.testing.assert_close(y / scale, expected / scale, rtol=tolerance, atol=tolerance)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        scale = wanted.abs().max()
        assert scale > 0
        torch.testing.assert_close(grad / scale, wanted / scale, rtol=tolerance, atol=tolerance)
        for dim in (0, 1):  # of an expert without a token nothing is left as it was allocated
            of_none = wanted.eq(0).all(dim, keepdim=True).expand_as(wanted)
            assert grad[of_none].eq(0).all()


@pytest.mark.parametrize(("hidden", "dtype", "grouped"), [(32, torch.float32, True), (7, torch.float32, False)])
def test_which_form_serves(monkeypatch, hidden, dtype, grouped):
    calls = []
    monkeypatch.setattr(native, "_padded", lambda x, weight, rows: calls.append(1) or x.new_zeros(len(x), 16))
    experts = experts_of(4, hidden, 8, dtype)
    x, chosen, _ = tokens_of(9, hidden, 4, 2, dtype)
    rows = native._Rows.of(chosen, 4)
    native._product(experts, "gate_up_proj", (), native._Spread.apply(x, rows), rows)
    assert bool(calls) is not grouped


def test_an_expert_beyond_the_last_is_nobody():
    experts = experts_of(4, 32, 16, torch.float32)
    pairs = pairs_of(experts, [4])
    x, chosen, weights = tokens_of(11, 32, 4, 2, torch.float32)
    chosen[3] = 4
    chosen[5, 1] = 4
    y = native_experts(experts, pairs, x, chosen, weights)
    torch.testing.assert_close(y, native_experts_reference(experts, pairs, x, chosen, weights), rtol=1e-4, atol=1e-5)
    assert y[3].eq(0).all() and not y[5].eq(0).all()
