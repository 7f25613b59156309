"""LoRAs of a base's own experts, to and from plain PEFT: its `target_parameters`, in its layout and under its names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import ParamWrapper as PeftParamWrapper
from torch import nn

from ..config import MoELoraConfig
from ..schema import settable_fields
from ..storage.lora_file import LoraError, LoraFile, read_config
from ..tuner.native import ParamWrapper


def native_from_lora(base_model: nn.Module, path_or_id: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """A plain PEFT LoRA of native experts (`target_parameters`), loaded to be computed without the sum W + BA.

    PEFT itself reads it, so that names of transformers 4 are turned into those of the fused parameters.

    Raises:
        LoraError (a ValueError): it is no LoRA, or holds factors of linears too. The model has not changed then.
    """
    source = str(path_or_id)
    if (kind := read_config(source).get("peft_type")) != "LORA":
        raise LoraError(f"{source}: `peft_type` is {kind!r}; only a plain LoRA is loaded by `native_from_lora`")
    lora = _as_peft_reads_it(base_model, source)
    linears = [name for name, module in lora.base_model.model.named_modules() if _is_of_linear(module)]
    tensors, settings = get_peft_model_state_dict(lora), _settings(lora.peft_config["default"])
    if linears or not settings["target_parameters"]:
        found = f"`{linears[0]}`, which is a linear" if linears else "no parameter at all"
        raise LoraError(
            f"{source} adapts {found}: `native_from_lora` loads LoRAs of native experts alone. Linears need a router "
            "of ours: `moelora.experts.build` takes LoRAs of linears"
        )
    model = get_peft_model(
        base_model, MoELoraConfig(**settings | {"target_modules": [], "inference_mode": not is_trainable})
    )
    set_peft_model_state_dict(model, tensors)
    return model if is_trainable else model.eval()


def _as_peft_reads_it(base_model: nn.Module, source: str) -> PeftModel:
    """The LoRA on a copy of the base's modules around its own weights: whatever fails, the base stays as it is."""
    weights = [*base_model.parameters(), *base_model.buffers()]
    trainable = [weight.requires_grad for weight in weights]
    try:
        twin = copy.deepcopy(base_model, {id(weight): weight for weight in weights})
        return PeftModel.from_pretrained(twin, source, autocast_adapter_dtype=False)
    finally:
        for weight, value in zip(weights, trainable, strict=True):
            weight.requires_grad_(value)


def native_to_lora(model: PeftModel, adapter_name: str = "default") -> LoraFile:
    """An adapter of native experts as a plain PEFT LoRA, which makes the same outputs there; see `save_lora`.

    Raises:
        ValueError: the adapter has routed linears, or no native experts.
    """
    config = model.peft_config[adapter_name]
    layers = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    if routed := [name for name, module in layers.items() if not isinstance(module, ParamWrapper)]:
        raise ValueError(
            f"adapter {adapter_name!r} has experts of `{routed[0]}`, which a router weighs for each token: no plain "
            "LoRA computes that. Only adapters of `target_parameters` alone (target_modules=[]) become one"
        )
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} adapts no native experts; set `target_parameters`")
    factors = {
        name: (layer.lora_A[adapter_name].weight.detach().cpu(), layer.lora_B[adapter_name].weight.detach().cpu())
        for name, layer in layers.items()
    }
    settings = _settings(config) | {"target_modules": [], "inference_mode": True}
    return LoraFile(f"adapter {adapter_name}", LoraConfig(**settings), factors)


def _is_of_linear(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and not isinstance(module, PeftParamWrapper)


def _settings(config: LoraConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in settable_fields(LoraConfig)}
