"""Merging fixed mixtures of several adapters, and taking the merge back."""

import pytest
import torch
from helpers import mlp
from peft import get_peft_model

from moelora import MoELoraConfig


def config(**options):
    defaults = {"r": 2, "num_experts": 2, "target_modules": ["first", "second"], "router_scope": "module"}
    return MoELoraConfig(**(defaults | options))


def two_adapters():
    model = get_peft_model(mlp(), config(router_type="fixed", init_lora_weights=False), adapter_name="a")
    model.add_adapter("b", config(router_type="fixed", init_lora_weights=False))
    model.set_adapter(["a", "b"])
    return model


@pytest.mark.parametrize("change", ["weights", "delete"])
def test_unmerging_takes_back_what_was_merged(change):
    model = two_adapters()
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.merge_adapter(adapter_names=["b"])
    if change == "weights":
        model.set_routing_weights([1.0, 0.0, 0.0, 0.0])
    else:
        model.delete_adapter("a")
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("merged", [["b"], ["a", "b"]], ids=["one", "both"])
def test_merging_equals_the_mixture_of_what_is_merged(merged):
    model = two_adapters()
    x = torch.randn(3, 8)
    model.set_adapter(merged)
    expected = model(x)
    model.set_adapter("a")  # what is active does not matter
    torch.testing.assert_close(model.merge_and_unload(adapter_names=merged)(x), expected, rtol=1e-5, atol=1e-6)


def test_a_new_adapters_module_to_save_is_trainable_where_it_is_in_use():
    model = get_peft_model(mlp(), config(target_modules=["first"]), adapter_name="a")
    model.add_adapter("expert_0", config(target_modules=["first"], modules_to_save=["second"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("second.modules_to_save.expert_0" in name for name in trainable)
