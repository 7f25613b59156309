"""Tiny models whose blocks are mixtures themselves, made from configurations, and LoRAs of their native experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import PAD, VOCAB
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moelora import MoELoraConfig

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
_DEEPSEEK = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A kind of native mixture; `num_mixtures` of its two blocks are one."""

    options: dict[str, Any]
    num_mixtures: int = 2
    experts: tuple[str, ...] = tuple(EXPERTS)
    is_converted: bool = True  # PEFT knows how transformers 4 named its linears


FAMILIES = {
    "mixtral": Family({"num_local_experts": 4}),
    "qwen3_moe": Family({"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "olmoe": Family({"num_experts": 4}),
    "qwen2_moe": Family(
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
    ),
    "glm4_moe": Family(_DEEPSEEK | {"head_dim": 8}, num_mixtures=1),
    "deepseek_v3": Family(
        _DEEPSEEK
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        num_mixtures=1,
    ),
    "gpt_oss": Family({"num_local_experts": 4, "head_dim": 8, "sliding_window": 8}, is_converted=False),
}


def native_model(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The tiny model of a family, in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(_COMMON | FAMILIES[name].options | overrides))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # at transformers' 0.02 a wrong expert hides in rounding
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def batch(labels: bool = True, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"labels": ids} if labels else {})


def adapted(kind: Callable[..., Any], model: nn.Module, **options: Any) -> Any:
    """A model with an adapter of one kind of configuration whose factors, and routers, are far from zero."""
    given = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options
    mixture = get_peft_model(model, kind(**given), autocast_adapter_dtype=options.get("inference_mode", True))
    return noisy(mixture)


def noisy(model: Any) -> Any:
    """Factors by their name, so that those of two models with the same names are the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                seed = sum(map(ord, name.replace("base_model.model.", "")))
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(noise * (0.5 if "lora_router" in name else 0.2))
    return model.eval()


def ours(model: nn.Module, **options: Any) -> Any:
    return adapted(MoELoraConfig, model, **({"num_experts": 4, "router_type": "learned"} | options))


def peft_lora(model: nn.Module, **options: Any) -> Any:
    return adapted(LoraConfig, model, **options)


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
