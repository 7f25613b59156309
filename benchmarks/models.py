"""Models of known shapes with random weights: speed does not depend on what they have learnt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

Options = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A shape, and the option values that go with it."""

    shape: Options
    options: Options  # of every benchmark of whole models
    training: Options = field(default_factory=dict)
    decoding: Options = field(default_factory=dict)
    family: str = "llama"  # transformers' name of the architecture


PRESETS = {
    "llama-8b": Preset(  # Llama-3.1-8B
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "vocab_size": 128256,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        {"dtype": "bfloat16", "experts": 8, "rank": 16, "top_k": 2},
        {"batch": 2, "length": 4096},
        {"batches": [1, 8, 64], "prompt": 512, "cache": 1024, "steps": 32},
    ),
    "quickstart": Preset(  # SmolLM2-135M as examples/quickstart.yaml trains it
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        {"dtype": "float32", "experts": 4, "rank": 8, "top_k": 2},
        {"batch": 4, "length": 128, "arms": ["frozen", "lora-equal", "ours"], "checkpointing": ["off"]},
        {"batches": [1, 8], "prompt": 64, "cache": 128, "steps": 4},
    ),
    "qwen-0.5b": Preset(  # Qwen2.5-0.5B
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "vocab_size": 151936,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        {"dtype": "bfloat16", "experts": 8, "rank": 16, "top_k": 2},
        {"batch": 2, "length": 4096},
        {"batches": [1, 8, 64], "prompt": 512, "cache": 1024, "steps": 32},
        family="qwen2",
    ),
    "tiny-deep": Preset(  # where starting operations costs more than computing them
        {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 8,
            "vocab_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
        {"dtype": "float32", "experts": 8, "rank": 4, "top_k": 2},
        {"batch": 2, "length": 64},
        {"batches": [1, 8], "prompt": 16, "cache": 32, "steps": 4},
    ),
    "tiny": Preset(
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 2,
            "vocab_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
        {"dtype": "float32", "experts": 8, "rank": 4, "top_k": 2},
        {"batch": 2, "length": 64},
        {"batches": [1, 8], "prompt": 16, "cache": 32, "steps": 4},
    ),
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument("--preset", default="llama-8b", choices=list(PRESETS), help="shape and defaults of the rest")
    parser.add_argument("--layers", type=int, help="fewer transformer blocks than the preset has")


def parse_with_preset(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, purpose: str | None = None
) -> argparse.Namespace:
    """Parse; where an option is not given, the preset's value for it holds. purpose: "training", "decoding" or none."""
    preset = PRESETS[parser.parse_known_args(argv)[0].preset]
    parser.set_defaults(**preset.options, **(getattr(preset, purpose) if purpose else {}))
    return parser.parse_args(argv)


def shape_of(args: argparse.Namespace) -> Options:
    """The configuration of the model, in transformers' terms."""
    layers = {} if args.layers is None else {"num_hidden_layers": args.layers}
    return PRESETS[args.preset].shape | layers


def build_base(args: argparse.Namespace) -> nn.Module:
    """The frozen model, made on its device in its dtype."""
    shape = shape_of(args)
    print(f"building {args.preset} with {shape['num_hidden_layers']} blocks on {args.device}", flush=True)
    config = AutoConfig.for_model(PRESETS[args.preset].family, **shape)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model.requires_grad_(False)


def case_name(args: argparse.Namespace, *details: str) -> str:
    """What is measured, for tables."""
    return ", ".join([f"{args.preset}, {shape_of(args)['num_hidden_layers']} blocks", *details])
