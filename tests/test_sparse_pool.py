"""Products of the sparse form against those of every expert, and against the loop: outputs and every gradient.

tests/test_sparse_pool_in_models.py has whole models.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from moelora.ops import (
    ExpertPairs,
    ExpertPool,
    FusedGroup,
    Reader,
    chooses_sparse,
    compute_dtype,
    mixture,
    mixture_fused,
    mixture_sparse,
)

EXACT = {"rtol": 0, "atol": 1e-10}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums of some hundred terms in another order


def sparse_weights(tokens, num_experts, top_k, dtype=torch.float64, device="cpu"):
    """[*tokens, E], as a router with a capacity leaves them: of several tokens, one has no expert, one has one less."""
    probs = torch.rand(*tokens, num_experts, dtype=dtype).softmax(-1)
    values, chosen = probs.topk(top_k, dim=-1)
    weights = torch.zeros_like(probs).scatter(-1, chosen, values)
    if len(rows := weights.view(-1, num_experts)) > 2:
        rows[0] = 0
        rows[1, chosen.view(-1, top_k)[1, 0]] = 0
    return weights.to(device).requires_grad_()


def build(tokens=(2, 20), experts=(7,), top_k=2, rank=2, width=6, count=1, dtype=torch.float64, device="cpu", drop=0.0):
    """x, weights and readers of x with an adapter for each number of experts."""
    torch.manual_seed(0)
    leaf = {"dtype": dtype, "device": device, "requires_grad": True}
    x = torch.randn(*tokens, width, **leaf)
    readers = []
    for i in range(count):
        base = nn.Linear(width, width + i, bias=i != 1).to(device, dtype).requires_grad_(False)
        pools = [
            ExpertPool(
                lora_A=torch.randn(E * rank, width, **leaf),
                lora_B=torch.randn(width + i, E * rank, **leaf),
                num_experts=E,
                scaling=0.5 + n,
                dropout=nn.Dropout(drop),
            )
            for n, E in enumerate(experts)
        ]
        readers.append(Reader(base, pools))
    return x, sparse_weights(tokens, sum(experts), top_k, dtype, device), readers


def factors(readers):
    return [factor for reader in readers for pool in reader.pools for factor in (pool.lora_A, pool.lora_B)]


def sparse(x, weights, readers, top_k=2):
    return mixture_sparse(x, FusedGroup(readers, compute_dtype(x)), ExpertPairs.of(weights, top_k))


def reference(x, weights, readers):
    return [r.base_layer(x) + mixture(x, r.pools, weights, backend="reference") for r in readers]


def assert_same(actual, expected, leaves, weights=None, **tolerance):
    """Gradients of the weights are compared where these are not zero, beyond which no router's reach."""
    upstream = [torch.randn_like(y) for y in expected]
    for mine, its in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, its, **tolerance)
    wanted = leaves if weights is None else [weights, *leaves]
    ours, theirs = (torch.autograd.grad(ys, wanted, upstream, allow_unused=True) for ys in (actual, expected))
    if weights is not None:
        ours, theirs = ([grads[0] * (weights != 0), *grads[1:]] for grads in (ours, theirs))
        assert theirs[0].any()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, **tolerance)


def saved_by(function, *args):
    """What it returns, and the tensors that autograd keeps of it."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return function(*args), saved


CASES = {
    "one-linear": {},
    "three-linears": {"count": 3},
    "two-linears": {"count": 2},
    "one-token": {"tokens": (1,), "experts": (5,)},
    "top-1": {"top_k": 1},
    "all-experts-chosen": {"experts": (3,), "top_k": 3},
    "256-experts": {"experts": (256,), "tokens": (50,)},
    "adapters": {"experts": (3, 4, 1), "count": 2},
    "four-dimensions": {"tokens": (2, 3, 4)},
}


@pytest.mark.parametrize("form", ["reference", "every-expert"])
@pytest.mark.parametrize("case", CASES)
def test_equals(case, form):
    x, weights, readers = build(**CASES[case])
    dense = reference if form == "reference" else lambda x, w, readers: mixture_fused(x, readers, w)
    actual = sparse(x, weights, readers, CASES[case].get("top_k", 2))
    assert_same(actual, dense(x, weights, readers), [x, *factors(readers)], weights, **EXACT)


@pytest.mark.parametrize("case", ["one-linear", "three-linears", "adapters"])
def test_gradcheck(case):
    x, weights, readers = build(**CASES[case])
    values, chosen = weights.detach().topk(2, dim=-1)

    def run(x, values, *pairs):
        given = iter(zip(pairs[::2], pairs[1::2], strict=True))
        rebuilt = [
            replace(r, pools=[replace(p, lora_A=A, lora_B=B) for p, (A, B) in zip(r.pools, given, strict=False)])
            for r in readers
        ]
        return tuple(sparse(x, torch.zeros_like(weights).scatter(-1, chosen, values), rebuilt))

    values = values.clamp(min=0.1).requires_grad_()  # at zero, which experts are computed changes
    assert torch.autograd.gradcheck(run, (x, values, *factors(readers)), fast_mode=True)


@pytest.mark.parametrize("frozen", ["x", "weights", "A", "B"])
def test_inputs_that_need_no_gradient(frozen):
    x, weights, readers = build(count=2)
    chosen = {"x": [x], "weights": [weights], "A": factors(readers)[::2], "B": factors(readers)[1::2]}
    for tensor in chosen[frozen]:
        tensor.requires_grad_(False)
    leaves = [tensor for tensor in (x, *factors(readers)) if tensor.requires_grad]
    watched = weights if weights.requires_grad else None
    assert_same(sparse(x, weights, readers), reference(x, weights, readers), leaves, watched, **EXACT)


@pytest.mark.parametrize("used", [[0], [1, 2]])
def test_a_reader_whose_output_is_not_used(used):
    x, weights, readers = build(count=3)
    leaves = [x, *factors([readers[i] for i in used])]
    actual, expected = ([ys[i] for i in used] for ys in (sparse(x, weights, readers), reference(x, weights, readers)))
    assert_same(actual, expected, leaves, weights, **EXACT)
    sum(y.sum() for y in sparse(x, weights, readers)[used[0] : used[-1] + 1]).backward()
    for i, reader in enumerate(readers):
        assert all((factor.grad is not None) == (i in used) for factor in factors([reader]))


def test_base_layers_that_are_trained_or_hooked():
    x, weights, readers = build(count=3)
    readers[0].base_layer.weight.requires_grad_()
    readers[1].base_layer.register_forward_hook(lambda module, args, output: None)
    readers[2].base_layer.bias.requires_grad_()
    leaves = [x, *factors(readers), readers[0].base_layer.weight, readers[2].base_layer.bias]
    assert_same(sparse(x, weights, readers), reference(x, weights, readers), leaves, weights, **EXACT)


def test_a_base_layer_with_a_precision_of_its_own():
    x, weights, (reader,) = build(dtype=torch.float32)
    base = reader.base_layer.double()
    exact = type("Exact", (nn.Module,), {"forward": lambda self, x: base(x.double())})()
    (actual,), (expected,) = (form(x, weights, [Reader(exact, reader.pools)]) for form in (sparse, reference))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected.double(), **CLOSE)


def test_without_gradient_it_is_the_same():
    x, weights, readers = build(count=2)
    expected = sparse(x, weights, readers)
    with torch.no_grad():
        actual = sparse(x, weights, readers)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(actual, expected, strict=True))


def test_dropout_is_that_of_the_other_form():
    x, weights, readers = build(count=3, drop=0.4)
    torch.manual_seed(3)
    expected = mixture_fused(x, readers, weights)
    torch.manual_seed(3)
    actual, saved = saved_by(sparse, x, weights, readers)
    like_x = [t for t in saved if t.numel() == x.numel() and t.is_floating_point()]
    assert like_x and all(t.data_ptr() == x.data_ptr() for t in like_x)
    assert sum(t.dtype == torch.bool for t in saved) == 1
    assert_same(actual, expected, [x, *factors(readers)], weights, **EXACT)


def test_what_is_saved_does_not_grow_with_the_experts():
    for experts in ((8,), (256,), (3, 40)):
        x, weights, readers = build(tokens=(40,), experts=experts, count=3)
        pairs = ExpertPairs.of(weights, 2)
        _, saved = saved_by(mixture_sparse, x, FusedGroup(readers, x.dtype), pairs)
        known = {t.data_ptr() for t in (x, *factors(readers), *(r.base_layer.weight for r in readers))}
        shapes = {t.shape for t in saved if t.data_ptr() not in known}
        assert shapes == {(80,), (3, 80, 2)}  # the weights, and h of three linears


def test_an_expert_without_tokens_gets_no_gradient():
    x, _, readers = build(tokens=(40,))
    weights = torch.zeros(40, 7, dtype=torch.float64)
    weights[:, 1], weights[:20, 4] = 0.7, 0.3
    sparse(x, weights, readers)[0].sum().backward()
    (pool,) = readers[0].pools
    dA, dB = pool.lora_A.grad.view(7, 2, 6), pool.lora_B.grad.view(6, 7, 2)
    assert [e for e in range(7) if dA[e].any()] == [e for e in range(7) if dB[:, e].any()] == [1, 4]


def test_x_that_is_not_contiguous():
    _, weights, readers = build()
    leaf = torch.randn(6, 20, 2, dtype=torch.float64, requires_grad=True)
    x = leaf.permute(2, 1, 0)
    assert_same(sparse(x, weights, readers), reference(x, weights, readers), [leaf, *factors(readers)], **EXACT)


def test_float32_experts_on_a_bfloat16_base_follow_the_base():
    x, weights, (reader,) = build(dtype=torch.float32)
    (exact,) = reference(x, weights, [reader])
    reader.base_layer.to(torch.bfloat16)
    (actual,) = sparse(x.to(torch.bfloat16), weights, [reader])
    # bfloat16 keeps 8 bits: each of some ten rounded terms is off by up to 2^-9 of its size
    torch.testing.assert_close(actual.float(), exact, rtol=0.03, atol=0.03 * exact.abs().max().item())
    actual.float().sum().backward()
    assert reader.pools[0].lora_A.grad.dtype == torch.float32


def test_no_shape_depends_on_where_tokens_go():
    spread = sparse_weights((48,), 40, 2).detach()
    crowded = torch.zeros(48, 40)
    crowded[:, 3], crowded[:, 39] = 0.7, 0.3
    shapes = []
    for weights in (spread, crowded, torch.zeros(48, 40)):
        pairs = ExpertPairs.of(weights, 2)
        shapes.append([t.shape for t in (pairs.weights, pairs.experts, pairs.tokens, pairs.ends, pairs.tiles)])
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("crowd", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 40, 1), (63, 5, 3), (300, 40, 2)], ids=str)
def test_tiles_hold_every_pair_once(crowd, shape):
    tokens, num_experts, top_k = shape
    weights = sparse_weights((tokens,), num_experts, top_k).detach()
    weights[: int(tokens * crowd)] = 0
    weights[: int(tokens * crowd), :top_k] = 1 / top_k
    pairs = ExpertPairs.of(weights, top_k)
    assert pairs.tiles.shape[0] == top_k
    seen = []
    for slot in pairs.tiles.tolist():
        rows = [(expert, row) for expert, first, end in slot for row in range(first, end)]
        assert all(end - first <= pairs.tile_rows for _, first, end in slot)
        assert all(pairs.experts[row] == expert for expert, row in rows)
        assert sorted(pairs.tokens[row].item() for _, row in rows) == list(range(tokens))  # each token once in a slot
        seen += [row for _, row in rows]
    assert sorted(seen) == list(range(tokens * top_k))


KERNEL_CASES = {  # widths and ranks that fill no block, and more than one
    "small": {"tokens": (40,), "count": 2},
    "wide": {"tokens": (70,), "experts": (5,), "rank": 3, "width": 150, "top_k": 3},
    "rank-16": {"tokens": (33,), "experts": (3,), "rank": 16, "width": 140},
    "rank-128": {"tokens": (33,), "experts": (3,), "rank": 128, "width": 70, "count": 2},
    "many-experts": {"tokens": (40,), "experts": (100,), "rank": 8, "width": 32},
    "adapters": {"tokens": (40,), "experts": (3, 4), "count": 3},
    "crowded": {"tokens": (200,), "experts": (2,), "top_k": 1},
}


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernels_equal_the_loop(kernel_device, case):
    x, weights, readers = build(**KERNEL_CASES[case], dtype=torch.float32, device=kernel_device)
    actual = sparse(x, weights, readers, KERNEL_CASES[case].get("top_k", 2))
    assert_same(actual, reference(x, weights, readers), [x, *factors(readers)], weights, **CLOSE)


@pytest.mark.parametrize("change", ["layout", "precision", "five"])
def test_kernels_of_linears_that_no_one_launch_serves(kernel_device, change):
    case = {"tokens": (40,), "dtype": torch.float32, "device": kernel_device}
    x, weights, readers = build(**case, count=5 if change == "five" else 3)
    if change != "five":
        (pool,) = readers[1].pools
        A = pool.lora_A.detach()
        A = A.t().contiguous().t() if change == "layout" else A.to(torch.bfloat16)
        readers[1] = replace(readers[1], pools=[replace(pool, lora_A=A.requires_grad_())])
    exact = [replace(r, pools=[replace(p, lora_A=p.lora_A.float()) for p in r.pools]) for r in readers]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if change == "precision" else CLOSE
    expected = reference(x, weights, exact)
    assert_same(sparse(x, weights, readers), expected, [x, *factors(readers)], weights, **tolerance)


@pytest.mark.parametrize("strided", ["x", "upstream"])
def test_kernels_read_strided_rows(kernel_device, strided):
    x, weights, readers = build(tokens=(40,), dtype=torch.float32, device=kernel_device)
    wide = torch.randn(40, 12, device=kernel_device, requires_grad=True)
    x = wide[:, ::2] if strided == "x" else x
    leaf = wide if strided == "x" else x
    gradients = []
    for form in (sparse, reference):
        (y,) = form(x, weights, readers)
        loss = y.sum() if strided == "upstream" else y.square().sum()  # that of a sum is one number, expanded
        gradients.append(torch.autograd.grad(loss, [leaf, *factors(readers)]))
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, **CLOSE)


def test_kernels_in_bfloat16(kernel_device):
    x, weights, readers = build(tokens=(40,), rank=8, width=40, dtype=torch.float32, device=kernel_device)
    exact = reference(x, weights, readers)
    leaves = [x, *factors(readers)]
    wanted = torch.autograd.grad(exact[0].sum(), leaves)
    readers[0].base_layer.to(torch.bfloat16)
    (actual,) = sparse(x.to(torch.bfloat16), weights, readers)
    found = torch.autograd.grad(actual.float().sum(), leaves)
    for mine, its in zip((actual, *found), (exact[0], *wanted), strict=True):
        # 8 bits: each of some ten rounded terms is off by up to 2^-9 of its size
        torch.testing.assert_close(mine.float(), its, rtol=0.03, atol=0.03 * its.abs().max().item())


def test_kernels_leave_nothing_unwritten(kernel_device):
    """Memory that nobody writes is NaN (torch.utils.deterministic.fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        x, weights, readers = build(tokens=(40,), experts=(20,), dtype=torch.float32, device=kernel_device)
        sparse(x, weights, readers)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(factor.grad.isfinite().all() for factor in factors(readers))


def test_who_is_chosen():
    assert not any(chooses_sparse(8192, E, 2, 16) for E in (2, 8, 32))
    assert not chooses_sparse(8192, 32, 1, 64) and not chooses_sparse(1, 256, 2, 16)
    assert chooses_sparse(8192, 256, 2, 16) and not chooses_sparse(8192, 256, 64, 16)
    assert not chooses_sparse(1024, 512, 2, 16) and chooses_sparse(1024, 512, 2, 16, on_gpu=False)  # the host is slower
    assert not chooses_sparse(8192, 256, 2, 256)  # a rank that the kernels have no room for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_in_it_is_captured_in_a_cuda_graph():
    """With tokens that go elsewhere in the replay than they went in the capture."""
    x, _, readers = build(tokens=(64,), experts=(40,), rank=8, width=64, dtype=torch.float32, device="cuda")
    weights = sparse_weights((64,), 40, 2, torch.float32, "cuda").detach()
    leaves = [x, *factors(readers)]

    def step():
        (y,) = sparse(x, weights, readers)
        return y, torch.autograd.grad(y.square().sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    weights.copy_(sparse_weights((64,), 40, 2, torch.float32, "cuda").detach())
    graph.replay()
    (expected,) = reference(x, weights, readers)
    torch.testing.assert_close(y, expected, **CLOSE)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for mine, its in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
