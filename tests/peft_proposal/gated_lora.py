"""A PEFT method of another package: a LoRA whose update an argument of forward scales. Public names of PEFT alone."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import PeftType, register_peft_method


@dataclass
class GatedConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.GATED


class GatedPeftModel(PeftModel):
    is_gated = True


class GatedModel(LoraModel):
    peft_forward_args = frozenset({"gate"})

    @classmethod
    def get_peft_model_class(cls, peft_model_cls):
        return type(f"Gated{peft_model_cls.__name__}", (GatedPeftModel, peft_model_cls), {})

    @contextmanager
    def forward_context(self, gate=1.0):
        scalings = [layer.scaling for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        before = [dict(scaling) for scaling in scalings]
        for scaling in scalings:
            scaling.update({name: value * gate for name, value in scaling.items()})
        yield
        for scaling, values in zip(scalings, before, strict=True):
            scaling.update(values)

    def check_adapter_targets(self, peft_config, adapter_name, target_names):
        if refused := [name for name in target_names if name.endswith("k_proj")]:
            raise ValueError(f"no gate for {refused[0]}")

    def get_layer_config(self, peft_config, adapter_name):
        stored = copy.copy(peft_config)
        stored.r = 2 * peft_config.r
        return stored

    def prepare_adapter_layer(self, layer, peft_config, adapter_name):
        layer.register_buffer("asked_rank", torch.tensor(peft_config.r))

    def check_merge_supported(self):
        raise ValueError("a gate cannot be merged")

    @classmethod
    def is_adapter_key(cls, key, adapter_name):
        return not key.endswith("asked_rank")


register_peft_method(name="gated", config_cls=GatedConfig, model_cls=GatedModel, prefix="lora_")
