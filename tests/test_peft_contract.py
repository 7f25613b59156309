"""The private parts of PEFT that moelora/tuner/_peft.py builds on. A failure here says which PEFT change broke it.

Everything else in moelora uses PEFT's public interface; test_only_one_file_touches_private_parts keeps it so.
"""

import ast
import inspect
from pathlib import Path

import peft
import pytest
from peft import PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer, LoraModel, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, hotswap, save_and_load, transformers_weight_conversion

import moelora

SIGNATURES = {
    "adapters are injected through it; targets are checked before": (
        BaseTuner.inject_adapter,
        ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    ),
    "layers are created through it; the stored rank is E * r": (
        LoraModel._create_and_replace,
        ["self", "lora_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"],
    ),
    "a new adapter's configuration is checked with it": (LoraModel._check_new_adapter_config, ["self", "config"]),
    "default target modules come from it": (LoraModel._prepare_adapter_config, ["self", "peft_config", "model_config"]),
    "targets are matched with it": (BaseTuner._check_target_module_exists, ["peft_config", "key"]),
    "targets that kernels bypass are refused by it": (
        BaseTuner._check_target_module_compatiblity,
        ["self", "peft_config", "model", "target_name"],
    ),
    '"all-linear" is expanded with it': (tuners_utils._maybe_include_all_linear_layers, ["peft_config", "model"]),
    "merging asks it first": (LoraModel._check_merge_allowed, ["self"]),
    "routing_weights= arrives through it": (LoraModel._enable_peft_forward_hooks, ["self", "args", "kwargs"]),
    "what an adapter saves is selected by it": (
        LoraModel._get_adapter_state_dict,
        ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
    ),
    "what a base on disk is adapted with is noted through it": (
        PeftModel._update_offload,
        ["self", "offload_index", "adapters_weights"],
    ),
    "routers are moved beside their layers by it": (
        BaseTunerLayer._move_adapter_to_device_of_base_layer,
        ["self", "adapter_name", "device"],
    ),
    "factors of native experts are as wide as what it says": (LoraLayer._get_in_out_features, ["self", "module"]),
    "native experts named as modules get a layer of ours by it": (
        peft.LoraConfig._register_custom_module,
        ["self", "mapping"],
    ),
    "routers and layers become active and trainable through it": (
        BaseTunerLayer.set_adapter,
        ["self", "adapter_names", "inference_mode"],
    ),
}


@pytest.mark.parametrize("purpose", SIGNATURES)
def test_signature(purpose):
    function, expected = SIGNATURES[purpose]
    actual = list(inspect.signature(function).parameters)
    name = function.__qualname__
    assert actual == expected, f"PEFT {peft.__version__} changed {name} ({purpose}): {actual}, expected {expected}"


def source_of(function):
    return inspect.getsource(function)


BEHAVIOUR = {
    "PeftModel.__init__ hands the tuner a dict": (PeftModel.__init__, "cls(model, {adapter_name: peft_config}"),
    "PeftModel strips its own forward arguments": (PeftModel.forward, "self.special_peft_forward_args"),
    "BaseTuner.set_adapter selects by tuner_layer_cls": (BaseTuner.set_adapter, "layer_cls=self.tuner_layer_cls"),
    "layer_cls is only passed to isinstance": (tuners_utils.set_adapter, "isinstance(module, layer_cls)"),
    "deletion skips names with the prefix": (tuners_utils.delete_adapter, "if prefix in key"),
    "saving delegates to the tuner": (save_and_load.get_peft_model_state_dict, "tuner_cls._get_adapter_state_dict("),
    "a method's list of what must be alike decides on hot-swapping": (
        hotswap.check_hotswap_configs_compatible,
        "CONFIG_KEYS_TO_CHECK[config0.peft_type]",
    ),
    "wrappers of parameters are found by the name of their class, which ours has": (
        BaseTuner._inject_parameters,
        '__class__.__name__ == "ParamWrapper"',
    ),
    "a parameter's name tells layers of parameters from those of modules": (
        BaseTuner._inject_parameters,
        "parameter_name=short_param_name",
    ),
    "expert-major A and rank-major B are the pairs of native experts": (
        ParamWrapper.get_delta_factors,
        "weight_B.reshape(weight_B.shape[0], -1, self.num_experts).permute(2, 0, 1)",
    ),
    "the tuner's own attributes are saved, `model` is not": (
        tuners_utils._get_tuner_state_dict_key_prefixes,
        '("base_layer", "model")',
    ),
}


@pytest.mark.parametrize("purpose", BEHAVIOUR)
def test_source_still_does(purpose):
    function, fragment = BEHAVIOUR[purpose]
    assert fragment in source_of(function), f"PEFT {peft.__version__}: no longer true that {purpose}"


def test_names_of_linears_that_were_fused():
    """moelora/tuner/native_names.py reads from these tables what became which parameter."""
    conversion = transformers_weight_conversion
    for family, old in (("mixtral", ["w1", "w3"]), ("qwen2_moe", ["gate_proj", "up_proj"])):
        assert conversion._MOE_FUSED_TARGETS[family] == {"gate_up_proj": old}
        names = conversion._MOE_TARGET_MODULE_MAPPING[family]
        assert {names[name] for name in old} == {"gate_up_proj"} and names["gate"] == "gate.weight"
    assert conversion._MODEL_TO_CONVERSION_PATTERN["qwen3_moe"] == "qwen2_moe"


def test_enum_has_the_internals_we_extend():
    for name in ("_member_names_", "_member_map_", "_value2member_map_"):
        assert "MOELORA" in getattr(PeftType, name), f"PeftType.{name} changed"
    assert PeftType("MOELORA") is PeftType.MOELORA is PeftType["MOELORA"]
    assert PeftType.MOELORA.value == "MOELORA"
    assert PeftType.MOELORA in list(PeftType)


def private_names(path):
    """Underscore attributes of foreign modules imported by name, or overridden in PEFT's classes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE_METHODS:
            yield node.attr
        if isinstance(node, ast.FunctionDef) and node.name in PRIVATE_METHODS:
            yield node.name


PRIVATE_METHODS = {
    name
    for cls in (LoraModel, BaseTuner, BaseTunerLayer, PeftModel, peft.LoraConfig)
    for name in dir(cls)
    if name.startswith("_") and not name.startswith("__") and not hasattr(__import__("torch").nn.Module, name)
}


def test_only_one_file_touches_private_parts():
    package = Path(moelora.__file__).parent
    offenders = {
        str(path.relative_to(package)): sorted(found)
        for path in package.rglob("*.py")
        if path.name != "_peft.py" and (found := set(private_names(path)))
    }
    assert offenders == {}
