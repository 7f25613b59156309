"""Whether an adapter's tensors are what its configuration says, as far as that can be told without the base model.

Shapes: E experts, r rank of one expert, H router input width, D in, O out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..config import MoELoraConfig, count_experts
from ..files.adapter_files import check_tensors, wrong_kind
from .patterns import check_patterns_end

FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
ROUTER = re.compile(r"(?:base_model\.model\.)?(?P<router>.*?)\.?moe_router\.lora_router\.(?P<tensor>\w+)")

Parts = dict[str, dict[str, Tensor]]


def sort_tensors(weights: Mapping[str, Tensor]) -> tuple[Parts, Parts, list[str]]:
    """An adapter's tensors: factors by linear and "A" or "B"; router tensors by router and name; names of the rest."""
    factors: Parts = {}
    routers: Parts = {}
    others = []
    for key, tensor in weights.items():
        if match := FACTOR.fullmatch(key):
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        elif match := ROUTER.fullmatch(key):
            routers.setdefault(match["router"], {})[match["tensor"]] = tensor
        else:
            others.append(key)
    return factors, routers, others


def adapts_parameter(config: MoELoraConfig, module: str) -> bool:
    """Whether factors by the name of this module are of its parameters (`target_parameters`), and not of the module.

    PEFT nests the factors of several parameters of a module, by `base_layer` in their names.
    """
    owner = module.replace(".base_layer", "")
    owners = {target.rpartition(".")[0] for target in config.target_parameters or ()}
    return any(owner == each or owner.endswith(f".{each}") for each in owners)


def split_factors(config: MoELoraConfig, factors: Parts) -> tuple[Parts, Parts]:
    """The factors that our routers weigh, and those of parameters, which the base's own router does."""
    native = {module: pair for module, pair in factors.items() if adapts_parameter(config, module)}
    return {module: pair for module, pair in factors.items() if module not in native}, native


def acts_beside_experts(module: str) -> bool:
    """Whether experts of ours by this name act beside a base's native ones, as transformers calls their module."""
    return module.rpartition(".")[2] == "experts"


def check_structure(name: str, config: MoELoraConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with an adapter's tensors.

    Args:
        name: the adapter's.
        weights: by PEFT's names.

    Raises:
        ValueError: a pattern of the configuration does not come to an end.
    """
    found, routers, others = sort_tensors(weights)
    factors, native = split_factors(config, found)
    if bool(factors) is not bool(routers) or not found:
        return [f"adapter {name!r} lacks experts or routers"]
    check_patterns_end(config, factors)
    num_experts = count_experts(name, config)
    strange = [] if _may_hold_more(config) else [key for key in others if not _is_embedding(key)]
    problems = [f"{key!r} of adapter {name!r} is no part of a mixture" for key in strange]
    for module, pair in factors.items():
        problems += _check_factors(name, module, pair, config, num_experts)
    for module, pair in native.items():
        problems += _check_pair(name, module, pair, None)
    for router, tensors in routers.items():
        problems += _check_router(name, router, tensors, config, num_experts)
    return problems or (_check_scope(name, config, list(factors), list(routers)) if factors else [])


def _may_hold_more(config: MoELoraConfig) -> bool:
    return bool(config.modules_to_save or config.trainable_token_indices or config.bias != "none")


def _is_embedding(key: str) -> bool:
    """Whether PEFT saved the base model's embeddings along, as it does where they were resized or adapted."""
    return key.replace(".base_layer.", ".").split(".")[-2:-1] in ([layer] for layer in EMBEDDING_LAYER_NAMES)


def _check_factors(
    name: str, module: str, pair: Mapping[str, Tensor], config: MoELoraConfig, num_experts: int
) -> list[str]:
    rank = num_experts * config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    return _check_pair(name, module, pair, rank)


def _check_pair(name: str, module: str, pair: Mapping[str, Tensor], rank: int | None) -> list[str]:
    """Whether A is [R, in] and B [out, R]; R is the rank, or None where only the base model tells it."""
    if len(pair) != 2:
        return [f"adapter {name!r} lacks half of `{module}`"]
    wrong = {side: fix for side in "AB" if (fix := wrong_kind("", pair[side]))}
    problems = [f"`{module}.lora_{side}` of adapter {name!r} {fix}" for side, fix in wrong.items()]
    shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
    fits = len(shapes[0]) == len(shapes[1]) == 2 and 0 not in (*shapes[0], *shapes[1])
    wanted = shapes[0][0] if rank is None and fits else rank
    if not fits or shapes[0][0] != wanted or shapes[1][1] != wanted:
        problems.append(
            f"the factors of `{module}` of adapter {name!r} are {list(shapes[0])} and {list(shapes[1])}, not "
            f"[{wanted or 'R'}, in] and [out, {wanted or 'R'}]"
        )
    return problems


def _check_router(
    name: str, router: str, tensors: Mapping[str, Tensor], config: MoELoraConfig, num_experts: int
) -> list[str]:
    """Compare a router's tensors with those of one made from the configuration, which takes no memory."""
    first = tensors.get("weight" if config.router_hidden_size is None else "hidden_weight")
    is_constant = config.router_kind.is_constant
    if not is_constant and (first is None or first.dim() != 2 or first.shape[-1] == 0):
        return [f"the router of `{router or 'the model'}` of adapter {name!r} has no weights"]
    with torch.device("meta"):
        built = config.router_kind.make(
            0 if first is None else first.shape[1],
            num_experts,
            router_hidden_size=config.router_hidden_size,
            domain_rank=config.router_memory,
            has_bias=config.balancing.moves_bias,
        )
    prefix = f"{router}.moe_router.lora_router."
    given = {prefix + key: tensor for key, tensor in tensors.items()}
    return check_tensors(name, given, {prefix + key: tensor for key, tensor in built.state_dict().items()})


def _check_scope(name: str, config: MoELoraConfig, linears: list[str], routers: list[str]) -> list[str]:
    """Whether each linear has a router, and each router a linear."""
    own = set(linears if config.router_scope == "module" else config.own_routers or ())
    shared = [router for router in routers if router not in own and (not router) == (config.router_scope == "model")]
    owners = {linear: linear if linear in own else owner_of(linear, shared) for linear in linears}
    lonely = [linear for linear, owner in owners.items() if owner not in routers]
    idle = [router for router in routers if router not in owners.values()]
    return [f"`{linear}` of adapter {name!r} has no router" for linear in lonely] + [
        f"the router of `{router}` of adapter {name!r} has no experts" for router in idle
    ]


def owner_of(module: str, routers: Iterable[str]) -> str | None:
    """The router that steers a linear: its own, its block's or the model's; None if there is none of them."""
    owners = [name for name in routers if not name or module == name or module.startswith(f"{name}.")]
    return max(owners, key=len, default=None)
