"""Tiny models of many architectures with inputs for them, made from configurations: for the wide sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 99
IMAGE = 32

# What makes any configuration small, under the names that configurations have for it.
_SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), 2
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size",
         "moe_intermediate_size", "shared_expert_intermediate_size", "hidden_dim"), 48
    ),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim"), 8),
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "n_group": 1,
    "topk_group": 1,
    "image_size": IMAGE,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}  # fmt: skip


def small(config_class: type, **overrides: Any) -> Any:
    """A configuration of this class that is small throughout, but for what is given."""
    there = config_class().to_dict()
    options: dict[str, Any] = {
        name: value for name, value in _SMALL.items() if name in there and not isinstance(there[name], (list, tuple, dict))
    }
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if isinstance(overrides.get(name, {}), dict) and part is not transformers.AutoConfig:
            options[name] = small(part, **overrides.get(name, {})).to_dict()
    given = {name: value for name, value in overrides.items() if not (name in options and isinstance(value, dict))}
    return config_class(**(options | given))
