"""Mixtures in files of diffusers, whose own loader makes a LoRA of whatever it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from ..config import MoELoraConfig

_METADATA = "lora_adapter_metadata"
WEIGHTS = "pytorch_lora_weights.safetensors"


def load_lora_adapter(
    model: Any, folder: str | Path, adapter_name: str = "default", weight_name: str = WEIGHTS
) -> None:
    """What `load_lora_adapter` of diffusers is to LoRAs: add the mixture that `save_lora_adapter(folder)` wrote.

    Args:
        model: one of diffusers' that has `add_adapter`, without an adapter of this name.

    Raises:
        ValueError: the file is damaged, holds a plain LoRA, or does not fit the model, which is then as it was.
    """
    path = Path(folder) / weight_name
    config, weights = _read(path)
    model.add_adapter(config, adapter_name)
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    wrong = [name for name, value in expected.items() if name not in weights or weights[name].shape != value.shape]
    wrong += sorted(weights.keys() - expected.keys())
    if wrong:
        model.delete_adapters(adapter_name)
        raise ValueError(f"`{path}` does not fit the model: {wrong[0]} and {len(wrong) - 1} more tensors differ")
    set_peft_model_state_dict(model, weights, adapter_name)


def _read(path: Path) -> tuple[MoELoraConfig, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"there is no `{path}`; `save_lora_adapter` of diffusers writes it")
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            weights = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"`{path}` is damaged: {error}; restore it from a copy") from error
    if settings.get("peft_type") != "MOELORA":
        raise ValueError(f"`{path}` holds no mixture: load it with the model's own `load_lora_adapter`")
    return MoELoraConfig.from_peft_type(**settings), weights
