"""A mixture rebuilt from some of its experts computes what the whole one does with the others out of every softmax."""

import warnings

import pytest
import torch
from helpers import ARCHITECTURES, every_pair, mixture_of, routers_of
from peft import PeftModel

from moelora.experts.parts import find_experts, names_of, put_together, select, take_apart
from moelora.report.observe import columns_of
from moelora.routing import rms_norm
from moelora.routing.decision import route


def output(model):
    with torch.no_grad():
        return model(**ARCHITECTURES["llama"].batch(labels=False)).logits


def output_without(model, gone):
    """Logits with the scores of these experts out of every router's softmax."""
    state = model.base_model.routing
    config = state.config

    def route_without(router, args, weights):
        kept = [i for i, number in enumerate(columns_of(router, state)) if number not in gone]
        flat = torch.zeros_like(weights).flatten(0, -2)
        if config.router_type == "fixed":
            flat[:, kept] = weights.flatten(0, -2)[:, kept]
            flat *= weights.flatten(0, -2).sum(-1, keepdim=True) / flat.sum(-1, keepdim=True)
            return flat.view_as(weights)
        normed = rms_norm(args[0].flatten(0, -2))
        logits = torch.cat([scorer(normed) for scorer in router.active_routers()], dim=-1)[:, kept]
        maturity = router.maturity()[kept] if config.router_type == "learned_with_maturity" else None
        routing = route(logits, top_k=min(config.top_k_experts, len(kept)), temperature=config.router_temperature,
                        maturity_E=maturity)  # fmt: skip
        flat[:, kept] = routing.weights * config.routing_scale
        return flat.view_as(weights)

    handles = [router.register_forward_hook(route_without) for router in routers_of(model).values()]
    try:
        return output(model)
    finally:
        for handle in handles:
            handle.remove()


def matured(model):
    with torch.no_grad():
        for number, router in enumerate(routers_of(model).values()):
            for index, adapter in enumerate(router.lora_router.values()):
                adapter.maturity.copy_(torch.linspace(0.2, 0.9, adapter.num_experts) + 0.05 * index)
                adapter.tokens_per_expert.copy_(torch.arange(adapter.num_experts) + 10 * index + number)
    return model


OPTIONS = {
    "learned": {},
    "maturity": {"router_type": "learned_with_maturity", "routing_scale": 2.0},
    "two-layer": {"router_hidden_size": 6},
    "fixed": {"router_type": "fixed"},
    "model": {"router_scope": "model"},
    "module": {"router_scope": "module"},
    "top-3": {"top_k_experts": 3, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
}


@every_pair(options=OPTIONS, experts=[False, True], kept=[[0, 2, 3], [1, 2], [3]])
def test_what_is_left_routes_as_if_it_had_been_alone(options, experts, kept, tmp_path):
    model = matured(mixture_of("llama", experts=experts, **OPTIONS[options]))
    expected = output_without(model, {0, 1, 2, 3} - set(kept))
    assert not torch.allclose(output(model), expected, atol=1e-2), "the experts that go must matter"
    smaller = put_together(model, select(take_apart(model), kept))
    torch.testing.assert_close(output(smaller), expected, rtol=1e-4, atol=1e-4)
    assert smaller.base_model.routing.num_experts == len(kept)
    assert not smaller.training
    smaller.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / "out").eval()
    torch.testing.assert_close(output(loaded), output(smaller), rtol=0, atol=0)


def test_all_experts_rebuild_the_mixture_exactly():
    model = matured(mixture_of("llama", router_hidden_size=6, router_type="learned_with_maturity"))
    expected, maturity = output(model), model.expert_maturity
    again = put_together(model, take_apart(model))
    torch.testing.assert_close(output(again), expected, rtol=0, atol=0)
    torch.testing.assert_close(again.expert_maturity, maturity, rtol=0, atol=0)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_rebuilt_is_as_trainable_as_it_was(tmp_path, is_trainable):
    mixture_of("llama", experts=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path, is_trainable=is_trainable)
    smaller = put_together(model, select(take_apart(model), [0, 2]))
    assert {p.requires_grad for name, p in smaller.named_parameters() if "lora_" in name} == {is_trainable}


def test_modules_that_were_trained_too_are_carried_along():
    model = mixture_of("llama", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight += 0.5
    expected = output_without(model, {1})
    assert not torch.allclose(output(mixture_of("llama")), output(model), atol=1e-2)
    smaller = put_together(model, select(take_apart(model), [0, 2, 3]))
    torch.testing.assert_close(output(smaller), expected, rtol=1e-4, atol=1e-4)


def test_counters_and_maturity_follow_their_experts():
    model = matured(mixture_of("llama", router_type="learned_with_maturity"))
    router = next(iter(routers_of(model).values()))["default"]
    maturity, tokens = router.maturity.clone(), router.tokens_per_expert.clone()
    smaller = put_together(model, select(take_apart(model), [1, 3]))
    left = next(iter(routers_of(smaller).values()))["default"]
    assert left.maturity.tolist() == maturity[[1, 3]].tolist()
    assert left.tokens_per_expert.tolist() == tokens[[1, 3]].tolist()
    assert left.tokens_per_expert.dtype == torch.int64


def test_a_lone_expert_becomes_a_single_adapter():
    model = mixture_of("llama")
    assert names_of(select(take_apart(model), [2])) == ["expert_0"]
    assert names_of(select(take_apart(model), [1, 2])) == ["default", "default"]


def test_fewer_experts_than_top_k_lower_it():
    chosen = select(take_apart(mixture_of("llama", top_k_experts=3)), [0, 1])
    assert (chosen[0].config.num_experts, chosen[0].config.top_k_experts) == (2, 2)


def test_other_adapters_keep_top_k_where_the_mixture_is_large_enough():
    model = mixture_of("llama", top_k_experts=3)
    model.add_adapter("expert_0", model.peft_config["default"])
    chosen = select(take_apart(model), [1, 2, 4])
    assert names_of(chosen) == ["expert_1", "expert_2", "expert_0"]
    assert {adapter.config.top_k_experts for adapter in chosen} == {3}


def test_inactive_adapters_are_kept_as_they_are():
    model = mixture_of("llama", experts=True)
    model.set_adapter(["expert_3", "expert_0", "expert_1"])
    expected = output_without(model, {1})
    smaller = put_together(model, select(take_apart(model), [0, 2]))
    assert smaller.active_adapters == ["expert_3", "expert_1"]
    assert sorted(smaller.peft_config) == ["expert_1", "expert_2", "expert_3"]
    torch.testing.assert_close(output(smaller), expected, rtol=1e-4, atol=1e-4)


def test_fixed_weights_that_were_set_keep_their_sum():
    model = mixture_of("llama", router_type="fixed")
    model.set_routing_weights([0.1, 0.2, 0.3, 0.6])
    expected = output_without(model, {3})
    smaller = put_together(model, select(take_apart(model), [0, 1, 2]))
    torch.testing.assert_close(output(smaller), expected, rtol=1e-4, atol=1e-4)
    model = mixture_of("llama", router_type="fixed")
    model.set_routing_weights([0.0, 0.0, 0.3, 0.6])
    with pytest.raises(ValueError, match="fixed weights of zero"):
        select(take_apart(model), [0, 1])


def test_experts_are_found_by_number_and_by_adapter():
    names = ["default", "default", "expert_4"]
    assert find_experts(["expert_4", "0"], names) == [2, 0]
    assert find_experts(["default"], names) == [0, 1]
    with pytest.raises(ValueError, match=r"no expert '3'; give .* 2 \(expert_4\)"):
        find_experts(["3"], names)
    with pytest.raises(ValueError, match="expert 0 is named twice"):
        find_experts(["0", "default"], names)


def test_nothing_left_and_attached_routers_are_refused():
    model = mixture_of("llama")
    with pytest.raises(ValueError, match="no expert is left"):
        select(take_apart(model), [])
    model.attach_router(torch.nn.Linear(32, 4))
    with pytest.raises(ValueError, match="detach_router"):
        take_apart(model)


def test_the_base_that_is_put_together_anew_carries_no_old_adapter():
    """PEFT warns of a second adapter on a model that still has the configuration of a first."""
    model = mixture_of("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(second time|peft_config)")
        again = put_together(model, take_apart(model))
    assert list(again.base_model.model.peft_config) == ["default"]
