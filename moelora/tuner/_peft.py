"""The only place that touches private parts of PEFT.

PEFT's tuner contract is made of underscore methods, so this file holds the overrides and translates each into a public
method of ours. tests/test_peft_contract.py checks every name and signature used here and says which one changed.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import PeftType, register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import Tensor, nn

from ..config import SWAPPED_ALIKE, MoELoraConfig
from ..ops.native import native_width
from ..peft_type import MOELORA

__all__ = [
    "BaseTunerLayer",
    "ExpertsLora",
    "LoraLayer",
    "RouterTunerLayer",
    "TunerModel",
    "lora_prefix",
    "names_before_fusion",
    "register",
]

lora_prefix = "lora_"


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT and transformers know the method, and export its classes beside PEFT's own; repeating is harmless."""
    if MOELORA not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="moelora", config_cls=config_cls, model_cls=model_cls, prefix=lora_prefix)
    CONFIG_KEYS_TO_CHECK[MOELORA] = list(SWAPPED_ALIKE)
    for module in (peft, peft.tuners, peft.tuners.lora):
        for cls in (config_cls, model_cls):
            setattr(module, cls.__name__, cls)


class _NoScaling:
    """What a router has in the place of scalings: hot-swapping reads and writes them, and nothing keeps what it writes.

    It is no dict and has no keys: whoever goes through what an adapter has in each layer finds nothing here.
    """

    def __getitem__(self, adapter_name: str) -> float:
        return 1.0

    def __setitem__(self, adapter_name: str, scaling: float) -> None:
        pass

    def __contains__(self, adapter_name: object) -> bool:
        raise ValueError(
            "PEFT's `create_lorafa_optimizer` takes routers for factors; use `moelora.training.create_lorafa_optimizer`"
        )


class RouterTunerLayer(BaseTunerLayer):
    """A tuner layer without a base layer: it holds routers, so PEFT switches, freezes, casts and saves them."""

    cast_input_dtype_enabled = True  # PEFT sets it on every layer; routers read whatever comes, in float32

    @property
    def scaling(self) -> _NoScaling:
        """Of no adapter: routers have none."""
        return _NoScaling()

    def get_base_layer(self) -> nn.Module:
        raise AttributeError("a router wraps no base layer")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self.move_adapter(adapter_name, device)

    def scale_layer(self, scale: float) -> None:
        """PEFT and diffusers scale all layers; a router has nothing to scale."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `scale_layer`."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """See `scale_layer`."""

    @abstractmethod
    def move_adapter(self, adapter_name: str, device: torch.device | None) -> None:
        """Move one adapter's router to where it is needed."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note what the layers merge: a model's status compares all tuner layers."""
        available = self._get_available_adapters()
        self.merged_adapters = [name for name in adapter_names or self.active_adapters if name in available]

    def unmerge(self) -> None:
        """Forget what was merged."""
        self.merged_adapters = []


class DiskOffload:
    """Mixed into a PeftModel: an adapter that is loaded onto a base of which a part lies on disk is kept there too."""

    @abstractmethod
    def keep_routers_on_disk(self, offload_index: dict[str, dict[str, str]]) -> None:
        """Note in accelerate's index where the routers are; PEFT notes the layers."""

    def _update_offload(self, offload_index: dict[str, dict[str, str]] | None, adapters_weights: dict[str, Tensor]):
        super()._update_offload(offload_index, adapters_weights)  # type: ignore[misc]
        if offload_index:
            self.keep_routers_on_disk(offload_index)


class ExpertsLora(nn.Module, LoraLayer):
    """Factors from what enters the native experts of a block to what leaves them; alone, it computes what these do."""

    base_layer: Any
    lora_A: Any
    lora_B: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **_: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        width = native_width(module)
        return width, width

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = next(self.base_layer.parameters())
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and not factors[adapter_name].weight.is_meta:
                factors[adapter_name].to(device or weight.device, weight.dtype)


def names_before_fusion(model_type: str) -> dict[str, tuple[str, ...]]:
    """What linears of transformers 4 became a parameter of a mixture, by that parameter's name; none if none did.

    Example:
        >>> names_before_fusion("mixtral")["gate_up_proj"]
        ('w1', 'w3')
    """
    from peft.utils.transformers_weight_conversion import (  # late, as PEFT does: it loads much, for few models
        _MODEL_TO_CONVERSION_PATTERN,
        _MOE_FUSED_TARGETS,
        _MOE_TARGET_MODULE_MAPPING,
    )

    family = _MODEL_TO_CONVERSION_PATTERN.get(model_type, model_type)
    names: dict[str, tuple[str, ...]] = {}
    for old, new in _MOE_TARGET_MODULE_MAPPING.get(family, {}).items():
        names.setdefault(new, tuple(_MOE_FUSED_TARGETS.get(family, {}).get(new, (old,))))
    return names


class TunerModel(LoraModel):
    """LoraModel with its private hooks translated into the public methods below."""

    @abstractmethod
    def check_adapter(self, adapter_name: str, config: MoELoraConfig) -> None:
        """Raise for an adapter that cannot be saved and loaded whole, before any module is replaced."""

    @abstractmethod
    def check_targets(self, adapter_name: str, config: MoELoraConfig, module_names: list[str]) -> None:
        """Raise for targets that cannot be routed, before any module is replaced."""

    @abstractmethod
    def stored(self, adapter_name: str, config: MoELoraConfig) -> MoELoraConfig:
        """The LoRA configuration that the layers are created with."""

    @abstractmethod
    def check_merge(self) -> None:
        """Raise where merging would change outputs."""

    @abstractmethod
    def forward_arguments(self, routing_weights: Tensor | None, adapter_names: list[str] | None = None) -> Any:
        """Context manager around a PeftModel's forward or generate."""

    @staticmethod
    def is_mixture_key(key: str) -> bool:
        """Whether a state dict key belongs to the mixture as a whole rather than to an adapter."""
        raise NotImplementedError

    @staticmethod
    def layer_class(target: nn.Module, config: MoELoraConfig) -> type[nn.Module] | None:
        """What adapts a module that PEFT has no layer for; None where it has."""
        raise NotImplementedError

    @staticmethod
    def prepare_layer(layer: nn.Module, config: MoELoraConfig, adapter_name: str) -> nn.Module:
        """Turn the layer that PEFT chose into a routed one."""
        raise NotImplementedError

    def is_target(self, config: MoELoraConfig, name: str) -> bool:
        """Whether `target_modules` is for a module of this name."""
        return bool(self._check_target_module_exists(config, name))

    def resolve_targets(self, config: MoELoraConfig) -> list[str]:
        """Names of the modules that injecting config would adapt."""
        config = copy.copy(config)  # PEFT resolves defaults and "all-linear" on the object itself
        config = self._prepare_adapter_config(config, self.get_model_config(self.model))
        config = _maybe_include_all_linear_layers(config, self.model)
        inside = tuple(f"{name}." for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer))
        return [
            name
            for name, _ in self.model.named_modules()
            if name and not name.startswith(inside) and self.is_target(config, name)
        ]

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        self.check_adapter(adapter_name, config)
        targets = self.resolve_targets(config) if config.use_moe_routing else []
        self._check_called(config, targets)
        self.check_targets(adapter_name, config, targets)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_called(self, config: MoELoraConfig, module_names: list[str]) -> None:
        """Raise for targets whose weights kernels read without calling them, so that experts there would do nothing."""
        for name in module_names:
            try:
                self._check_target_module_compatiblity(config, self.model, name.rpartition(".")[2])
            except ValueError as error:
                raise ValueError(
                    f'`{name}` cannot be adapted: {error} Under "all-linear", name it in `exclude_modules`.'
                ) from None

    def _check_target_module_compatiblity(self, peft_config, model, target_name):
        as_lora = copy.copy(peft_config)  # PEFT checks its own methods alone
        as_lora.peft_type = PeftType.LORA
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        is_parameter = kwargs.get("parameter_name") is not None  # of native experts, which are what they were in number
        stored = lora_config if is_parameter else self.stored(adapter_name, lora_config)
        if not is_parameter and (kind := self.layer_class(target, lora_config)) is not None:
            stored = copy.copy(stored)
            stored._register_custom_module({type(target): kind})
        super()._create_and_replace(stored, adapter_name, target, target_name, parent, current_key, **kwargs)
        self.prepare_layer(parent.get_submodule(target_name), lora_config, adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self.check_merge()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        routing_weights = kwargs.pop("routing_weights", None)
        with (
            self.forward_arguments(routing_weights, adapter_names=kwargs.get("adapter_names")),
            super()._enable_peft_forward_hooks(*args, **kwargs),
        ):
            yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key: value for key, value in selected.items() if not cls.is_mixture_key(key)}
