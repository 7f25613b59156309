"""Names of linears that transformers 5 has fused into parameters, turned into names of these parameters.

What was `experts.3.w1` in transformers 4 is a slice of `experts.gate_up_proj` now. PEFT turns the names for its LoRA
alone; which linears became which parameter is read from its tables here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from ..config import MoELoraConfig, count_experts
from ._peft import names_before_fusion
from .native import bare, fused_parameters, matched_parameters, short_name
from .saved_modules import around, saved_whole, wrapped_already

ALL_LINEAR = "all-linear"

IsTarget = Callable[[MoELoraConfig, str], bool]
"""Whether a configuration's `target_modules` are for a module of this name."""


def reach_native_experts(model: nn.Module, adapter_name: str, config: MoELoraConfig, is_target: IsTarget) -> None:
    """Add to config's `target_parameters` those that its `target_modules` mean by names of transformers 4, or by
    "all-linear", and that are not in modules to save; say which native experts were meant and stay frozen.

    As with PEFT's LoRA, a parameter of several fused linears gets the rank of them all. An adapter that is one expert
    of a mixture has no part in parameters: no router of ours would weigh it.

    Raises:
        ValueError: some of the linears that were fused into one parameter are meant, and others are not.
    """
    if config.target_parameters:
        config.target_parameters = _qualified(model, config.target_parameters)
    whole = [*saved_whole(model, config), *wrapped_already(model)]  # in which PEFT adapts no linears either
    fused = [name for name in fused_parameters(model) if around(name.rpartition(".")[0], whole) is None]
    if not fused:
        return
    is_one = config.use_moe_routing and count_experts(adapter_name, config) == 1
    if not is_one:
        _turn_names(model, config, fused, is_target)
    _warn_of_frozen(model, config, fused, is_target, is_one)


def _turn_names(model: nn.Module, config: MoELoraConfig, fused: Collection[str], is_target: IsTarget) -> None:
    asks = _asks(config, is_target)
    meant: dict[str, int] = {}  # how many linears became the parameter
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in fused):
        for new, old in _names_of(model, owner).items():
            if new.endswith(".weight") or f"{owner}.{new}" in fused:
                meant |= _meant(owner, new, old, asks)
    _target(model, config, meant)


def _asks(config: MoELoraConfig, is_target: IsTarget) -> Callable[[str], bool]:
    """Whether `target_modules` are for a linear of this name, which the model no longer has."""

    def asks(name: str) -> bool:
        if config.target_modules is None:
            return False
        if not _is_all_linear(config):
            return is_target(config, name)
        own = copy.copy(config)  # what it excludes stays out
        own.target_modules = {name}
        return is_target(own, name)

    return asks


def _is_all_linear(config: MoELoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def _names_of(model: Any, owner: str) -> dict[str, tuple[str, ...]]:
    """What was fused into the parameters of a module of native experts."""
    configs = (getattr(_module(model, owner), "config", None), getattr(model, "config", None))
    names = (names_before_fusion(getattr(config, "model_type", "")) for config in configs)
    return next((found for found in names if found), {})


def _module(model: nn.Module, name: str) -> Any:
    return next((module for full, module in reversed(list(model.named_modules())) if bare(full) == name), None)


def _meant(owner: str, new: str, old: tuple[str, ...], asks: Callable[[str], bool]) -> dict[str, int]:
    """The parameter `new` of the native experts `owner`, or of the router beside them, if its linears are meant."""
    parent, _, experts = owner.rpartition(".")
    if new.endswith(".weight"):
        return {f"{parent}.{new}": 1} if asks(f"{parent}.{new.removesuffix('.weight')}") else {}
    places = (f"{owner}.0", owner, f"{parent.rpartition('.')[0]}.block_sparse_moe.{experts}.0")
    found = [name for name in old if any(asks(f"{place}.{name}") for place in places)]
    if found and len(found) < len(old):
        missing = ", ".join(name for name in old if name not in found)
        raise ValueError(
            f"`target_modules` has {', '.join(found)} and not {missing} of `{owner}`, which are one parameter now "
            f"(`{new}`); name all of them, or none"
        )
    return {f"{owner}.{new}": len(old)} if found else {}


def _target(model: nn.Module, config: MoELoraConfig, meant: dict[str, int]) -> None:
    there = matched_parameters(model, meant)
    names = [name for name, (module, _) in there.items() if not isinstance(module, nn.Linear)]
    if not names:
        return
    config.target_parameters = sorted({*(config.target_parameters or ()), *_shortened(names, _alike(model, names))})
    for name in names:
        if meant[name] > 1:
            pattern = rf".*\.{name.rpartition('.')[2]}"
            config.rank_pattern = config.rank_pattern | {pattern: config.r * meant[name]}
            config.alpha_pattern = config.alpha_pattern | {pattern: config.lora_alpha * meant[name]}


def _qualified(model: nn.Module, targets: Collection[str]) -> list[str]:
    """Names of parameters with those of the modules that hold them: by these alone a checkpoint's tensors can be told
    from a linear's."""
    found = {target: matched_parameters(model, [target]) if "." not in target else {} for target in targets}
    return sorted({name for target, own in found.items() for name in (map(short_name, own) if own else [target])})


def _alike(model: nn.Module, names: Iterable[str]) -> Collection[str]:
    return matched_parameters(model, {short_name(name) for name in names})


def _shortened(names: Collection[str], alike: Collection[str]) -> set[str]:
    """Names without their block, where all blocks' are among them."""
    left_out = {short_name(name) for name in alike if name not in names}
    return {name if short_name(name) in left_out else short_name(name) for name in names}


def _warn_of_frozen(
    model: nn.Module, config: MoELoraConfig, fused: Collection[str], is_target: IsTarget, is_one: bool
) -> None:
    if not _means_experts(model, config):
        return
    adapted = {name.rpartition(".")[0] for name in matched_parameters(model, config.target_parameters or ())}
    owners = {name.rpartition(".")[0] for name in fused} - adapted
    left = {owner for owner in owners if _is_left(config, owner, is_target)}
    frozen = [name for name in fused if name.rpartition(".")[0] in left]
    if not frozen:
        return
    named = list(dict.fromkeys(name.rpartition(".")[0] for name in frozen))
    more = f" and {len(named) - 2} more" if len(named) > 2 else ""
    fields = sorted({short_name(name).rpartition(".")[0] if is_one else short_name(name) for name in frozen})
    adapts = f"name {fields} in `target_modules` too" if is_one else f"pass target_parameters={fields}"
    warnings.warn(
        f"the native experts of {', '.join(named[:2])}{more} stay frozen: transformers keeps them in parameters, "
        f"which `target_modules` does not reach; to adapt them {adapts}",
        stacklevel=2,
    )


def _is_left(config: MoELoraConfig, owner: str, is_target: IsTarget) -> bool:
    """Whether these native experts are neither adapted as a module nor left out on purpose, by `exclude_modules` or
    `layers_to_transform`."""
    own = copy.copy(config)
    own.target_modules = {owner.rpartition(".")[2]}
    return is_target(own, owner) and (_is_all_linear(config) or not is_target(config, owner))


def _means_experts(model: nn.Module, config: MoELoraConfig) -> bool:
    """Whether "all-linear" was said, or `target_modules` has a name that no module has, or speaks of experts."""
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return targets is not None and (_is_all_linear(config) or "expert" in targets)
    names = [bare(name) for name, _ in model.named_modules()]
    return any(not any(name == target or name.endswith(f".{target}") for name in names) for target in targets)
