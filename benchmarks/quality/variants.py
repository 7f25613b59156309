"""Ours, in the settings whose defaults are to be settled: one row each. Add a row to try another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """A setting of our mixture.

    Args:
        about: what it answers, for tables.
        options: fields of MoELoraConfig that differ from the default mixture.
        rates: factors on the learning rate, by a part of the parameters' names.
        initialise: what fills A [E, r, D] of a linear anew, in place.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    initialise: Callable[[Tensor], None] | None = None


def orthogonal(factors: Tensor) -> None:
    """Rows orthogonal to each other, across experts too, as long as PEFT's are on average (3 ** -0.5)."""
    num_experts, rank, width = factors.shape
    rows = nn.init.orthogonal_(torch.empty(num_experts * rank, width, device=factors.device))
    factors.copy_(rows.view_as(factors) * 3**-0.5)


def identical(factors: Tensor) -> None:
    """All experts start from the first one's A."""
    factors.copy_(factors[:1].expand_as(factors).clone())


DENSE = {"top_k_experts": 8, "expert_capacity_factor": None}
SUM_8 = {
    **DENSE,
    "routing_scale": 8.0,
}  # starts as the LoRA of equal total parameters, near enough, and learns to route
SPARSE = {"router_type": "learned", "routing_scale": 4.0}

VARIANTS = {
    "ours": Variant("the founding defaults, with 8 experts of rank 8, top-2"),
    # how many experts speak, and how loud
    "scale-2": Variant("routing_scale 2 = k", {"routing_scale": 2.0}),
    "scale-4": Variant("routing_scale 4", {"routing_scale": 4.0}),
    "scale-8": Variant("routing_scale 8 = E", {"routing_scale": 8.0}),
    "dense-1": Variant("dense, weights sum to 1", DENSE),
    "dense-4": Variant("dense, weights sum to 4", {**DENSE, "routing_scale": 4.0}),
    "dense-8": Variant("dense, weights sum to E", SUM_8),
    "uniform-8": Variant("no routing: constant weights of 1 each", {"router_type": "fixed", "routing_scale": 8.0}),
    # from here on on top of dense-8: what the router sees, and how it decides
    "scope-model": Variant("router_scope model", {**SUM_8, "router_scope": "model"}),
    "scope-module": Variant("router_scope module", {**SUM_8, "router_scope": "module"}),
    "temperature-05": Variant("router_temperature 0.5", {**SUM_8, "router_temperature": 0.5}),
    "temperature-1": Variant("router_temperature 1", {**SUM_8, "router_temperature": 1.0}),
    "temperature-4": Variant("router_temperature 4", {**SUM_8, "router_temperature": 4.0}),
    "router-64": Variant("router_hidden_size 64", {**SUM_8, "router_hidden_size": 64}),
    "router-fast": Variant("routers at 10 times the rate", SUM_8, {"lora_router": 10.0}),
    "router-slow": Variant("routers at a tenth of the rate", SUM_8, {"lora_router": 0.1}),
    "experts-16": Variant(
        "16 experts of rank 4", {**SUM_8, "num_experts": 16, "top_k_experts": 16, "routing_scale": 16.0}
    ),
    "experts-4": Variant("4 experts of rank 16", {**SUM_8, "num_experts": 4, "top_k_experts": 4, "routing_scale": 4.0}),
    # balance
    "balance-0": Variant("router_aux_loss_coef 0", {**SUM_8, "router_aux_loss_coef": 0.0}),
    "balance-0001": Variant("router_aux_loss_coef 0.001", {**SUM_8, "router_aux_loss_coef": 0.001}),
    "balance-01": Variant("router_aux_loss_coef 0.1", {**SUM_8, "router_aux_loss_coef": 0.1}),
    "balance-switch": Variant("switch loss", {**SUM_8, "load_balance_loss_type": "switch"}),
    "balance-z": Variant("z loss", {**SUM_8, "load_balance_loss_type": "z_loss"}),
    # factors
    "orthogonal": Variant("A orthogonal across experts", SUM_8, initialise=orthogonal),
    "identical": Variant("A identical across experts", SUM_8, initialise=identical),
    "plus-4": Variant("LoRA+: B at 4 times the rate of A", SUM_8, {"lora_B": 4.0}),
    "plus-16": Variant("LoRA+: B at 16 times the rate of A", SUM_8, {"lora_B": 16.0}),
    # sparse: maturity and capacity, which dense mixtures have none of
    "sparse": Variant("learned: top-2 from the start", SPARSE),
    "dropless": Variant("the same without a capacity limit", {**SPARSE, "expert_capacity_factor": None}),
    "top-1": Variant("the same, one expert a token", {**SPARSE, "top_k_experts": 1}),
    "top-4": Variant("the same, four experts a token", {**SPARSE, "top_k_experts": 4}),
    "maturity-10k": Variant("scale-4 with maturity_tokens 10,000", {"routing_scale": 4.0, "maturity_tokens": 10_000}),
    "maturity-1m": Variant(
        "scale-4 with maturity_tokens 1,000,000", {"routing_scale": 4.0, "maturity_tokens": 1_000_000}
    ),
}
