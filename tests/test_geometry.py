"""Sizes and likeness of experts, against the products B A formed outright."""

import math

import pytest
import torch
from torch import nn

from moelora.ops.pool import ExpertPool
from moelora.report.geometry import geometry, group_modules, sharpness
from moelora.routing import Router


def pool(num_experts, rank, width=12, out=10, scaling=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(num_experts * rank, width, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(out, num_experts * rank, generator=generator, dtype=torch.float64)
    return ExpertPool(lora_A, lora_B, num_experts, scaling, nn.Identity())


def products(pools):
    """scaling · B A of every expert, formed."""
    for each in pools:
        for expert in range(each.num_experts):
            own = slice(expert * each.rank, (expert + 1) * each.rank)
            yield each.scaling * each.lora_B[:, own] @ each.lora_A[own]


MODULES = {
    "a.q": {"one": pool(3, 2, seed=1), "two": pool(1, 4, seed=2)},
    "a.v": {"one": pool(3, 2, width=5, out=7, seed=3), "two": pool(1, 1, width=5, out=7, scaling=0.5, seed=4)},
}
LAYOUT = (("one", 3), ("two", 1))


def test_norms_and_similarities_are_those_of_the_products():
    stacked = [list(products(pools.values())) for pools in MODULES.values()]
    flat = torch.stack([torch.cat([module[e].flatten() for module in stacked]) for e in range(4)])
    found = geometry(MODULES, LAYOUT)
    torch.testing.assert_close(found.norm, flat.norm(dim=1))
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.similarity, unit @ unit.T)


def test_effective_rank_is_that_of_the_singular_values():
    expected = torch.zeros(4, dtype=torch.float64)
    for pools in MODULES.values():
        for expert, product in enumerate(products(pools.values())):
            singular = torch.linalg.svdvals(product)
            expected[expert] += torch.special.entr(singular / singular.sum()).sum().exp() / 2
    torch.testing.assert_close(geometry(MODULES, LAYOUT).effective_rank, expected)


def test_a_zero_expert_is_like_nothing():
    zero = pool(2, 2)
    zero.lora_B[:, 2:] = 0
    found = geometry({"m": {"one": zero}}, (("one", 2),))
    assert found.norm[1] == 0 and found.effective_rank[1] == 0
    assert found.similarity[0].tolist() == pytest.approx([1, 0]) and found.similarity[1].tolist() == [0, 0]


def test_an_adapter_that_misses_a_linear_counts_as_zero_there():
    modules = {"a": {"one": pool(1, 2, seed=1), "two": pool(1, 2, seed=2)}, "b": {"two": pool(1, 2, seed=3)}}
    layout = (("one", 1), ("two", 1))
    found = geometry(modules, layout)
    assert found.norm[0] == pytest.approx(float(geometry({"a": modules["a"]}, layout).norm[0]))
    assert found.norm[1] > geometry({"a": modules["a"]}, layout).norm[1]


def test_scaled_copies_are_fully_similar():
    one = pool(1, 2)
    copy = ExpertPool(-3 * one.lora_A, one.lora_B / 5, 1, 7.0, nn.Identity())
    found = geometry({"m": {"one": one, "two": copy}}, (("one", 1), ("two", 1)))
    assert float(found.similarity[0, 1]) == pytest.approx(-1)


def test_linears_belong_to_the_innermost_router():
    modules = {"layers.1.q": {}, "layers.10.q": {}, "head": {}}
    assert group_modules(modules, ["layers.1", "layers.10"]) == {
        "layers.1": {"layers.1.q": {}}, "layers.10": {"layers.10.q": {}}
    }  # fmt: skip
    assert list(group_modules(modules, [""])[""]) == list(modules)
    assert group_modules(modules, ["head"]) == {"head": {"head": {}}}


def test_sharpness_runs_from_even_to_certain():
    router = Router(16, 4)
    with torch.no_grad():
        router.weight.zero_()
    assert sharpness([router], 1.0) == pytest.approx(0.25)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, 16) * 100)
    assert sharpness([router], 1.0) > 0.99
    with torch.no_grad():
        router.weight.div_(100)
    cool, warm = sharpness([router], 1.0), sharpness([router], 10.0)
    assert 0.25 < warm < cool < 0.99
    assert sharpness([Router(16, 2, router_hidden_size=8), Router(16, 1)], 1.0) == pytest.approx(1 / 3, abs=0.25)
    assert not math.isnan(cool)
