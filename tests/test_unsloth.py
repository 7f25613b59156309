"""A model of Unsloth's is refused: its decoding reads factors past our layers. Needs no Unsloth, which wants a GPU."""

import pytest
from helpers import llama
from peft import get_peft_model
from transformers.models.llama.modeling_llama import LlamaAttention

from moelora import MoELoraConfig


def patched(module):
    """A forward as Unsloth puts in place of one: a function of a module of its own."""

    def forward(self, *args, **kwargs):
        raise AssertionError("not called")

    forward.__module__ = module
    return forward


@pytest.mark.parametrize("module", ["unsloth.models.llama", "unsloth_compiled_module_llama", "unsloth_zoo.compiler"])
def test_a_class_that_it_patched_is_refused_by_name(monkeypatch, module):
    base = llama()
    before = [type(layer) for layer in base.modules()]
    monkeypatch.setattr(LlamaAttention, "forward", patched(module))
    with pytest.raises(ValueError, match=rf"`model\.layers\.0\.self_attn` computes by `{module}`.*use_liger_kernel"):
        get_peft_model(base, MoELoraConfig(target_modules="all-linear"))
    assert [type(layer) for layer in base.modules()] == before


def test_a_module_that_it_patched_is_refused():
    base = llama()
    base.forward = patched("unsloth.models.llama").__get__(base)
    with pytest.raises(ValueError, match=r"`LlamaForCausalLM` computes by `unsloth\.models\.llama`"):
        get_peft_model(base, MoELoraConfig(target_modules="all-linear"))


def test_plain_lora_is_left_to_unsloth(monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", patched("unsloth.models.llama"))
    config = MoELoraConfig(use_moe_routing=False, target_modules="all-linear")
    assert get_peft_model(llama(), config).peft_config["default"].use_moe_routing is False
