"""A mixture as it lies on disk: configuration and tensors, without PEFT, without the base model."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from ..config import MoELoraConfig, count_experts
from ..files.adapter_files import Place, check_tensors, read_adapter, read_config, refuse
from ..ops.native import is_native, native_width
from ..ops.pool import ExpertPool
from ..recipe import ModelOptions
from ..routing import Router
from ..schema import UserError
from .base_model import empty_model, load_config
from .finding import find_base, missing_adapter
from .loading import configurations
from .structure import check_structure, sort_tensors, split_factors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PROBLEMS_SHOWN = 3


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter: its experts in every linear, and the tensors of its routers.

    Attributes:
        position: its place in the mixture; None when it was inactive.
        pools: the experts by linear.
        routers: router tensors by router name; "" is the model's.
        num_parameters: numbers in its factors and router weights; counters and maturity are none.
        others: names of tensors that are neither factors of experts nor routers': those of native experts too, which
            the base's own router weighs.
    """

    name: str
    config: MoELoraConfig
    position: int | None
    num_experts: int
    pools: dict[str, ExpertPool] = field(default_factory=dict)
    routers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    num_parameters: int = 0
    others: list[str] = field(default_factory=list)

    def router(self, name: str) -> Router | None:
        """The router of that name with its weights, domain and biases; None where routing is fixed."""
        tensors = self.routers[name]
        if "weight" not in tensors:
            return None
        hidden, directions = tensors.get("hidden_weight"), tensors.get("memory_directions")
        width = tensors["weight" if hidden is None else "hidden_weight"].shape[1]
        built = cast(
            Router,
            self.config.router_kind.make(
                width,
                self.num_experts,
                router_hidden_size=None if hidden is None else hidden.shape[0],
                domain_rank=0 if directions is None else directions.shape[0],
                has_bias="selection_bias" in tensors,
            ),
        )
        exact = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        built.load_state_dict(exact, strict=False)
        return built


def read_mixture(folder: Path) -> list[StoredAdapter]:
    """The adapters that a folder holds: the active ones first, in expert order.

    Raises:
        UserError: there is no adapter, it is no mixture, it has no experts but a base's native ones, or its files are
            damaged, incomplete, of different saves, or hold weights that are not finite.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(missing_adapter(folder))
    try:
        return _read_mixture(folder)
    except ValueError as error:
        raise UserError(str(error)) from error


def _read_mixture(folder: Path) -> list[StoredAdapter]:
    settings = read_config(Place(str(folder)))
    if (kind := settings.get("peft_type")) != "MOELORA":
        raise ValueError(
            f"{folder / CONFIG_FILE}: `peft_type` is {kind!r}, not 'MOELORA'; give an adapter of moelora's"
        )
    if settings.get("use_moe_routing") is False:
        raise ValueError(f"{folder / CONFIG_FILE}: `use_moe_routing` is false: this is plain LoRA, without experts")
    files = read_adapter(folder)
    configs = configurations(files)
    entries = {entry["name"]: entry for entry in files.config.get("adapters") or []}
    weights = files.by_adapter(configs) if entries else {"default": files.weights}
    problems = [problem for name in configs for problem in check_structure(name, configs[name], weights[name])]
    if not problems and files.save_id is None:  # it says nothing of how much was saved
        problems = _against_base(folder, configs, weights)
    refuse(files.source, problems)
    files.refuse_damage()
    found = [
        stored_adapter(name, config, entries[name]["active"] if entries else 0, weights[name])
        for name, config in configs.items()
    ]
    if not any(adapter.pools for adapter in found):
        raise ValueError(
            f"{files.source} adapts a base's native experts alone (`target_parameters`), so there are no experts of "
            "ours to work on; as a plain LoRA it goes anywhere: moelora.experts.native_to_lora"
        )
    return sorted(found, key=lambda adapter: math.inf if adapter.position is None else adapter.position)


def _against_base(
    folder: Path, configs: Mapping[str, MoELoraConfig], weights: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    """What the tensors lack, or have too many, for the base model, if that lies on this machine."""
    try:
        base = find_base(folder, None)
        if not Path(base.name).is_dir():
            return []
        model = empty_model(load_config(base))
    except (UserError, ValueError, OSError):
        return []
    problems = []
    for name, config in configs.items():
        with torch.device("meta"):
            mixture = get_peft_model(model, copy.deepcopy(config), adapter_name=name)
        expected = get_peft_model_state_dict(mixture, adapter_name=name, save_embedding_layers=False)
        problems += check_tensors(name, weights[name], expected)
        model = mixture.unload()
    return problems


def stored_adapter(
    name: str, config: MoELoraConfig, position: int | None, weights: Mapping[str, Tensor]
) -> StoredAdapter:
    """An adapter whose tensors, by the names that PEFT saves them under, have been checked."""
    found, routers, others = sort_tensors(weights)
    factors, native = split_factors(config, found)
    others += [f"{module}.lora_{side}" for module, pair in native.items() for side in pair]
    num_experts = count_experts(name, config)
    pools = {}
    for module, pair in factors.items():
        scaling = scaling_of(config, module, pair["A"].shape[0] // num_experts)
        pools[module] = ExpertPool(pair["A"], pair["B"], num_experts, scaling, nn.Identity())
    counted = [tensors[key] for tensors in routers.values() for key in ("weight", "hidden_weight") if key in tensors]
    counted += [factor for pair in found.values() for factor in pair.values()]
    size = sum(tensor.numel() for tensor in counted)
    return StoredAdapter(name, config, position, num_experts, pools, dict(_sorted(routers)), size, others)


def scaling_of(config: MoELoraConfig, module: str, rank: int) -> float:
    """What multiplies B A, as PEFT computes it for an expert of this rank."""
    matching = (value for key, value in config.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, config.lora_alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def _sorted(routers: dict[str, Any]) -> list[tuple[str, Any]]:
    """By name as people count, layers.9 before layers.10: safetensors sorts by letters."""

    def key(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
        parts = item[0].split(".")
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(routers.items(), key=key)


def stacked(adapters: list[StoredAdapter], router: str, tensor: str) -> Tensor:
    """One of the routers' per-expert tensors [E], of all adapters; NaN where an adapter has no such router."""
    pieces = [
        adapter.routers.get(router, {}).get(tensor, torch.full((adapter.num_experts,), math.nan))
        for adapter in adapters
    ]
    return torch.cat([piece.double() for piece in pieces])


# ---- the base model --------------------------------------------------------------------------------------------------


def check_fit(stored: list[StoredAdapter], base: ModelOptions, adapter: Path) -> None:
    """Compare the adapter's factors with the linears of the base model, which is not loaded for that.

    Raises:
        UserError: the adapter was trained on another model.
    """
    shapes = {name: (pool.lora_B.shape[0], pool.lora_A.shape[1]) for one in stored for name, pool in one.pools.items()}
    if problem := misfit(shapes, empty_model(load_config(base))):
        trained_on = stored[0].config.base_model_name_or_path
        raise UserError(
            f"the adapter {adapter} was not trained on {base.name}: {problem}. Give its base model with --base"
            + (f"; it was {trained_on}" if trained_on else "")
        )


def misfit(shapes: Mapping[str, tuple[int, int]], model: nn.Module) -> str | None:
    """Where a model's linears differ from the shapes (out, in) that an adapter has for them; None if nowhere."""
    modules, problems = dict(model.named_modules()), []
    for name, wanted in shapes.items():
        there = _shape(modules.get(name))
        if there is None:
            problems.append(f"it has no linear `{name}`")
        elif there != wanted:
            problems.append(f"`{name}` is {there[1]} to {there[0]} wide, the adapter's {wanted[1]} to {wanted[0]}")
    more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
    return "; ".join(problems[:PROBLEMS_SHOWN]) + more if problems else None


def _shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear, of GPT-2's Conv1D or of native experts; None for what is none of them."""
    if module is not None and is_native(module):
        return native_width(module), native_width(module)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    return (weight.shape[1], weight.shape[0]) if hasattr(module, "nf") and weight is not None else None
