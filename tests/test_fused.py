"""The hand-written autograd functions against the loop over experts: outputs and every gradient."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from moelora.ops import ExpertPool, Reader, can_fuse, mixture, mixture_linear
from moelora.ops import mixture_fused as mixture_of_readers

SHAPES = {  # tokens, D, O, E, r, adapters
    "one-token": ((1,), 3, 5, 2, 1, 1),
    "63-tokens-7-experts": ((63,), 6, 4, 7, 2, 1),
    "batch-of-sequences": ((2, 5), 6, 8, 3, 2, 1),
    "four-dimensions": ((2, 3, 2), 4, 3, 2, 3, 1),
    "three-adapters": ((2, 5), 6, 8, 2, 2, 3),
}


def build(shape, dtype=torch.float64):
    tokens, d, o, num_experts, rank, adapters = SHAPES[shape]
    torch.manual_seed(0)
    base = nn.Linear(d, o).to(dtype).requires_grad_(False)
    leaf = {"dtype": dtype, "requires_grad": True}
    pools = [
        ExpertPool(
            lora_A=torch.randn(num_experts * rank, d, **leaf),
            lora_B=torch.randn(o, num_experts * rank, **leaf),
            num_experts=num_experts,
            scaling=0.5 + i,
            dropout=nn.Identity(),
        )
        for i in range(adapters)
    ]
    x = torch.randn(*tokens, d, **leaf)
    weights = torch.rand(*tokens, num_experts * adapters, **leaf)
    return base, pools, x, weights


def factors(pools):
    return [factor for pool in pools for factor in (pool.lora_A, pool.lora_B)]


def mixture_fused(base, x, pools, weights):
    return mixture_of_readers(x, [Reader(base, pools)], weights)[0]


def reference(base, pools, x, weights):
    return base(x) + mixture(x, pools, weights, backend="reference")


def assert_equal_gradients(actual, expected, leaves):
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    ours = torch.autograd.grad(actual, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)


@pytest.mark.parametrize("outside", [False, True], ids=["base-inside", "base-outside"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, outside):
    base, pools, x, weights = build(shape)
    base.bias.requires_grad_(outside)  # a bias in training keeps the frozen product out of the function
    leaves = [x, weights, *factors(pools), *([base.bias] if outside else [])]
    assert_equal_gradients(mixture_fused(base, x, pools, weights), reference(base, pools, x, weights), leaves)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_where_no_gradient_is_wanted_it_is_the_same_to_the_last_bit(shape, drop_rate):
    base, pools, x, weights = build(shape)
    pools = [replace(pool, dropout=nn.Dropout(drop_rate)) for pool in pools]
    torch.manual_seed(1)
    expected = mixture_fused(base, x, pools, weights)
    torch.manual_seed(1)
    with torch.no_grad():
        actual = mixture_fused(base, x, pools, weights)
    assert torch.equal(actual, expected) and expected.requires_grad and not actual.requires_grad


@pytest.mark.parametrize("outside", [False, True], ids=["base-inside", "base-outside"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape, outside):
    base, pools, x, weights = build(shape)
    base.bias.requires_grad_(outside)

    def run(x, weights, *pairs):
        given = zip(pairs[::2], pairs[1::2], pools, strict=True)
        rebuilt = [ExpertPool(a, b, pool.num_experts, pool.scaling, pool.dropout) for a, b, pool in given]
        return mixture_fused(base, x, rebuilt, weights)

    assert torch.autograd.gradcheck(run, (x, weights, *factors(pools)), fast_mode=x.numel() > 40)


@pytest.mark.parametrize("frozen", ["x", "weights", "factors", "A", "B"])
def test_inputs_that_need_no_gradient(frozen):
    base, pools, x, weights = build("batch-of-sequences")
    chosen = {"x": [x], "weights": [weights], "factors": factors(pools)}
    chosen |= {"A": [pools[0].lora_A], "B": [pools[0].lora_B]}
    for tensor in chosen[frozen]:
        tensor.requires_grad_(False)
    leaves = [t for t in (x, weights, *factors(pools)) if t.requires_grad]
    assert_equal_gradients(mixture_fused(base, x, pools, weights), reference(base, pools, x, weights), leaves)


def test_x_that_is_not_contiguous():
    base, pools, _, weights = build("batch-of-sequences")
    leaf = torch.randn(6, 5, 2, dtype=torch.float64, requires_grad=True)
    x = leaf.permute(2, 1, 0)
    assert_equal_gradients(
        mixture_fused(base, x, pools, weights), reference(base, pools, x, weights), [leaf, weights, *factors(pools)]
    )


def test_x_and_weights_used_twice():
    base, pools, x, weights = build("batch-of-sequences")
    leaves = [x, weights, *factors(pools)]
    actual = mixture_fused(base, x, pools, weights) * mixture_fused(base, x, pools, weights * 2) + x.sum()
    expected = reference(base, pools, x, weights) * reference(base, pools, x, weights * 2) + x.sum()
    assert_equal_gradients(actual, expected, leaves)


def test_an_expert_without_weight_gets_no_gradient():
    base, pools, x, _ = build("63-tokens-7-experts")
    weights = torch.rand(63, 7, dtype=torch.float64)
    weights[:, 3] = 0
    mixture_fused(base, x, pools, weights).sum().backward()
    assert pools[0].lora_A.grad[6:8].abs().max() == 0
    assert pools[0].lora_B.grad[:, 6:8].abs().max() == 0
    assert pools[0].lora_A.grad[:6].abs().min() > 0


def test_float32_experts_on_a_bfloat16_base_follow_the_base():
    base, pools, x, weights = build("63-tokens-7-experts", torch.float32)
    exact = reference(base, pools, x, weights)
    actual = mixture_fused(base.to(torch.bfloat16), x.to(torch.bfloat16), pools, weights)
    assert actual.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: each of some ten rounded terms is off by up to 2^-9 of its size
    torch.testing.assert_close(actual.float(), exact, rtol=0.03, atol=0.03 * exact.abs().max().item())
    actual.float().sum().backward()
    assert pools[0].lora_A.grad.dtype == torch.float32


def test_autocast_equals_the_plain_form_under_autocast():
    base, pools, x, weights = build("batch-of-sequences", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mixture_linear(x, Reader(base, pools), weights)
        expected = base(x) + mixture(x, pools, weights)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.03, atol=0.05)
    actual.float().sum().backward()
    assert x.grad is not None
    assert pools[0].lora_B.grad is not None


def test_a_hook_on_the_base_layer_still_runs():
    base, pools, x, weights = build("batch-of-sequences")
    seen = []
    base.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_equal_gradients(mixture_fused(base, x, pools, weights), reference(base, pools, x, weights), [x, weights])
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["sequential", "frozen-float64-on-float32"])
def test_any_base_layer_is_served(kind):
    base, pools, x, weights = build("batch-of-sequences")
    if kind == "sequential":
        other = nn.Sequential(base, nn.Tanh())
    else:  # computes in its own precision, as some quantised layers do; the result keeps it
        other = type("Exact", (nn.Module,), {"forward": lambda self, x: base(x.double())})()
        x, weights = (t.detach().float().requires_grad_() for t in (x, weights))
        pools = [replace(p, lora_A=p.lora_A.detach().float(), lora_B=p.lora_B.detach().float()) for p in pools]
    actual, expected = mixture_fused(other, x, pools, weights), reference(other, pools, x, weights)
    assert actual.dtype == expected.dtype == torch.float64
    tolerance = 1e-10 if kind == "sequential" else 1e-4  # float32 has 24 bits
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, (x, weights), upstream) for y in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_what_cannot_be_fused_takes_the_plain_form():
    base, pools, x, weights = build("batch-of-sequences")
    assert can_fuse(pools)
    wider = ExpertPool(torch.randn(9, 6).double(), torch.randn(8, 9).double(), 3, 1.0, nn.Identity())
    dropping = ExpertPool(pools[0].lora_A, pools[0].lora_B, 3, 0.5, nn.Dropout(0.5))
    assert not can_fuse([*pools, dropping])
    assert not can_fuse([*pools, wider])
    both = [*pools, wider]
    weights = torch.cat([weights, weights], dim=-1)
    with torch.no_grad():
        expected = reference(base, both, x, weights)
        torch.testing.assert_close(mixture_linear(x, Reader(base, both), weights), expected, rtol=0, atol=1e-10)


def build_readers(count=3, adapters=1):
    """Linears of different widths that read one x under one set of weights."""
    torch.manual_seed(1)
    leaf = {"dtype": torch.float64, "requires_grad": True}
    x, weights = torch.randn(2, 5, 7, **leaf), torch.rand(2, 5, 3 * adapters, **leaf)
    readers = []
    for i in range(count):
        base = nn.Linear(7, 3 + i, bias=i != 1).double().requires_grad_(False)
        pools = [
            ExpertPool(torch.randn(6, 7, **leaf), torch.randn(3 + i, 6, **leaf), 3, 0.7 + n, nn.Identity())
            for n in range(adapters)
        ]
        readers.append(Reader(base, pools))
    return x, weights, readers


def together(x, weights, readers):
    return mixture_of_readers(x, readers, weights)


def apart(x, weights, readers):
    return [reference(reader.base_layer, reader.pools, x, weights) for reader in readers]


def leaves_of(x, weights, readers):
    return [x, weights, *(leaf for reader in readers for leaf in factors(reader.pools))]


def joined(outputs):
    return torch.cat([output.flatten() for output in outputs])


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("count", [2, 3])
def test_readers_of_one_input_are_computed_together(count, adapters):
    case = build_readers(count, adapters)
    assert_equal_gradients(joined(together(*case)), joined(apart(*case)), leaves_of(*case))


@pytest.mark.parametrize("adapters", [1, 2])
def test_readers_gradcheck(adapters):
    x, weights, readers = build_readers(2, adapters)

    def run(x, weights, *pairs):
        given = iter(zip(pairs[::2], pairs[1::2], strict=True))
        rebuilt = [
            replace(r, pools=[replace(p, lora_A=A, lora_B=B) for p, (A, B) in zip(r.pools, given, strict=False)])
            for r in readers
        ]
        return tuple(together(x, weights, rebuilt))

    assert torch.autograd.gradcheck(run, tuple(leaves_of(x, weights, readers)), fast_mode=adapters > 1)


def test_readers_whose_base_layers_are_inside_and_outside():
    case = build_readers()
    case[2][1].base_layer.register_forward_hook(lambda module, args, output: None)
    case[2][2].base_layer.weight.requires_grad_()
    leaves = [*leaves_of(*case), case[2][2].base_layer.weight]
    assert_equal_gradients(joined(together(*case)), joined(apart(*case)), leaves)


@pytest.mark.parametrize("used", [[0], [2], [0, 1], [1, 2]])
def test_a_reader_whose_output_is_not_used(used):
    case = build_readers()
    leaves = [case[0], case[1], *(leaf for i in used for leaf in factors(case[2][i].pools))]
    actual, expected = (joined([outputs[i] for i in used]) for outputs in (together(*case), apart(*case)))
    assert_equal_gradients(actual, expected, leaves)


def test_backward_twice_and_in_part_leaves_nothing_behind():
    x, weights, readers = build_readers()
    actual, expected = joined(together(x, weights, readers)), joined(apart(x, weights, readers))
    upstream = torch.randn_like(expected)
    first_B = readers[0].pools[0].lora_B
    for wanted in ([weights], [x, first_B], [first_B], [x, weights]):
        ours = torch.autograd.grad(actual, wanted, upstream, retain_graph=True)
        theirs = torch.autograd.grad(expected, wanted, upstream, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_readers_of_an_input_that_needs_no_gradient():
    x, weights, readers = build_readers()
    x.requires_grad_(False)
    case = (x, weights, readers)
    assert_equal_gradients(joined(together(*case)), joined(apart(*case)), leaves_of(*case)[1:])


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_keeps_one_mask_and_no_dropped_copy(count):
    x, weights, readers = build_readers(count)
    dropout = nn.Dropout(0.4)
    dropping = [replace(r, pools=[replace(pool, dropout=dropout) for pool in r.pools]) for r in readers]

    def dropped(x):
        torch.manual_seed(3)
        return torch.native_dropout(x.flatten(0, -2), 0.4, True)[0].view_as(x)

    def run(x):
        torch.manual_seed(3)
        return joined(together(x, weights, dropping))

    expected = [r.base_layer(x) + mixture(dropped(x), r.pools, weights, backend="reference") for r in readers]
    assert_equal_gradients(run(x), joined(expected), leaves_of(x, weights, readers))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(x)
    like_x = [t for t in saved if t.shape == x.shape and t.is_floating_point()]
    assert like_x and all(t.data_ptr() == x.data_ptr() for t in like_x)
    assert sum(t.dtype == torch.bool for t in saved) == 1
    dropout.eval()
    torch.testing.assert_close(run(x), joined(apart(x, weights, readers)), rtol=0, atol=1e-10)


def test_saved_are_x_once_h_and_the_weights():
    x, weights, readers = build_readers()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        together(x, weights, readers)
    known = {t.data_ptr() for t in leaves_of(x, weights, readers)} | {r.base_layer.weight.data_ptr() for r in readers}
    made = [t.shape for t in saved if t.data_ptr() not in known]
    # h of three linears, the weights times their scaling, and the factors as they are multiplied.
    assert made == [(10, 3 * 6), (10, 3), (3 * 6, 7), (3, 6), (4, 6), (5, 6)]


@pytest.mark.parametrize("change", ["experts", "rank", "scaling", "dropout"])
def test_linears_that_differ_are_not_computed_together(change):
    _, _, (first, second, _) = build_readers()
    assert first.goes_with(second)
    (pool,) = second.pools
    changed = {
        "experts": replace(pool, num_experts=2),
        "rank": replace(pool, lora_A=torch.zeros(3, 7)),
        "scaling": replace(pool, scaling=0.1),
        "dropout": replace(pool, dropout=nn.Dropout(0.1)),
    }
    assert not first.goes_with(replace(second, pools=[changed[change]]))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_autocast_follows_what_a_linear_does(dtypes):
    """A bias in another precision than the weight, and float64, which autocast leaves alone."""
    x_dtype, weight_dtype = dtypes
    base, pools, x, weights = build("batch-of-sequences", torch.float32)
    base.weight.data = base.weight.data.to(weight_dtype)
    if x_dtype == torch.float64:
        base, pools = base.double(), [replace(p, lora_A=p.lora_A.double(), lora_B=p.lora_B.double()) for p in pools]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixture_fused(base, x.to(x_dtype), pools, weights)
        assert y.dtype == base(x.to(x_dtype)).dtype
        y.sum().backward()  # inside the region, too
    assert x.grad is not None


def test_dropout_of_everything_takes_the_plain_form():
    base, pools, x, weights = build("batch-of-sequences")
    everything = [replace(pool, dropout=nn.Dropout(1.0)) for pool in pools]
    assert not can_fuse(everything)
    mixture_linear(x, Reader(base, everything), weights).sum().backward()
    assert x.grad.isfinite().all()
