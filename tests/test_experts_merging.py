"""Merged experts against the products B A formed outright."""

import pytest
import torch
from helpers import ARCHITECTURES, mixture_of, routers_of
from peft import PeftModel
from peft.utils.merge_utils import dare_linear, ties
from test_domain_classifier import mixture_of_domains

from moelora.cli.options import METHODS
from moelora.experts.domains import forget_domain, knows_domain
from moelora.experts.low_rank import truncated
from moelora.experts.merging import MergeRecipe, domain_notes, merge_experts
from moelora.experts.parts import names_of, put_together, take_apart
from moelora.routing.domain_classifier import combined, discriminants
from moelora.tuner.layer import MoELoraLayer

SHARES = [0.1, 0.3]


def products(model):
    """scaling · B A [O, D] of every expert of the mixture, by linear."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MoELoraLayer):
            pools = layer.expert_pools()
            found[name] = [
                (pool.scaling * pool.lora_B[:, i * pool.rank : (i + 1) * pool.rank].double())
                @ pool.lora_A[i * pool.rank : (i + 1) * pool.rank].double()
                for pool in pools
                for i in range(pool.num_experts)
            ]
    return found


def merged_products(model, numbers, recipe, shares=SHARES):
    found = merge_experts(take_apart(model), numbers, shares, recipe)
    place = found.becomes[numbers[0]]
    model = put_together(model, found.adapters)
    return model, {name: each[place].detach() for name, each in products(model).items()}


def output(model):
    with torch.no_grad():
        return model(**ARCHITECTURES["llama"].batch(labels=False)).logits


def expected_product(method, first, second):
    mean = 0.25 * first + 0.75 * second
    if method == "average":
        return mean
    if method == "ties":
        mean = ties([first.float(), second.float()], torch.tensor([0.5, 1.5]), 0.5).double()
    lora_A, lora_B = truncated(mean, 2)
    return lora_B @ lora_A


@pytest.mark.parametrize("experts", [False, True], ids=["whole", "single"])
@pytest.mark.parametrize("method", ["average", "svd", "ties"])
def test_the_merged_product_is_what_the_method_says(method, experts):
    model = mixture_of("llama", experts=experts)
    before = {name: (each[1].detach(), each[3].detach()) for name, each in products(model).items()}
    model, after = merged_products(model, [1, 3], MergeRecipe(method))
    assert after.keys() == before.keys()
    for name, (first, second) in before.items():
        torch.testing.assert_close(after[name], expected_product(method, first, second), rtol=1e-4, atol=1e-5)
    assert model.base_model.routing.num_experts == 3


def test_dare_is_pefts_on_the_products():
    model = mixture_of("llama", target_modules=["q_proj"], num_experts=2)
    before = {name: [each.detach().float() for each in pair] for name, pair in products(model).items()}
    torch.manual_seed(7)
    expected = {name: dare_linear(pair, torch.tensor([0.25, 0.75]), 0.4) for name, pair in before.items()}
    state, recipe = torch.get_rng_state(), MergeRecipe("dare", rank=32, density=0.4, seed=7)
    merge_experts(take_apart(model), [0, 1], SHARES, recipe)
    assert torch.equal(torch.get_rng_state(), state)
    _, after = merged_products(model, [0, 1], recipe)
    for name, product in expected.items():  # 32: every rank there is, so truncation loses nothing
        torch.testing.assert_close(after[name].float(), product, rtol=1e-4, atol=1e-5)
    assert after


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("dare", "ties")])
def test_equal_experts_merge_exactly(method):
    model = mixture_of("llama", use_rslora=True)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, MoELoraLayer):
                layer.lora_A["default"].weight[6:8] = layer.lora_A["default"].weight[2:4]
                layer.lora_B["default"].weight[:, 6:8] = layer.lora_B["default"].weight[:, 2:4]
    before = {name: each[1].detach() for name, each in products(model).items()}
    _, after = merged_products(model, [1, 3], MergeRecipe(method))
    for name, product in before.items():
        torch.testing.assert_close(after[name], product, rtol=1e-5, atol=1e-6)


def test_svd_of_all_ranks_is_the_average():
    model = mixture_of("llama", rank_pattern={"q_proj": 3})
    before = {name: (each[1].detach(), each[3].detach()) for name, each in products(model).items()}
    model, after = merged_products(model, [1, 3], MergeRecipe("svd", rank=6))
    for name, (first, second) in before.items():
        torch.testing.assert_close(after[name], 0.25 * first + 0.75 * second, rtol=1e-4, atol=1e-6)
    config = model.peft_config["expert_0"]
    assert (config.r, config.lora_alpha, model.active_adapters) == (6, 6, ["default", "expert_0"])


@pytest.mark.parametrize("method", ["average", "svd"])
def test_under_fixed_weights_nothing_changes(method, tmp_path):
    """Fixed weights add up, so the mean by those weights leaves the output as it is."""
    model = mixture_of("llama", router_type="fixed")
    model.set_routing_weights([0.1, 0.2, 0.3, 0.6])
    expected = output(model)
    rank = None if method == "average" else 4
    found = merge_experts(take_apart(model), [3, 1], [0.6, 0.2], MergeRecipe(method, rank))
    model = put_together(model, found.adapters)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / "out").eval()
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=0)


def test_uniform_fixed_weights_add_up():
    model = mixture_of("llama", router_type="fixed")
    expected = output(model)
    model = put_together(model, merge_experts(take_apart(model), [0, 1], [1, 1], MergeRecipe("average")).adapters)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    router = next(iter(routers_of(model).values()))
    assert router.decide(torch.zeros(1, 32)).tolist() == [[0.25, 0.25, 0.5]]


@pytest.mark.parametrize("hidden", [None, 6])
def test_router_rows_are_weighed_by_share(hidden):
    model = mixture_of("llama", router_type="learned_with_maturity", router_hidden_size=hidden)
    before = {}
    for name, router in routers_of(model).items():
        router["default"].maturity.copy_(torch.tensor([0.0, 0.2, 0.4, 0.6]))
        router["default"].tokens_per_expert.copy_(torch.tensor([1, 2, 3, 4]))
        before[name] = router["default"].weight.detach().clone()
    found = merge_experts(take_apart(model), [1, 3], SHARES, MergeRecipe("svd"))
    assert found.becomes == [0, 1, 2, 1]
    model = put_together(model, found.adapters)
    for name, router in routers_of(model).items():
        rows = torch.stack([before[name][0], 0.25 * before[name][1] + 0.75 * before[name][3], before[name][2]])
        torch.testing.assert_close(router["default"].weight.detach(), rows)
        assert router["default"].maturity.tolist() == pytest.approx([0.0, 0.5, 0.4])
        assert router["default"].tokens_per_expert.tolist() == [1, 6, 3]


@pytest.mark.parametrize("method", ["svd", "average"])
def test_two_layer_routers_of_several_adapters_score_the_mean(method, tmp_path):
    model = mixture_of("llama", experts=True, router_hidden_size=6)
    hidden = torch.randn(5, 32)
    scores = {name: [scorer(hidden).detach() for scorer in router.active_routers()]
              for name, router in routers_of(model).items()}  # fmt: skip
    found = merge_experts(take_apart(model), [1, 3], SHARES, MergeRecipe(method))
    model = put_together(model, found.adapters)
    for name, router in routers_of(model).items():
        after = torch.cat([scorer(hidden) for scorer in router.active_routers()], dim=-1)
        expected = 0.25 * scores[name][1] + 0.75 * scores[name][3]
        torch.testing.assert_close(after[:, found.becomes[1] : found.becomes[1] + 1], expected)
        torch.testing.assert_close(after[:, found.becomes[0] : found.becomes[0] + 1], scores[name][0])
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / "out").eval()
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=0)


def test_the_others_keep_their_products():
    model = mixture_of("llama", experts=True)
    before = products(model)
    found = merge_experts(take_apart(model), [2, 0], SHARES, MergeRecipe("average"))
    assert names_of(found.adapters) == ["expert_1", "expert_4", "expert_3"]
    assert found.becomes == [1, 0, 1, 2]
    after = products(put_together(model, found.adapters))
    for name, each in after.items():
        torch.testing.assert_close(each[0], before[name][1])
        torch.testing.assert_close(each[2], before[name][3])


def test_what_cannot_be_merged_is_refused():
    model = mixture_of("llama")
    with pytest.raises(ValueError, match=r"`method` \('mean'\) is not one of average, svd, ties, dare"):
        merge_experts(take_apart(model), [0, 1], SHARES, MergeRecipe("mean"))
    with pytest.raises(ValueError, match="two experts or more"):
        merge_experts(take_apart(model), [1], [1.0], MergeRecipe())
    with pytest.raises(ValueError, match=r"`rank` \(4\) contradicts `average`"):
        merge_experts(take_apart(model), [0, 1], SHARES, MergeRecipe("average", rank=4))
    model = mixture_of("llama", router_hidden_size=6)
    model.add_adapter("expert_0", model.peft_config["default"])
    with pytest.raises(ValueError, match="alone in its adapter"):
        merge_experts(take_apart(model), [0, 4], SHARES, MergeRecipe())
    config = mixture_of("llama", target_modules=["q_proj"]).peft_config["default"]
    model = mixture_of("llama", target_modules=["v_proj"])
    model.add_adapter("expert_0", config)
    with pytest.raises(ValueError, match=r"'expert_0' adapts .*q_proj`, which 'default' does not"):
        merge_experts(take_apart(model), [0, 4], SHARES, MergeRecipe())


# ---- memories --------------------------------------------------------------------------------------------------------


def statistics_of(model, adapter):
    return {name: router[adapter].domain for name, router in routers_of(model).items()}


@pytest.mark.parametrize(("recipe", "holder"), [(MergeRecipe("svd"), "default"), (MergeRecipe("average"), "expert_0")])
def test_an_expert_merged_across_adapters_has_both_domains(recipe, holder):
    model = mixture_of_domains()
    low, high = statistics_of(model, "default"), statistics_of(model, "grown_1")
    merged = put_together(model, merge_experts(take_apart(model), [1, 5], SHARES, recipe).adapters)
    assert set(merged.active_adapters) == {"default", "grown_1", holder}
    found = statistics_of(merged, holder)
    for name, statistics in found.items():
        assert statistics.equals(combined([low[name], high[name]], 32)), name
    for adapter, before in (("default", low), ("grown_1", high)):
        if adapter != holder:  # which keeps experts of its own domain
            assert all(statistics.equals(before[name]) for name, statistics in statistics_of(merged, adapter).items())
    for router in routers_of(merged).values():
        own = router.active_routers()
        weights, _ = discriminants([one.domain for one in own])
        torch.testing.assert_close(torch.cat([one.gate_weight for one in own]), weights, rtol=1e-5, atol=1e-6)
    assert "domain statistics of default, grown_1" in domain_notes(take_apart(mixture_of_domains()), [1, 5])[0]


@pytest.mark.parametrize("recipe", [MergeRecipe("svd"), MergeRecipe("average")], ids=["stays", "apart"])
def test_an_expert_merged_within_an_adapter_has_the_domain_of_that(recipe):
    model = mixture_of_domains()
    before = statistics_of(model, "default")
    merged = put_together(model, merge_experts(take_apart(model), [1, 2], SHARES, recipe).adapters)
    for adapter in set(merged.active_adapters) - {"grown_1"}:
        assert all(statistics.equals(before[name]) for name, statistics in statistics_of(merged, adapter).items())
    assert all(router.routes_by_domain for router in routers_of(merged).values())
    assert domain_notes(take_apart(merged), [0, 1]) == []


def test_an_expert_merged_with_one_without_a_domain_says_what_is_lost():
    model = mixture_of_domains()
    forget_domain(model, "grown_1")
    notes = domain_notes(take_apart(model), [1, 5])
    assert "grown_1 has no domain statistics" in notes[0]
    numbers = [0, 4, 5, 6]  # all of grown_1: only adapters with statistics would be left
    merged = put_together(model, merge_experts(take_apart(model), numbers, [1.0] * 4, MergeRecipe()).adapters)
    assert merged.active_adapters == ["default"] and not knows_domain(merged, "default")
    assert not [key for key in merged.state_dict() if "memory" in key or "gate_weight" in key]
