"""A wrap that is refused leaves the base model as it was, and a refused adapter the mixture that it was to join."""

from unittest import mock

import pytest
import torch
from helpers import LLAMA_TARGETS, VOCAB, llama, mixture_of
from peft import get_peft_model

import moelora.tuner.model
from moelora import MoELoraConfig

IDS = torch.arange(12).view(2, 6) % VOCAB


def traces(model):
    """What a model consists of, in names: modules and their classes, hooks, what is trainable, attributes."""
    return [
        (name, type(module).__name__, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


def config(**options):
    return MoELoraConfig(**({"r": 2, "target_modules": LLAMA_TARGETS} | options))


def fail_at(count):
    """The count-th layer cannot be made."""
    calls = []

    def make(*args):
        calls.append(args)
        if len(calls) == count:
            raise RuntimeError("no more")
        return make_routed(*args)

    make_routed = moelora.tuner.model.make_routed
    return mock.patch("moelora.tuner.model.make_routed", make)


@pytest.mark.parametrize("count", [1, 9])
def test_a_base_is_as_it_was_after_a_layer_that_fails(count):
    base = llama().eval()
    base.lm_head.weight.requires_grad = False
    before, expected = traces(base), base(IDS).logits
    with fail_at(count), pytest.raises(RuntimeError, match="no more"):
        get_peft_model(base, config(modules_to_save=["lm_head"]))
    assert traces(base) == before
    assert torch.equal(base(IDS).logits, expected)
    assert get_peft_model(base, config())(IDS).logits.shape == expected.shape


def test_a_base_is_as_it_was_after_routers_that_fail():
    """Routers come after all layers: their hooks and the routing state have to go too."""
    base = llama().eval()
    before, expected = traces(base), base(IDS).logits
    with (
        mock.patch("moelora.tuner.wiring.Wiring._link_readers", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        get_peft_model(base, config())
    assert traces(base) == before
    assert torch.equal(base(IDS).logits, expected)


@pytest.mark.parametrize("name", ["lm_heat", "model.layers.7.mlp", "lm_head"])
@pytest.mark.parametrize("scope", ["block", "module"])
def test_routers_of_linears_that_are_not_adapted_are_refused(name, scope):
    """What does not exist, and what no target is, gets no router: neither does a base get anything else then."""
    base = llama().eval()
    before = traces(base)
    refused = config(own_routers=["model.layers.0.mlp.up_proj", name], router_scope=scope)
    with pytest.raises(ValueError, match=rf"`own_routers` \('{name}'\) names no linear of the base model that the ad"):
        get_peft_model(base, refused)
    assert traces(base) == before
    model = get_peft_model(base, config(router_scope=scope))
    before = traces(model)
    with pytest.raises(ValueError, match=f"`own_routers` .'{name}'. names no linear"):
        model.add_adapter("more", refused)
    assert (traces(model), list(model.peft_config)) == (before, ["default"])


@pytest.mark.parametrize("where", ["layer", "routers"])
def test_a_mixture_is_as_it_was_after_an_adapter_that_fails(where):
    model = mixture_of("llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    before, expected = traces(model), model(IDS).logits
    state = model.base_model.routing
    hooks, handles = dict(state.hooks), list(state.handles)
    failing = (
        fail_at(2)
        if where == "layer"
        else mock.patch("moelora.tuner.wiring.Wiring._link_readers", side_effect=RuntimeError("no more"))
    )
    more = config(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    with failing, pytest.raises(RuntimeError, match="no more"):
        model.add_adapter("more", more)
    assert traces(model) == before
    assert (state.hooks, state.handles, list(model.peft_config)) == (hooks, handles, ["default"])
    assert torch.equal(model(IDS).logits, expected)
    model.add_adapter("more", config(target_modules=["q_proj", "v_proj"], router_type="learned"))
    assert list(model.peft_config) == ["default", "more"]
