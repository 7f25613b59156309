"""The router type "fixed": constant weights. Shapes: E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kinds import RouterKind, register_router_kind
from .scorers import ExpertRouter


class FixedRouter(ExpertRouter):
    """Constant routing weights of one adapter's experts: no parameters. Uniform until `set_weights`.

    Buffers: fixed_weights [E] float32; is_set [1] bool, whether fixed_weights replace the uniform share.
    """

    fixed_weights: Tensor
    is_set: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.register_buffer("fixed_weights", torch.zeros(num_experts))
        self.register_buffer("is_set", torch.zeros(1, dtype=torch.bool))

    def set_weights(self, weights_E: Tensor) -> None:
        """Replace the uniform share by weights_E [E]."""
        self.fixed_weights.copy_(weights_E)
        self.is_set.fill_(True)

    def forward(self, num_pooled: int) -> Tensor:
        """Weights [E] of this adapter's experts in a pool of num_pooled experts."""
        return torch.where(self.is_set, self.fixed_weights, 1.0 / num_pooled)


def _make(hidden_size: int, num_experts: int, **options: Any) -> FixedRouter:
    return FixedRouter(num_experts)


register_router_kind(
    RouterKind(
        name="fixed",
        help="constant weights, no router parameters, mergeable",
        weights="w_e = 1/E, or what `set_routing_weights` says; no router parameters, no loss",
        make=_make,
        is_constant=True,
    )
)
