"""A mixture as a server takes it: one LoRA whose rank is that of all experts, and routers that weigh its ranks.

Read from its folder; no base model, no PEFT, no server's names. Shapes: T tokens, H router input width, E experts of
all active adapters, r rank of one expert, D in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..files.atomic_save import PICKLED_ROUTER_NAME, ROUTER_NAME, part
from ..ops.pool import ExpertPool
from ..routing import FixedRouter, Router
from ..routing.pooled import PooledRouter
from ..storage.mixture_files import StoredAdapter, read_mixture
from ..storage.structure import acts_beside_experts

Factors = tuple[Tensor, Tensor]
"""A [E * r, D] and B [O, E * r], float32, the scaling in B."""


@dataclass(frozen=True)
class ServedMixture:
    """See the module.

    Attributes:
        factors: by linear; experts of a smaller rank are padded with zeros.
        routers: by block, linear or "" for the model, as `scope` has it; none where the weights are constant, which
            are in the factors then.
        columns: by router, which of the E experts are its own, where those are not all.
    """

    num_experts: int
    expert_rank: int
    scope: str
    factors: dict[str, Factors]
    routers: dict[str, PooledRouter]
    columns: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """Of the one LoRA that all experts are together."""
        return self.num_experts * self.expert_rank

    @property
    def routes_by_domain(self) -> bool:
        """Whether the text decides between adapters."""
        return any(router.routes_by_domain for router in self.routers.values())

    def gate(self, router: str, weights_TE: Tensor) -> Tensor:
        """[T, E * r]: what multiplies each rank, from the weights of a router's experts."""
        if (columns := self.columns.get(router)) is not None:
            whole = weights_TE.new_zeros(weights_TE.shape[0], self.num_experts)
            weights_TE = whole.index_copy_(1, columns.to(weights_TE.device), weights_TE)
        return weights_TE[..., None].expand(-1, -1, self.expert_rank).flatten(1)


def active_adapters(stored: Sequence[StoredAdapter]) -> list[StoredAdapter]:
    """Those that are the mixture, in expert order."""
    return [adapter for adapter in stored if adapter.position is not None]


def experts_and_rank(adapters: Sequence[StoredAdapter]) -> tuple[int, int]:
    """Experts of all adapters together, and the largest rank of one, to which all are padded; 0 where nothing is."""
    ranks = (pool.rank for adapter in adapters for pool in adapter.pools.values())
    return sum(adapter.num_experts for adapter in adapters), max(ranks, default=0)


def read_served_mixture(folder: str | Path) -> ServedMixture:
    """Read a mixture's folder.

    Raises:
        UserError: it is no mixture, or damaged.
        ValueError: it has what cannot be served; the message names it.
    """
    folder = Path(folder)
    adapters = active_adapters(read_mixture(folder))
    _refuse_unserved(folder, adapters)
    config, (num_experts, expert_rank) = adapters[0].config, experts_and_rank(adapters)
    is_constant = config.router_kind.is_constant
    if not is_constant:
        _refuse_own_routers(folder, adapters)
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.pools)
    factors = {module: _factors(adapters, module, expert_rank, is_constant) for module in modules}
    routers: dict[str, PooledRouter] = {}
    columns: dict[str, Tensor] = {}
    for name in () if is_constant else dict.fromkeys(name for adapter in adapters for name in adapter.routers):
        own = [name in adapter.routers for adapter in adapters]
        found = [adapter.router(name) for adapter, has in zip(adapters, own, strict=True) if has]
        routers[name] = PooledRouter(cast("list[Router]", found), config)
        if not all(own):
            of_experts = [has for adapter, has in zip(adapters, own, strict=True) for _ in range(adapter.num_experts)]
            columns[name] = torch.tensor(of_experts).nonzero().flatten()
    return ServedMixture(num_experts, expert_rank, config.router_scope, factors, routers, columns)


def _refuse_unserved(folder: Path, adapters: Sequence[StoredAdapter]) -> None:
    for name in (ROUTER_NAME, PICKLED_ROUTER_NAME):
        if part(folder, name).exists():
            raise ValueError(
                f"{folder}: an attached router ({name}) decides, which no server can run; detach it and save again, or "
                "export a plain LoRA with `moelora export`"
            )
    for adapter in adapters:
        if beside := next(filter(acts_beside_experts, adapter.pools), None):
            raise ValueError(
                f"{folder}: adapter {adapter.name!r} has experts beside the native ones of `{beside}`, which vLLM's "
                "fused experts leave no place for; serve it with transformers (`moelora serve --engine transformers`)"
            )
        if adapter.config.target_parameters:
            raise ValueError(
                f"{folder}: adapter {adapter.name!r} adapts the base's native experts (`target_parameters`), which no "
                "server runs beside experts of ours; serve it with transformers (`moelora serve --engine "
                'transformers`), or train without: target_modules="all-linear" reaches them, names of linears do not'
            )
        if adapter.others:
            raise ValueError(
                f"{folder}: `{adapter.others[0]}` of adapter {adapter.name!r} is more than experts and routers, which "
                "a server does not apply; train without `modules_to_save` and the like, or merge it into the base"
            )


def _refuse_own_routers(folder: Path, adapters: Sequence[StoredAdapter]) -> None:
    for adapter in adapters:
        own = (
            []
            if adapter.config.router_scope == "module"
            else [name for name in adapter.pools if name in adapter.routers]
        )
        if own:
            raise ValueError(
                f"{folder}: `{own[0]}` has a router of its own beside those of router_scope="
                f"{adapter.config.router_scope!r}, which no server runs; leave it out with `exclude_modules` and train "
                "again, or serve with transformers (`moelora serve --engine transformers`)"
            )


def _factors(adapters: Sequence[StoredAdapter], module: str, rank: int, is_constant: bool) -> Factors:
    """Those of all experts for one linear; zero for an adapter that does not have it."""
    like = next(adapter.pools[module] for adapter in adapters if module in adapter.pools)
    parts_A, parts_B = [], []
    for adapter in adapters:
        A_ErD = torch.zeros(adapter.num_experts, rank, like.lora_A.shape[1])
        B_OEr = torch.zeros(like.lora_B.shape[0], adapter.num_experts, rank)
        if (pool := adapter.pools.get(module)) is not None:
            A_ErD[:, : pool.rank] = pool.lora_A.float().unflatten(0, (adapter.num_experts, -1))
            B_OEr[..., : pool.rank] = _scaled_b(pool)
            if is_constant:
                B_OEr *= _constant_weights(adapters, adapter, module)[:, None]
        parts_A.append(A_ErD.flatten(0, 1))
        parts_B.append(B_OEr.flatten(1))
    return torch.cat(parts_A), torch.cat(parts_B, dim=1)


def _scaled_b(pool: ExpertPool) -> Tensor:
    """[O, E, r]."""
    return pool.lora_B.float().unflatten(1, (pool.num_experts, -1)) * pool.scaling


def _constant_weights(adapters: Sequence[StoredAdapter], adapter: StoredAdapter, module: str) -> Tensor:
    """[E] of one adapter's experts at a linear, times the scale."""
    name = max((name for name in adapter.routers if _covers(name, module)), key=len)
    num_pooled = sum(one.num_experts for one in adapters if name in one.routers)
    tensors, router = adapter.routers[name], FixedRouter(adapter.num_experts)
    router.load_state_dict({key: tensors[key] for key in ("fixed_weights", "is_set")}, strict=False)
    return router(num_pooled) * adapters[0].config.routing_scale


def _covers(router: str, module: str) -> bool:
    return not router or module == router or module.startswith(f"{router}.")
