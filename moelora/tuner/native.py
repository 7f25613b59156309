"""LoRA on a base that is a mixture itself, and keeps the experts of a block in three-dimensional parameters.

Two layouts. Low-rank pairs for each native expert, weighed by the base's own router ([`ParamWrapper`], what
`target_parameters` asks for); and experts of ours beside the native ones, weighed by our router ([`ExpertsLora`], where
`target_modules` names the module of the native experts).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import peft.tuners.lora as peft_lora
import torch
from torch import Tensor, nn

from ..config import MoELoraConfig, count_experts
from ..ops.native import NativePairs, first_parameter, is_native, native_experts
from ._peft import BaseTunerLayer, ExpertsLora
from .shared_factor import SharedFactor


class ParamWrapper(peft_lora.ParamWrapper):
    """PEFT's wrapper of one parameter, computed without the sum of weight and delta where the module's form is known.

    1. Sort the tokens by the native expert that the base's router chose for them.
    2. Each product with a parameter is a grouped one, with its pairs' beside it: [`moelora.ops.native.native_experts`].
    3. Weigh and add up by the base's own weights.

    It computes as PEFT does where experts are merged or switched off, or where somebody watches or replaces the forward
    of the native experts. PEFT nests one wrapper in another for each parameter of a module, and finds them by the name
    of their class; so the outermost computes, and the class is called as PEFT's is.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class. x [T, D], then the native experts of each token and their weights [T, K] -> [T, D]."""
        experts: Any = self.get_base_layer()
        wrappers = list(_nested(self))
        if x.dim() != 2 or len(args) != 2 or kwargs or not _computes_natively(experts, wrappers):
            return super().forward(x, *args, **kwargs)
        return native_experts(experts, {wrapper.parameter_name: _pairs(wrapper) for wrapper in wrappers}, x, *args)


def refuse_replaced_forward(layer: nn.Module, args: tuple) -> None:
    """Forward pre-hook on what adapts native experts, in whose place Liger puts a kernel for frozen ones.

    Raises:
        ValueError: it did.
    """
    if getattr(layer.__dict__.get("forward"), "__module__", "").startswith("liger_kernel"):
        raise ValueError(
            "Liger's kernel for native experts took the place of adapted ones, and would pass what they learn over: "
            'switch it off (Trainer: liger_kernel_config={"swiglu": False}), or leave native experts frozen '
            r"(exclude_modules=r'.*\.(experts|gate)\b.*')"
        )


def _nested(wrapper: nn.Module) -> Iterator[Any]:
    while isinstance(wrapper, peft_lora.ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def _pairs(wrapper: Any) -> list[NativePairs]:
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    return [_pair(wrapper.lora_A[name], wrapper.lora_B[name], wrapper.scaling[name]) for name in names]


def _pair(lora_A: Any, lora_B: Any, scaling: float) -> NativePairs:
    shares_A, shares_B = (isinstance(factor, SharedFactor) for factor in (lora_A, lora_B))
    A, B = (factor.shared if isinstance(factor, SharedFactor) else factor.weight for factor in (lora_A, lora_B))
    return NativePairs(A, B, scaling, shares_A, shares_B)


def _computes_natively(experts: Any, wrappers: Collection[Any]) -> bool:
    if not is_native(experts) or any(wrapper.disable_adapters or wrapper.merged for wrapper in wrappers):
        return False
    if any(wrapper.parameter_name not in (first_parameter(experts), "down_proj") for wrapper in wrappers):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in experts.__dict__ and not any(experts.__dict__[name] for name in hooks)


NO_MERGE = (
    "cannot merge: experts beside a base's native ones act on what enters and leaves these, and no single weight there "
    "could hold them; keep the adapter beside the model"
)


def has_experts_beside(model: nn.Module) -> bool:
    """Whether experts of ours act beside native ones."""
    return any(isinstance(module, ExpertsLora) for module in model.modules())


def has_native_adapters(model: nn.Module) -> bool:
    """Whether native experts are adapted, in either layout."""
    return any(isinstance(module, (ParamWrapper, ExpertsLora)) for module in model.modules())


def fused_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that hold a base's native experts, by name: of all experts, one of a kind (DBRX: side by side)."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Expert" in kind and "Router" not in kind and not isinstance(module, BaseTunerLayer):
            own = {key: value for key, value in module.named_parameters(recurse=False) if "bias" not in key}
            found |= {f"{bare(name)}.{key}": value for key, value in own.items() if value.dim() in (2, 3)}
    return found


def matched_parameters(model: nn.Module, targets: Collection[str]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The parameters that these names are for, as PEFT finds them: by name, with the modules that hold them."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        for key, value in module.named_parameters(recurse=False):
            full = f"{bare(name)}.{key}"
            if full in targets or any(full.endswith(f".{target}") for target in targets):
                found[full] = (module, value)
        for key in getattr(module, "parametrizations", ()):  # of quantised ones, say; PEFT wants the whole name
            if (full := f"{bare(name)}.{key}") in targets:
                found[full] = (module, getattr(module, key))
    return found


def bare(name: str) -> str:
    """A module's name as it was before adapters."""
    return name.replace(".base_layer", "")


def check_parameters(model: nn.Module, adapter_name: str, config: MoELoraConfig, modules: Collection[str]) -> None:
    """Refuse what `target_parameters` cannot have, before anything is changed.

    Args:
        modules: names of the modules that `target_modules` is for.

    Raises:
        ValueError: naming the field, the value and the fix.
    """
    targets = config.target_parameters
    if not targets:
        return
    _check_options(adapter_name, config)
    found = matched_parameters(model, targets)
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in found):
            known = ", ".join(repr(name) for name in sorted({short_name(each) for each in fused_parameters(model)}))
            raise ValueError(
                f"`target_parameters` ({target!r}) names no parameter of the model; "
                + (f"its native experts are {known}" if known else "it has no native experts; use `target_modules`")
            )
    for name, (_, value) in found.items():
        owner = name.rpartition(".")[0]
        if not owner:
            raise ValueError(
                "Targeting an nn.Parameter on the top-level module is not supported "
                f"(parameter {name.removeprefix('.')!r}), by PEFT; name one of its modules'"
            )
        if owner in modules:
            raise ValueError(
                f"`{owner}` is in `target_modules` and holds `{name}` of `target_parameters`: both would be one layer; "
                "leave one of them out (`exclude_modules`)"
            )
        if value.dim() not in (2, 3):
            raise ValueError(
                f"`{name}` of `target_parameters` has {value.dim()} dimensions; only 2 and 3 can be adapted"
            )
        if value.dtype not in _DTYPES:
            raise ValueError(
                f"`{name}` of `target_parameters` is quantised ({value.dtype}), which low-rank pairs cannot be added "
                "to; load the base in bfloat16 or float32 (or dequantised), or leave it out"
            )


def check_layout(model: nn.Module, adapter_name: str, config: MoELoraConfig, modules: Collection[str]) -> None:
    """Refuse a layout of native experts, or of another parameter, beside the other one: both would be one layer.

    Args:
        modules: names of the modules that `target_modules` is for.

    Raises:
        ValueError: naming the module and the fix.
    """
    owners = {name.rpartition(".")[0] for name in matched_parameters(model, config.target_parameters or ())}
    layouts = (("target_modules", modules, peft_lora.ParamWrapper), ("target_parameters", owners, ExpertsLora))
    for field, names, other in layouts:
        if taken := next((name for name in names if isinstance(model.get_submodule(name), other)), None):
            theirs = "target_parameters" if field == "target_modules" else "target_modules"
            raise ValueError(
                f"`{taken}`, which `{field}` of adapter {adapter_name!r} is for, is adapted by `{theirs}` of another "
                "adapter already, and a layer can be adapted in one way: ask for it in the same field"
            )


def share_outer_factors(model: nn.Module, adapter_name: str, config: MoELoraConfig) -> None:
    """Put an adapter's pairs of native experts into the shared-outer layout, where it asks for it.

    Raises:
        ValueError: it adapts no native experts, or some that do not describe themselves.
    """
    if not config.share_native_outer:
        return
    if not config.use_moe_routing:
        raise ValueError(
            "`share_native_outer` (True) does not go with `use_moe_routing=False`, which is PEFT's own LoRA: it has no "
            "factor that experts share; leave one of them out"
        )
    found = 0
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ParamWrapper) or adapter_name not in wrapper.lora_A:
            continue
        experts = wrapper.get_base_layer()
        if wrapper.get_param().dim() != 3:
            continue  # such as the base's router
        if not is_native(experts) or wrapper.parameter_name not in (first_parameter(experts), "down_proj"):
            raise ValueError(
                f"`share_native_outer` (True) needs native experts that say which factor is on the hidden side, as "
                f"transformers' `use_experts_implementation` does; `{bare(name)}.{wrapper.parameter_name}` does "
                "not: leave the field out"
            )
        _share(wrapper, adapter_name)
        found += 1
    if not found:
        raise ValueError(
            f"`share_native_outer` (True) has nothing to act on: adapter {adapter_name!r} adapts no native experts; "
            "name some in `target_parameters`, or leave it out"
        )


def _share(wrapper: ParamWrapper, adapter_name: str) -> None:
    is_lora_A = wrapper.parameter_name != "down_proj"
    factors = wrapper.lora_A if is_lora_A else wrapper.lora_B
    factors[adapter_name] = SharedFactor(factors[adapter_name], wrapper.num_experts, is_lora_A)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_options(adapter_name: str, config: MoELoraConfig) -> None:
    if count_experts(adapter_name, config) == 1:
        raise ValueError(
            f"adapter {adapter_name!r} is one expert of a mixture, and `target_parameters` adapts experts that the "
            "base's own router weighs: no router of ours would weigh this one's part; give the adapter another name, "
            "or leave `target_parameters` out"
        )
    for field in ("lora_dropout", "fan_in_fan_out"):
        if value := getattr(config, field):
            raise ValueError(
                f"`{field}` ({value!r}) does not go with `target_parameters` {sorted(config.target_parameters or ())}: "
                "PEFT's LoRA of a parameter has none; leave one of them out, by "
                r"exclude_modules='.*\.(experts|gate)\b.*' where 'all-linear' reaches them"
            )


def patterns_are_for_parameters(model: nn.Module, config: MoELoraConfig) -> bool:
    """Whether every pattern of ranks and alphas is for a parameter: PEFT looks among modules, and warns of the rest."""
    patterns = {*config.rank_pattern, *config.alpha_pattern}
    if not config.target_parameters or not patterns:
        return False
    names = matched_parameters(model, config.target_parameters)
    return all(any(re.match(rf"(.*\.)?({pattern})$", name) for name in names) for pattern in patterns)


def short_name(parameter: str) -> str:
    """The end of a native parameter's name that other blocks have too: "mlp.experts.down_proj"."""
    return ".".join(parameter.split(".")[-3:])
