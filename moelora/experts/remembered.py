"""What an adapter does in its domain, as far as its domain statistics tell: no text is there any more.

Router inputs are drawn from the Gaussian that an adapter keeps of them, and routed. How experts are weighed follows
from that; how large their deltas are is measured by their products D_e = s B_e A_e, as if what enters a linear went
evenly in all directions and told nothing of the weights. Shapes: T inputs drawn, E experts of the adapter, H router
input width, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.pool import ExpertPool
from ..routing import Router
from ..routing.domain_classifier import DomainStatistics
from ..routing.pooled import PooledRouter
from ..storage.mixture_files import StoredAdapter
from ..storage.structure import owner_of

DRAWN = 512


def drawn_inputs(domain: DomainStatistics, count: int = DRAWN) -> Tensor:
    """[T, H] router inputs of a domain; the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(count, len(domain.directions), generator=generator)
    beside = torch.randn(count, len(domain.mean), generator=generator)
    return domain.mean + along @ domain.directions + beside * domain.variance.sqrt()


def remembered_weights(adapter: StoredAdapter) -> dict[str, Tensor] | None:
    """[T, E] float64 by router: the weights of an adapter's experts in its own domain, where it alone is active; times
    `routing_scale`. None where it has no domain statistics."""
    found = {}
    for name in adapter.routers:
        router = adapter.router(name)
        if not isinstance(router, Router) or not router.has_domain:
            return None
        own = router.to("cpu").float()
        with torch.no_grad():
            pooled = PooledRouter([own], adapter.config)
            found[name] = pooled.weights(drawn_inputs(own.domain), lambda densities_TA: densities_TA).double()
    return found or None


def products(pool: ExpertPool) -> Tensor:
    """[E, E] float64: the inner products of the experts' D_e, none of which is formed."""
    lora_A, lora_B = pool.lora_A.detach().cpu().double(), pool.lora_B.detach().cpu().double()
    together = (lora_B.t() @ lora_B) * (lora_A @ lora_A.t()) * pool.scaling**2
    return together.view(pool.num_experts, pool.rank, pool.num_experts, pool.rank).sum((1, 3))


def weights_of(linear: str, weights: Mapping[str, Tensor]) -> Tensor:
    """Those of the router that serves a linear."""
    router = owner_of(linear, set(weights))
    assert router is not None  # every linear has one
    return weights[router]


def energy(weights_TE: Tensor, products_EE: Tensor) -> float:
    """The mean over tokens of the squared size of ``sum_e w_e D_e``."""
    return float(torch.einsum("te,ef,tf->t", weights_TE, products_EE, weights_TE).mean())
