"""Every causal language model of transformers whose blocks are mixtures and that a small configuration builds: LoRA of
its native experts computes what plain PEFT computes, and experts of ours act beside them."""

import logging
from typing import Any

import pytest
import torch
from native import noisy, ours
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moelora import MoELoraConfig
from moelora.ops.native import is_native
from moelora.tuner.native import fused_parameters, short_name

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 0, "shared_expert_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_dense_layers": 0, "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2,
    "use_cache": False,
}  # fmt: skip
BY_GROUPED_PRODUCTS = [
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "jamba", "laguna", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "solar_open",
]  # fmt: skip
AS_PEFT_DOES = ["llama4_text", "longcat_flash"]  # whose experts do not say how they compute
OF_OTHER_WIDTH = {"deepseek_v4", "hy_v4"}  # several streams enter a block, so that each module needs a router


def small_model(kind: str) -> Any:
    known = AutoConfig.for_model(kind)
    options = {name: value for name, value in SMALL.items() if hasattr(known, name)}
    if rotated := options.get("qk_rope_head_dim"):  # multi-head latent attention: every head has keys of its own
        options |= {"head_dim": rotated, "num_key_value_heads": 4} if hasattr(known, "head_dim") else {}
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", [*BY_GROUPED_PRODUCTS, *AS_PEFT_DOES])
def test_equals_pefts_lora(kind):
    base = small_model(kind)
    ids = torch.arange(3, 17).view(2, 7)
    alone = base(input_ids=ids).logits
    targets = sorted({short_name(name) for name in fused_parameters(base)})
    assert any(is_native(module) for module in base.modules()) is (kind in BY_GROUPED_PRODUCTS)
    options = {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": targets}
    plain = noisy(get_peft_model(small_model(kind), LoraConfig(**options)))(input_ids=ids).logits
    model = noisy(get_peft_model(small_model(kind), MoELoraConfig(**options)))
    assert (plain - alone).norm() > 0.01 * alone.norm()
    assert (model(input_ids=ids).logits - plain).norm() < 1e-4 * (plain - alone).norm()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", BY_GROUPED_PRODUCTS)
def test_experts_beside(kind):
    base = small_model(kind)
    ids = torch.arange(3, 17).view(2, 7)
    alone = base(input_ids=ids).logits
    scope = "module" if kind in OF_OTHER_WIDTH else "block"
    modules = sorted({short_name(name).rpartition(".")[0] for name in fused_parameters(base)})
    model = ours(base, target_modules=modules, router_scope=scope)
    assert (model(input_ids=ids).logits - alone).norm() > 0.01 * alone.norm()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
