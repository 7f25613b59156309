"""Experts leave the mixture: one as a plain LoRA, all under fixed weights as one LoRA of concatenated rank.

Shapes: D in, O out, E experts, r rank of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..config import MoELoraConfig
from ..config_rules import is_float32
from ..files.adapter_files import is_finite
from ..files.staging import holds_something, staging
from ..ops.pool import ExpertPool
from ..schema import settable_fields
from ..storage.lora_file import Factor, Factors, LoraFile, peft_tensors
from ..storage.mixture_files import StoredAdapter
from ..storage.structure import acts_beside_experts, owner_of
from ..tuner.layer import MoELoraLayer
from ..tuner.model import MoELoraModel


def to_lora(model: PeftModel | Sequence[StoredAdapter], expert: int | str) -> LoraFile:
    """One expert as a plain PEFT LoRA: what the mixture computes where its routing weight is 1 and no other's is.

    `routing_scale` is in its alpha. Weights that `set_routing_weights` gave it are not: with [`to_lora_mixture`] they
    are, and here they would change a LoRA that was imported.

    Args:
        model: a mixture, or its adapters as they are stored.
        expert: its index in the mixture, or the name of an adapter that holds one expert.

    Raises:
        ValueError: there is no such expert, or its adapter is more than experts: it trained biases or modules too.
    """
    adapter, index = locate(stored_adapters(model), expert)
    check_exportable([adapter])
    config = adapter.config
    scale = config.routing_scale  # what a router multiplies a lone expert's weight of 1 by
    settings = _plain(config) | {
        "lora_alpha": _scaled(config.lora_alpha, scale),
        "alpha_pattern": {key: _scaled(alpha, scale) for key, alpha in config.alpha_pattern.items()},
    }
    factors = {name: _expert_factors(pool, index) for name, pool in adapter.pools.items()}
    return LoraFile(f"expert {expert}", LoraConfig(**settings), factors)


def to_lora_mixture(model: PeftModel | Sequence[StoredAdapter], weights: Sequence[float] | None = None) -> LoraFile:
    """The mixture under fixed weights [E] as one plain LoRA whose rank is that of all experts together: exact.

    Args:
        model: a mixture, or its adapters as they are stored.
        weights: of the experts, as `routing_weights` would have them; None takes those of router_type="fixed".

    Raises:
        ValueError: they are not E finite numbers, there are none, or an adapter trained biases or modules too.
    """
    active = [adapter for adapter in stored_adapters(model) if adapter.position is not None]
    check_exportable(active)
    given = None if weights is None else _split(active, weights)
    factors: Factors = {}
    for name in dict.fromkeys(name for adapter in active for name in adapter.pools):
        by_adapter = _fixed_weights(active, name) if given is None else given
        here = [(adapter.pools[name], by_adapter[adapter.name]) for adapter in active if name in adapter.pools]
        factors[name] = joined(here)
        if not is_finite(factors[name][1]):
            raise ValueError(
                f"`weights` ({_given(weights)}) are too large: times the experts of `{name}` they are no finite "
                f"{str(factors[name][1].dtype).removeprefix('torch.')}; give smaller ones"
            )
    return LoraFile("mixture", _mixture_config(active[0].config, factors), factors)


def joined(here: Sequence[tuple[ExpertPool, torch.Tensor]]) -> Factor:
    """The experts of pools side by side, each pool's weights [E] and scaling in B."""
    As = [pool.lora_A.detach().cpu() for pool, _ in here]
    Bs = [
        pool.lora_B.detach().cpu().double() * (weights_E * pool.scaling).repeat_interleave(pool.rank)
        for pool, weights_E in here
    ]
    return torch.cat(As), torch.cat(Bs, dim=1).to(As[0].dtype)


def stored_adapters(model: PeftModel | Sequence[StoredAdapter]) -> Sequence[StoredAdapter]:
    """The active adapters of a model in memory, as `read_mixture` gives those on disk."""
    if isinstance(model, Sequence):
        return model
    tuner = model.base_model
    if not isinstance(tuner, MoELoraModel) or tuner.routing_or_none is None:
        raise ValueError("this model holds no mixture, so there is no expert to export")
    layers = [module for module in tuner.model.modules() if isinstance(module, MoELoraLayer)]
    found = []
    for position, (name, count) in enumerate(tuner.routing.pool):
        pools = {layer.link.name: layer.expert_pool(name) for layer in layers if name in layer.lora_A}
        routers = {
            router.name: dict(router[name].state_dict())
            for router in tuner.routing.routers.values()
            if name in router.lora_router
        }
        found.append(StoredAdapter(name, tuner.peft_config[name], position, count, pools, routers))
    return found


def _given(weights: Sequence[float] | None) -> str:
    return "those of the fixed router" if weights is None else ", ".join(f"{weight:g}" for weight in weights)


def check_exportable(adapters: Sequence[StoredAdapter]) -> None:
    """Refuse adapters of which no plain LoRA computes all.

    Raises:
        ValueError: one trained more than its experts, or has experts beside a base's native ones.
    """
    _check_only_factors({adapter.name: adapter.config for adapter in adapters})
    for adapter in adapters:
        if beside := next(filter(acts_beside_experts, adapter.pools), None):
            raise ValueError(
                f"adapter {adapter.name!r} has experts beside the native ones of `{beside}`, which no plain LoRA can "
                "hold; serve the mixture as it is"
            )
        if adapter.others:
            raise ValueError(
                f"`{adapter.others[0]}` of adapter {adapter.name!r} is no part of its experts' factors, so no LoRA "
                "made of them computes what the mixture computes; if it is the base model's own, which PEFT saves with "
                "an adapted embedding or output layer, save the mixture with `save_embedding_layers=False`"
            )


def _check_only_factors(configs: Mapping[str, MoELoraConfig]) -> None:
    """Refuse adapters that are more than their experts, which no LoRA made of experts computes.

    Raises:
        ValueError: one trained modules of the base model, embeddings of tokens, biases or native experts too.
    """
    for name, config in configs.items():
        trained = {field: getattr(config, field) for field in ("modules_to_save", "trainable_token_indices")}
        trained["target_parameters"] = config.target_parameters
        trained["bias"] = None if config.bias == "none" else config.bias
        for field, value in trained.items():
            if value:
                raise ValueError(
                    f"`{field}` ({value!r}) of adapter {name!r} is no part of its experts' factors, so no LoRA made of "
                    "them computes what the mixture computes"
                )


def locate(adapters: Sequence[StoredAdapter], expert: int | str) -> tuple[StoredAdapter, int]:
    """The adapter that holds an expert, and the expert's place in it.

    Args:
        expert: its index in the mixture, as text or number, or the name of an adapter that holds one expert.

    Raises:
        ValueError: there is no such expert; the message lists those there are.
    """
    experts = [(adapter, i) for adapter in adapters if adapter.position is not None for i in range(adapter.num_experts)]
    named = {adapter.name: adapter for adapter in adapters}
    if isinstance(expert, str) and expert in named:
        adapter = named[expert]
        if adapter.num_experts == 1:
            return adapter, 0
        start = next((n for n, (found, _) in enumerate(experts) if found is adapter), None)
        which = "" if start is None else f": {start} to {start + adapter.num_experts - 1}"
        raise ValueError(f"the adapter {expert!r} holds {adapter.num_experts} experts; give the number of one{which}")
    if str(expert).isdecimal() and int(expert) < len(experts):
        return experts[int(expert)]
    single = [adapter.name for adapter in adapters if adapter.num_experts == 1]
    names = f", or one of {', '.join(single)}" if single else ""
    raise ValueError(f"there is no expert {expert!r}; give a number from 0 to {len(experts) - 1}{names}")


def _expert_factors(pool: ExpertPool, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = slice(index * pool.rank, (index + 1) * pool.rank)
    return pool.lora_A[rows].detach().cpu().clone(), pool.lora_B[:, rows].detach().cpu().clone()


def _plain(config: MoELoraConfig) -> dict[str, Any]:
    """The configuration's LoRA settings."""
    settings = {name: copy.deepcopy(getattr(config, name)) for name in settable_fields(LoraConfig)}
    return settings | {"inference_mode": True}


def _scaled(alpha: float, factor: float) -> float:
    scaled = alpha if factor == 1 else alpha * factor
    if not is_float32(scaled):
        raise ValueError(
            f"`lora_alpha` ({alpha:g}) times `routing_scale` ({factor:g}) is beyond float32, so no LoRA can have it; "
            "bring both nearer to 1 in adapter_config.json, and scale the factors by as much"
        )
    return scaled


# ---- the mixture -----------------------------------------------------------------------------------------------------


def _split(active: Sequence[StoredAdapter], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    vector = torch.tensor(list(weights), dtype=torch.float64)
    counts = [adapter.num_experts for adapter in active]
    if len(vector) != sum(counts) or not bool(vector.isfinite().all()):
        raise ValueError(f"`weights` must be {sum(counts)} finite numbers, one per expert; got {vector.tolist()}")
    return dict(zip((adapter.name for adapter in active), vector.split(counts), strict=True))


def _fixed_weights(active: Sequence[StoredAdapter], linear: str) -> dict[str, torch.Tensor]:
    """What the fixed router of a linear says: equal shares, or what was set, times the scale."""
    config = active[0].config
    if not config.router_kind.is_constant:
        raise ValueError(
            f"router_type={config.router_type!r} weighs experts differently for each token, so the mixture is no "
            "single LoRA; give `weights` (--weights), one number per expert, to export it under those"
        )
    router = owner_of(linear, {name for adapter in active for name in adapter.routers})
    assert router is not None  # every linear has one
    pooled = [adapter for adapter in active if router in adapter.routers]
    share = 1 / sum(adapter.num_experts for adapter in pooled)
    found = {}
    for adapter in pooled:
        tensors = {name: tensor.detach().cpu() for name, tensor in adapter.routers[router].items()}
        weights_E = tensors["fixed_weights"].double() if bool(tensors["is_set"]) else torch.tensor([share])
        found[adapter.name] = weights_E.double().expand(adapter.num_experts) * config.routing_scale
    return found


def _mixture_config(config: MoELoraConfig, factors: Factors) -> LoraConfig:
    """Weights and scaling are in B, so each linear's alpha is its rank; ranks differ where experts' targets do."""
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(factors),
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def save_lora(lora: LoraFile, folder: str | Path) -> None:
    """Write a plain LoRA as PEFT lays it out, complete or not at all.

    Raises:
        FileExistsError: the folder holds something, or is a file.
    """
    folder = Path(folder)
    if folder.is_file() or holds_something(folder):
        raise FileExistsError(f"{str(folder)!r} exists; give another folder, or move it away")
    with staging(folder) as place:
        place.mkdir()
        save_file(peft_tensors(lora.factors), place / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora.config.save_pretrained(str(place))
        if folder.is_dir():
            folder.rmdir()
        place.rename(folder)


def merge(base_model: nn.Module, lora: LoraFile) -> nn.Module:
    """The base model with a LoRA merged into its weights by PEFT, changed in place.

    Raises:
        ValueError: its weights are quantised, so that merging would round the sum, or a merged weight is not finite.
    """
    if is_quantised(getattr(base_model, "config", None)):
        raise ValueError(
            "the base model's weights are quantised: merging would round base and experts together onto their grid; "
            "load it in full precision, or keep the LoRA beside it"
        )
    model = get_peft_model(base_model, copy.deepcopy(lora.config))
    set_peft_model_state_dict(model, peft_tensors(lora.factors))
    return model.merge_and_unload(safe_merge=True)


def is_quantised(config: Any) -> bool:
    """Whether a model's configuration says that its weights are."""
    return getattr(config, "quantization_config", None) is not None
