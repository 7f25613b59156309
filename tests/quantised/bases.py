"""Quantised bases of every kind under test; they need the packages that `make engines` installs on the path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

Device = torch.device | None  # None: the CPU where there is no GPU; ZeRO-3 loads with nothing else


def _bitsandbytes_4bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # engines shard only parameters of the dtype of the rest
    )


def _torchao(name: str, **options: Any) -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)(**options))


def _quanto(weights: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


KINDS = {
    "bnb-nf4": _bitsandbytes_4bit,
    "bnb-int8": lambda _: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda _: _torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda _: _torchao("Int4WeightOnlyConfig", group_size=32, int4_packing_format="tile_packed_to_4d"),
    "quanto-int8": lambda _: _quanto("int8"),
    "quanto-int4": lambda _: _quanto("int4"),
}


def prepared_base(folder: Path, kind: str, dtype: torch.dtype, device: Device = None) -> Any:
    """The model saved in folder, quantised, computing in dtype, and prepared for training as PEFT's guide says."""
    base = _load(folder, kind, dtype, device)
    if kind.startswith("quanto") and dtype != torch.float32:
        return base  # PEFT 0.21 casts all to float32, which quanto's weights refuse; it freezes the base later anyway
    return prepare_model_for_kbit_training(base)


def _load(folder: Path, kind: str, dtype: torch.dtype, device: Device) -> Any:
    # torchao's 4-bit product is made of bfloat16.
    options = {"dtype": torch.bfloat16 if kind == "torchao-int4" else dtype, "device_map": device}
    if kind == "hqq":
        return _with_hqq_linears(AutoModelForCausalLM.from_pretrained(folder, **options), dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind](dtype), **options)
    for module in model.modules():
        # bitsandbytes 0.50 repacks 4-bit weights for evaluation on CPUs with AVX512-BF16, and a backward pass
        # afterwards reads them as if it had not, under PEFT's own LoRA too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _with_hqq_linears(model: Any, dtype: torch.dtype) -> Any:
    """transformers 5.23 does not load HQQ ("not available yet"), so its linears are put in by hand."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            quantised = HQQLinear(linear, BaseQuantizeConfig(4, 64), compute_dtype=dtype, device=str(model.device))
            model.model.set_submodule(name, quantised)
    model.hqq_quantized = True  # as hqq's own loader marks it, for PEFT
    return model
