"""Tiny random base models of every architecture that is served, saved as folders; float32, no network.

Weights are as large as they are in trained models, not 0.02 as transformers draws them: attention looks at some tokens
more than at others, soft caps and attention sinks act, windows are shorter than the longest prompts. So an engine that
leaves one of these out is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

VOCAB = 320
LENGTH = 2048
"""Tokens that a model takes."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LINEARS[:4]

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # of those that vLLM's attention takes on a CPU; two thirds of models have heads * 32 != hidden
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_NO_HEAD_DIM = {"hidden_size": 128, "head_dim": None}
"""For architectures that derive the size of a head: 128 / 4."""
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_NATIVE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}


@dataclass(frozen=True)
class Architecture:
    """A kind of base model.

    Args:
        model_type: transformers' name of it.
        options: of its configuration, beside those that all have.
        linears: names of the modules that adapters act on here and that the engine gives slots to.
        engine: options of the engine that it needs.
    """

    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    linears: tuple[str, ...] = LINEARS
    engine: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> PretrainedConfig:
        options = {**_COMMON, **self.options, **changes}
        return AutoConfig.for_model(
            self.model_type, **{k: v for k, v in options.items() if (k, v) != ("head_dim", None)}
        )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral", {"sliding_window": 80}),  # the domain classifier reads 64 back
    "qwen2": Architecture("qwen2", _NO_HEAD_DIM),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture(
        "gemma2",
        {**_WINDOWS, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
        | {"tie_word_embeddings": True},
    ),
    "gemma3": Architecture("gemma3_text", {**_WINDOWS, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}),
    "phi3": Architecture("phi3", _NO_HEAD_DIM, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "olmo2": Architecture("olmo2", _NO_HEAD_DIM),
    "granite": Architecture(
        "granite",
        {**_NO_HEAD_DIM, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
        | {"logits_scaling": 0.5},
    ),
    "smollm3": Architecture("smollm3", {**_NO_HEAD_DIM, "no_rope_layers": [1, 0, 1]}),
    "mixtral": Architecture("mixtral", {**_NATIVE, "sliding_window": None}, ATTENTION),
    "qwen3_moe": Architecture("qwen3_moe", {**_NATIVE, "moe_intermediate_size": 32}, ATTENTION),
    "gpt_oss": Architecture("gpt_oss", {**_NATIVE, **_WINDOWS}, ATTENTION),
}
"""What may be served, by name."""
UNTRIED = {"cohere": Architecture("cohere", {**_NO_HEAD_DIM, "tie_word_embeddings": True})}
"""What vLLM serves and we do not: what enters its blocks is not what their arguments add up to."""


def architecture(name: str) -> Architecture:
    return (ARCHITECTURES | UNTRIED)[name]


def save_base(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A model and a tokenizer; the same weights each time. `changes` are options of the configuration."""
    config = architecture(name).config(**changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Matrices keep the size of what they are given; vectors (norms, biases, sinks) differ from what they begin as."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 or name.endswith("bias"):
            parameter.add_(noise, alpha=0.2)
        else:
            parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5))
