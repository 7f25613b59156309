"""Ours, in the settings whose defaults are to be settled: one row each. Join several by "+"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora.routing import Router
from moelora.tuner.router import MoELoraRouter, Scored


@dataclass(frozen=True)
class Variant:
    """A setting of our mixture.

    Args:
        about: what it answers, for tables.
        options: fields of MoELoraConfig that differ from the default mixture.
        rates: factors on the learning rate, by a part of the parameters' names.
        initialise: what fills A [E, r, D] of a linear anew, in place.
        router: the class of its routers.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    initialise: Callable[[Tensor], None] | None = None
    router: type[MoELoraRouter] = MoELoraRouter

    def __add__(self, other: Variant) -> Variant:
        """Both; where they contradict each other, the other's."""
        return Variant(
            f"{self.about}; {other.about}",
            self.options | other.options,
            self.rates | other.rates,
            other.initialise or self.initialise,
            self.router if other.router is MoELoraRouter else other.router,
        )


def orthogonal(factors: Tensor) -> None:
    """Rows orthogonal to each other, across experts too, as long as PEFT's are on average (3 ** -0.5)."""
    num_experts, rank, width = factors.shape
    rows = nn.init.orthogonal_(torch.empty(num_experts * rank, width, device=factors.device))
    factors.copy_(rows.view_as(factors) * 3**-0.5)


def identical(factors: Tensor) -> None:
    """All experts start from the first one's A."""
    factors.copy_(factors[:1].expand_as(factors).clone())


class UnnormalisedRouter(MoELoraRouter):
    """Reads the hidden states as they are; for one adapter, in torch operations."""

    def _can_fuse(self, hidden_TH: Tensor, weight_NH: Tensor, capacity_factor: float | None) -> bool:
        return False

    def _score(self, hidden_TH: Tensor, weight_NH: Tensor, *_: Any) -> Scored:
        (router,) = self.active_routers()
        assert isinstance(router, Router)
        return Scored(router.logits(F.linear(hidden_TH.float(), weight_NH)), None)


def _dense(num_experts: int) -> dict[str, Any]:
    """Weights that sum to E: starts as the LoRA of equal total parameters, near enough, and learns to route."""
    options = {"num_experts": num_experts, "top_k_experts": num_experts, "routing_scale": float(num_experts)}
    return {**options, "expert_capacity_factor": None}


SPARSE = {"router_type": "learned", "routing_scale": 4.0}

VARIANTS = {
    "ours": Variant("the founding defaults, with 8 experts of rank 8, top-2"),
    # how many experts speak, and how loud
    "scale-2": Variant("routing_scale 2 = k", {"routing_scale": 2.0}),
    "scale-4": Variant("routing_scale 4", {"routing_scale": 4.0}),
    "scale-8": Variant("routing_scale 8 = E", {"routing_scale": 8.0}),
    "dense-8": Variant("dense, weights sum to E", _dense(8)),
    "dense-sum-1": Variant("dense, weights sum to 1", _dense(8) | {"routing_scale": 1.0}),
    "dense-sum-4": Variant("dense, weights sum to 4", _dense(8) | {"routing_scale": 4.0}),
    "dense-4": Variant("dense, weights sum to E, 4 experts of rank 16", _dense(4)),
    "dense-16": Variant("dense, weights sum to E, 16 experts of rank 4", _dense(16)),
    "dense-32": Variant("dense, weights sum to E, 32 experts of rank 2", _dense(32)),
    "dense-64": Variant("dense, weights sum to E, 64 experts of rank 1", _dense(64)),
    "uniform-8": Variant("no routing: constant weights of 1 each", {"router_type": "fixed", "routing_scale": 8.0}),
    # sparse: maturity and capacity, which dense mixtures have none of
    "sparse": Variant("learned, scale 4: top-2 from the start", SPARSE),
    "dropless": Variant("no capacity limit", {"expert_capacity_factor": None}),
    "top-1": Variant("one expert a token", {"top_k_experts": 1}),
    "top-4": Variant("four experts a token", {"top_k_experts": 4}),
    "maturity-10k": Variant("maturity_tokens 10,000", {"maturity_tokens": 10_000}),
    "maturity-1m": Variant("maturity_tokens 1,000,000", {"maturity_tokens": 1_000_000}),
    # to be joined to one of the above: what the router sees, and how it decides
    "scope-model": Variant("router_scope model", {"router_scope": "model"}),
    "scope-module": Variant("router_scope module", {"router_scope": "module"}),
    "temperature-05": Variant("router_temperature 0.5", {"router_temperature": 0.5}),
    "temperature-1": Variant("router_temperature 1", {"router_temperature": 1.0}),
    "temperature-4": Variant("router_temperature 4", {"router_temperature": 4.0}),
    "router-raw": Variant("router inputs not normalised", router=UnnormalisedRouter),
    "router-64": Variant("router_hidden_size 64", {"router_hidden_size": 64}),
    "router-fast": Variant("routers at 10 times the rate", rates={"lora_router": 10.0}),
    "router-slow": Variant("routers at a tenth of the rate", rates={"lora_router": 0.1}),
    # balance
    "balance-0": Variant("router_aux_loss_coef 0", {"router_aux_loss_coef": 0.0}),
    "balance-0001": Variant("router_aux_loss_coef 0.001", {"router_aux_loss_coef": 0.001}),
    "balance-01": Variant("router_aux_loss_coef 0.1", {"router_aux_loss_coef": 0.1}),
    "balance-switch": Variant("switch loss", {"load_balance_loss_type": "switch"}),
    "balance-z": Variant("z loss", {"load_balance_loss_type": "z_loss"}),
    # factors
    "orthogonal": Variant("A orthogonal across experts", initialise=orthogonal),
    "identical": Variant("A identical across experts", initialise=identical),
    "plus-4": Variant("LoRA+: B at 4 times the rate of A", rates={"lora_B": 4.0}),
    "plus-16": Variant("LoRA+: B at 16 times the rate of A", rates={"lora_B": 16.0}),
}


def variant_of(name: str) -> Variant:
    """A variant by its name, or several joined by "+", where they contradict each other the last.

    Raises:
        KeyError: there is no such variant.

    Example:
        >>> variant_of("sparse+top-1").options
        {'router_type': 'learned', 'routing_scale': 4.0, 'top_k_experts': 1}
    """
    first, *others = (VARIANTS[part] for part in name.split("+"))
    return sum(others, start=first)
