"""Plain PEFT LoRAs on tiny models, trained by a random number generator, and what PEFT itself makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import ARCHITECTURES, awaken
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

BATCH = torch.arange(2, 23).view(3, 7)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "gate_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"up_proj": 11},
    },
    "one layer": {"r": 4, "lora_alpha": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}
"""LoRAs for the tiny Llama that have nothing in common."""


def save_lora(folder: Path, seed: int = 0, base: nn.Module | None = None, **options: Any) -> Path:
    """A random plain LoRA, saved by PEFT."""
    model = get_peft_model(base or ARCHITECTURES["llama"].build(), LoraConfig(task_type="CAUSAL_LM", **options))
    awaken(model, seed + 10)
    model.save_pretrained(str(folder))
    return folder


def save_kinds(folder: Path, kinds: list[str] | None = None) -> dict[str, Path]:
    """Several of KINDS by a name that an adapter may have."""
    return {
        kind.replace(" ", "_"): save_lora(folder / kind.replace(" ", "_"), seed=seed, **KINDS[kind])
        for seed, kind in enumerate(KINDS)
        if kinds is None or kind in kinds
    }


@torch.no_grad()
def plain_output(folder: Path, base: nn.Module | None = None, inputs: Tensor = BATCH) -> Tensor:
    """Logits of PEFT's own LoRA."""
    model = PeftModel.from_pretrained(base or ARCHITECTURES["llama"].build(), str(folder))
    return model.eval()(input_ids=inputs).logits
