"""A mixture as it lies on disk: configuration and tensors, without PEFT, without the base model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import MoELoraConfig, check_entries
from ..ops.pool import ExpertPool
from ..routing import Router
from ..training.base import empty_model, load_config
from ..training.generate import missing_adapter
from ..training.recipe import ModelOptions
from ..training.schema import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PROBLEMS_SHOWN = 3
FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_ROUTER = re.compile(r"(?:base_model\.model\.)?(?P<router>.*?)\.?moe_router\.lora_router\.(?P<tensor>\w+)")


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter: its experts in every linear, and the tensors of its routers.

    Attributes:
        position: its place in the mixture; None when it was inactive.
        pools: the experts by linear.
        routers: router tensors by router name; "" is the model's.
        num_parameters: numbers in its factors and router weights; counters and maturity are none.
    """

    name: str
    config: MoELoraConfig
    position: int | None
    num_experts: int
    pools: dict[str, ExpertPool] = field(default_factory=dict)
    routers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    num_parameters: int = 0

    def router(self, name: str) -> Router | None:
        """The router of that name with its weights; None where routing is fixed."""
        tensors = self.routers[name]
        if "weight" not in tensors:
            return None
        hidden = tensors.get("hidden_weight")
        width = tensors["weight" if hidden is None else "hidden_weight"].shape[1]
        built = Router(width, self.num_experts, None if hidden is None else hidden.shape[0])
        built.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
        return built


def read_mixture(folder: Path) -> list[StoredAdapter]:
    """The adapters that a folder holds: the active ones first, in expert order.

    Raises:
        UserError: there is no adapter, it is no mixture, or its file is damaged, incomplete or holds weights that are
            not finite.
    """
    config = _read_config(folder)
    weights = _read_weights(folder)
    entries = config.pop("adapters", None)
    if not entries:
        found = [_adapter(folder, "default", config, 0, weights)]
    else:
        found = []
        for entry in entries:
            prefix = f"{entry['name']}/"
            own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
            found.append(_adapter(folder, entry["name"], entry["config"], entry["active"], own))
    return sorted(found, key=lambda adapter: math.inf if adapter.position is None else adapter.position)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(missing_adapter(folder))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it from a copy") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "MOELORA":
        raise UserError(f"{path}: `peft_type` is {kind!r}, not 'MOELORA'; give an adapter that moelora trained")
    if config.get("use_moe_routing") is False:
        raise UserError(f"{path}: `use_moe_routing` is false: this is plain LoRA, which has no experts to look at")
    try:
        if config.get("adapters"):
            check_entries(config["adapters"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} beside {CONFIG_FILE}; save it with `safe_serialization=True`")
    try:
        weights = load_file(path)
    except PermissionError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); restore it from a copy or a checkpoint") from None
    if bad := next((key for key, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{path}: {bad} is not finite: its training diverged; train again at a lower learning rate")
    return weights


def _adapter(
    folder: Path, name: str, config: Mapping[str, Any], position: int | None, weights: Mapping[str, Tensor]
) -> StoredAdapter:
    try:
        settings = MoELoraConfig.from_peft_type(**config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: adapter {name!r}: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    routers: dict[str, dict[str, Tensor]] = {}
    num_parameters = 0
    for key, tensor in weights.items():
        if match := FACTOR.fullmatch(key):
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        elif match := _ROUTER.fullmatch(key):
            routers.setdefault(match["router"], {})[match["tensor"]] = tensor
        if match and (match.re is FACTOR or match["tensor"] in ("weight", "hidden_weight")):
            num_parameters += tensor.numel()
    broken = [module for module, pair in factors.items() if len(pair) != 2]
    if broken or not factors or not routers:
        lacking = f"half of `{broken[0]}`" if broken else "experts or routers"
        raise UserError(f"{folder / WEIGHTS_FILE}: adapter {name!r} lacks {lacking}; restore the file from a copy")
    num_experts = next(iter(routers.values()))["maturity"].numel()
    pools = {}
    for module, pair in factors.items():
        scaling = scaling_of(settings, module, pair["A"].shape[0] // num_experts)
        pools[module] = ExpertPool(pair["A"], pair["B"], num_experts, scaling, nn.Identity())
    return StoredAdapter(name, settings, position, num_experts, pools, dict(_sorted(routers)), num_parameters)


def scaling_of(config: MoELoraConfig, module: str, rank: int) -> float:
    """What multiplies B A, as PEFT computes it for an expert of this rank."""
    matching = (value for key, value in config.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, config.lora_alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def _sorted(routers: dict[str, Any]) -> list[tuple[str, Any]]:
    """By name as people count, layers.9 before layers.10: safetensors sorts by letters."""

    def key(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
        parts = item[0].split(".")
        return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

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
    """(out, in) of a linear or of GPT-2's Conv1D; None for what is neither."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    return (weight.shape[1], weight.shape[0]) if hasattr(module, "nf") and weight is not None else None
