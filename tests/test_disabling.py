"""Disabled, a mixture is its base model; enabled again, it is as trainable as it was or has been made since."""

import pytest
import torch
from helpers import ARCHITECTURES, IN_SCOPES, SCOPES, awaken, config_for, llama, mixture_of
from peft import get_peft_model
from test_peft_contract_behaviour import INPUTS, logits, trainable


@pytest.mark.parametrize(("name", "scope"), IN_SCOPES)
def test_disable_adapter_is_the_base_model(name, scope):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(labels=False)
    with torch.no_grad():
        routed = model(**inputs).logits
        with model.disable_adapter():
            torch.testing.assert_close(
                model(**inputs).logits, ARCHITECTURES[name].build()(**inputs).logits, rtol=0, atol=0
            )
        torch.testing.assert_close(model(**inputs).logits, routed, rtol=0, atol=0)


def test_disabled_training_forward_counts_nothing():
    model = mixture_of("llama", router_type="learned_with_maturity")
    with model.disable_adapter():
        output = model.train()(**INPUTS)
    torch.testing.assert_close(output.loss, llama()(**INPUTS).loss)
    assert model.routing_stats() == {} and model.expert_maturity.max() == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_frozen_stays_frozen(depth):
    model = mixture_of("llama", experts=True)
    for name, parameter in model.named_parameters():
        if "expert_1" in name or "lora_router" in name:
            parameter.requires_grad = False
    before = trainable(model)
    with model.disable_adapter():
        if depth == 2:
            with model.disable_adapter():
                logits(model)
        logits(model)
    assert trainable(model) == before


def test_frozen_stays_frozen_after_an_exception():
    model = mixture_of("llama", experts=True)
    model.base_model.set_requires_grad("expert_2", False)
    before, expected = trainable(model), logits(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert trainable(model) == before
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"use_moe_routing": False}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_that_came_while_disabled_learns(options):
    """As in PEFT's own LoRA, but what was frozen stays frozen."""
    plain = {"use_moe_routing": False, "expert_capacity_factor": 1.25, "router_aux_loss_coef": 0.01}
    options = plain if "use_moe_routing" in options else options
    config = config_for(ARCHITECTURES["llama"], **options)
    model, reference = (get_peft_model(llama(), config, adapter_name="expert_0") for _ in range(2))
    for one in (model, reference):
        for name, parameter in one.named_parameters():
            if "layers.0" in name:
                parameter.requires_grad = False
    model.base_model.disable_adapter_layers()
    for one in (model, reference):
        one.add_adapter("expert_1", config)
    model.base_model.enable_adapter_layers()
    assert trainable(model) == trainable(reference)
    assert any("layers.1" in name for name in trainable(model))


@pytest.mark.parametrize("chosen", ["expert_1", ["expert_2", "expert_0"]], ids=str)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_mixture_chosen_while_disabled_is_what_learns(chosen, depth):
    model, reference = (mixture_of("llama", experts=True) for _ in range(2))
    for one in (model, reference):
        one.set_adapter(["expert_0", "expert_3"])
    model.base_model.disable_adapter_layers()
    for one in (model, reference):
        one.set_adapter(chosen)
    if depth == 2:
        model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == trainable(reference) != set()


def test_what_the_user_freezes_while_disabled_stays_frozen():
    model = mixture_of("llama", experts=True)
    with model.disable_adapter():
        model.get_input_embeddings().requires_grad_(True)
        model.set_adapter("expert_1", inference_mode=True)
    assert trainable(model) == {name for name, _ in model.named_parameters() if "embed_tokens" in name}


@pytest.mark.parametrize("scope", SCOPES)
def test_layers_that_came_while_disabled_are_disabled_too(scope):
    """An adapter of other targets than those there are."""
    own, other = (
        config_for(ARCHITECTURES["llama"], target_modules=[target], modules_to_save=saved, router_scope=scope)
        for target, saved in (("q_proj", None), ("v_proj", ["lm_head"]))
    )
    model, reference = (get_peft_model(llama(), own, adapter_name="expert_0") for _ in range(2))
    with model.disable_adapter():
        for one in (model, reference):
            one.add_adapter("expert_1", other)
            awaken(one)
        torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)
    assert trainable(model) == trainable(reference)
