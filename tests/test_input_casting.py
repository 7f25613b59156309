"""PEFT's `disable_input_dtype_casting`: factors stored in another dtype are computed in that of their input."""

import copy

import pytest
import torch
from helpers import SCOPES, VOCAB, mixture_of
from peft.helpers import disable_input_dtype_casting

IDS = torch.arange(14).view(2, 7) % VOCAB


def store_factors(model, dtype):
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("backend", ["fused", "concat"])
@pytest.mark.parametrize("scope", SCOPES)
def test_factors_are_computed_in_the_dtype_of_their_input(scope, backend, dtype, monkeypatch):
    if backend == "concat":
        monkeypatch.setattr("moelora.ops.can_fuse", lambda pools: False)
        monkeypatch.setattr("moelora.forward.shared_input.can_fuse", lambda pools: False)
    model = mixture_of("llama", router_scope=scope)
    rounded = copy.deepcopy(model)
    store_factors(rounded, dtype)
    store_factors(rounded, torch.float32)
    store_factors(model, dtype)
    with disable_input_dtype_casting(model):
        logits = model(IDS).logits
    torch.testing.assert_close(logits, rounded(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_lone_imported_expert_too():
    model = mixture_of("llama", experts=True, single_expert=True, top_k_experts=1)
    model.set_adapter("expert_1")
    rounded = copy.deepcopy(model)
    store_factors(rounded, torch.bfloat16)
    store_factors(rounded, torch.float32)
    store_factors(model, torch.bfloat16)
    with disable_input_dtype_casting(model):
        torch.testing.assert_close(model(IDS).logits, rounded(IDS).logits, rtol=1e-5, atol=1e-5)
