"""Experts of other mixtures: what of PEFT's X-LoRA and of MixLoRA carries over, and what does not.

Neither's routing does. Each expert by itself does, exactly, and comes out as a plain LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig
from torch import Tensor
from transformers import PretrainedConfig

from ..files.opening import expand_user
from ..recipe import plain_name
from ..storage.lora_file import (
    LoraError,
    LoraFile,
    check_carries_over,
    factors_of,
    read_config,
    read_lora,
    read_tensors,
)

_LAYER = r"mixlora\.layers\.(?P<layer>\d+)"
_MIXLORA_KEYS = (
    re.compile(_LAYER + r"\.(?P<module>self_attn\.\w+)\.(?P<factor>lora_[AB])\.weight"),
    re.compile(_LAYER + r"\.(?P<module>mlp\.\w+)\.experts\.(?P<expert>\d+)\.(?P<factor>lora_[AB])\.weight"),
    re.compile(_LAYER + r"\.experts\.(?P<expert>\d+)\.(?P<module>\w+)\.(?P<factor>lora_[AB])\.weight"),  # until 2024
)
_MIXLORA_ROUTER = re.compile(_LAYER + r"\.(mlp\.moe_gate|gate)\.weight")
_OLD_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}


@dataclass(frozen=True)
class Migration:
    """The experts of another mixture.

    Attributes:
        experts: plain LoRAs by name.
        lost: sentences on what does not carry over.
        activation: what the experts' FFNs use, where the checkpoint says so.
    """

    experts: dict[str, LoraFile]
    lost: list[str]
    activation: str | None = None

    def check_base(self, config: PretrainedConfig) -> None:
        """Raise LoraError where the base model's FFN has another activation than the experts had."""
        there = getattr(config.get_text_config(), "hidden_act", None)
        if self.activation is not None and there is not None and self.activation != there:
            raise LoraError(
                f"the experts' FFNs use the activation `act_fn` ({self.activation!r}), the base model's {there!r}: no "
                "LoRA on this base model equals one of them"
            )


def experts_of(path_or_id: str | Path) -> Migration:
    """Take the experts, by folder or hub id, out of an X-LoRA or MixLoRA checkpoint.

    Raises:
        LoraError: it is neither, it is damaged, or an expert by itself would not be what it was.
    """
    source = str(path_or_id)
    settings = read_config(source)
    try:
        local = expand_user(source)
        folder = local if local.is_dir() else Path(snapshot_download(source))
    except (OSError, ValueError) as error:
        raise LoraError(f"{source}: cannot be had from the hub: {error}") from error
    if settings.get("peft_type") == "XLORA":
        return _from_xlora(folder, settings)
    if settings.get("peft_type") == "MIXLORA" or settings.get("routing_strategy") in ("mixlora", "mixtral"):
        return _from_mixlora(folder, settings)
    raise LoraError(f"{source}: `peft_type` is {settings.get('peft_type')!r}, neither 'XLORA' nor 'MIXLORA'")


# ---- PEFT X-LoRA (arXiv:2402.07148) ----------------------------------------------------------------------------------


def _from_xlora(folder: Path, settings: Mapping[str, Any]) -> Migration:
    scale = settings.get("global_scaling_weight", 1.0)
    if scale != 1.0:
        raise LoraError(
            f"{folder}: `global_scaling_weight` ({scale}) multiplies every expert and does not carry over; multiply "
            "`lora_alpha` in each expert's adapter_config.json by it, set it to 1 and try again"
        )
    adapters = settings.get("adapters") or {}
    if not adapters:
        raise LoraError(f"{folder}: its configuration lists no `adapters`; restore it from a copy")
    is_frozen = not settings.get("use_trainable_adapters")
    experts = {
        _adapter_name(name): _first_that_reads([folder / name, *([Path(given)] if is_frozen else [])])
        for name, given in adapters.items()
    }
    unit = "linear" if settings.get("layerwise_scalings") else "expert"
    classifier = (
        "Does not carry over: the classifier (internal_xlora_classifier). It reads the base model's last hidden states "
        f"in a first pass and sets one weight per token and {unit} for a second; routers here read what enters each "
        "block, or linear, in the only pass there is."
    )
    return Migration(experts, [classifier])


def _first_that_reads(places: Sequence[Path]) -> LoraFile:
    """An X-LoRA's expert: in a sub-folder, or where it came from.

    PEFT 0.21 saves the sub-folders wrongly (it takes layer 0 for a part of the adapter "0"): they hold base weights and
    lack layers. Experts that were frozen are then still where the configuration says that they were; others are lost.
    """
    failures = []
    for place in places:
        try:
            return read_lora(place)
        except LoraError as error:
            failures.append(str(error))
    raise LoraError("no expert of the X-LoRA is whole: " + "; ".join(failures))


def _adapter_name(name: str) -> str:
    return f"expert_{name}" if plain_name(name) else name


# ---- MixLoRA (arXiv:2404.15159), as TUDB-Labs/MixLoRA and mLoRA write it ---------------------------------------------


def _from_mixlora(folder: Path, settings: dict[str, Any]) -> Migration:
    num_experts = settings.get("num_experts")
    if not isinstance(num_experts, int) or num_experts < 1:
        raise LoraError(
            f"{folder}: `num_experts` ({num_experts!r}) is no number of experts; restore adapter_config.json"
        )
    tensors = read_tensors(str(folder))
    shared, per_expert = _sorted_tensors(folder, tensors, num_experts)
    config = {name: settings.get(name, default) for name, default in _LORA_FIELDS.items()}
    experts = {}
    for expert, own in enumerate(per_expert):
        factors = factors_of(f"{folder}, expert {expert}", shared | own)
        lora_config = _expert_config(config, settings.get("expert_lora") or {}, factors)
        check_carries_over(str(folder), lora_config)
        experts[f"expert_{expert}"] = LoraFile(f"{folder}, expert {expert}", lora_config, factors)
    return Migration(experts, _mixlora_losses(settings), settings.get("act_fn"))


_LORA_FIELDS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "task_type": None,
    "base_model_name_or_path": None,
}


def _sorted_tensors(
    folder: Path, tensors: Mapping[str, Tensor], num_experts: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The attention's factors, which all experts share, and each expert's own; by PEFT's names."""
    shared: dict[str, Tensor] = {}
    per_expert: list[dict[str, Tensor]] = [{} for _ in range(num_experts)]
    for key, tensor in tensors.items():
        if _MIXLORA_ROUTER.fullmatch(key):
            continue
        match = next((match for pattern in _MIXLORA_KEYS if (match := pattern.fullmatch(key))), None)
        number = match.groupdict().get("expert") if match else None
        if match is None or (number is not None and int(number) >= num_experts):
            raise LoraError(
                f"{folder}: `{key}` has no place in a MixLoRA of {num_experts} experts; restore it from a copy"
            )
        module = match["module"]
        if "." not in module:
            module = f"mlp.{_OLD_NAMES.get(module, module)}"
        name = f"base_model.model.model.layers.{match['layer']}.{module}.{match['factor']}.weight"
        (shared if number is None else per_expert[int(number)])[name] = tensor
    return shared, per_expert


def _expert_config(config: Mapping[str, Any], of_ffn: Mapping[str, Any], factors: Mapping[str, Any]) -> LoraConfig:
    """One expert's configuration; the FFN's rank and alpha may be others than the attention's."""
    targets = {".".join(name.split(".")[-2:]) for name in factors}  # self_attn.q_proj, mlp.up_proj
    ffn = sorted(target for target in targets if target.startswith("mlp."))
    if of_ffn.get("use_rslora", config["use_rslora"]) != config["use_rslora"]:
        raise LoraError("`use_rslora` differs between `expert_lora` and the rest, which one LoRA cannot express")
    patterns = {
        "rank_pattern": dict.fromkeys(ffn, of_ffn.get("r", config["r"])),
        "alpha_pattern": dict.fromkeys(ffn, of_ffn.get("lora_alpha", config["lora_alpha"])),
    }
    return LoraConfig(**config, **patterns, target_modules=sorted(targets))


def _mixlora_losses(settings: Mapping[str, Any]) -> list[str]:
    return [
        "Does not carry over: the routers (moe_gate). They read what enters the FFN, after its norm; routers here read "
        "what enters the block, or each linear.",
        f"Does not carry over: how {settings.get('top_k', 2)} experts are mixed. MixLoRA runs a whole FFN for each and "
        "adds up their outputs; here deltas are added in each linear, before the activation. The two agree only for "
        "tokens that one expert has to itself. Each expert here is the attention's LoRA with that expert's FFN.",
    ]
