"""What scores the experts of one adapter. Imports torch only.

Shapes: T tokens, H router input width, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.norm_linear import EPS
from .domain_classifier import DomainStatistics


def rms_norm(hidden: Tensor) -> Tensor:
    """Root-mean-square normalisation over the last dimension in float32, so that routing sees direction, not scale."""
    return F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=EPS)


class ExpertRouter(nn.Module):
    """What every adapter keeps about its experts, whatever the router type.

    Buffers, saved with the adapter and of fixed dtype under any `.to(dtype)`:
        maturity [E] float32: 0 for a new expert, 1 for a mature one.
        tokens_per_expert [E] int64: assignments each expert has had in training.
        selection_bias [E] float32: added to the scores that choose the top-k; only where a bias balances the load.
    """

    maturity: Tensor
    tokens_per_expert: Tensor
    selection_bias: Tensor | None

    def __init__(self, num_experts: int, has_bias: bool = False) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("maturity", torch.zeros(num_experts))
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("selection_bias", torch.zeros(num_experts) if has_bias else None)

    @property
    def is_frozen(self) -> bool:
        """Whether its scores are not to change; then its maturity and counters stand still too."""
        parameters = list(self.parameters())
        return len(parameters) > 0 and not any(parameter.requires_grad for parameter in parameters)

    def _apply(self, fn, recurse=True):
        # A bfloat16 maturity would stop growing: steps of 1e-4 round to nothing. Devices move, dtypes stay.
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if buffer is None:
                continue
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.setdefault("selection_bias", None)  # pickled before there was one


class Router(ExpertRouter):
    """Scores the experts of one adapter: ``logits_TE = router(rms_norm(h_TH))``, always in float32.

    Args:
        hidden_size: H, width of the hidden states.
        num_experts: E, experts of this adapter.
        router_hidden_size: hidden units of a two-layer router (SiLU between); None for a linear one.
        domain_rank: directions to keep of the adapter's domain; 0 for none.

    Buffers, where a domain is kept: memory_mean [H], memory_directions [K, H] and memory_variance [H], see
    [`DomainStatistics`]; gate_weight [1, H] and gate_bias [1], the domain's discriminant.
    """

    memory_mean: Tensor
    memory_directions: Tensor
    memory_variance: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        router_hidden_size: int | None = None,
        domain_rank: int = 0,
        has_bias: bool = False,
    ) -> None:
        super().__init__(num_experts, has_bias)
        self.hidden_size = hidden_size
        self.make_domain(domain_rank)
        # Raw parameters, not nn.Linear: PEFT's "all-linear" and quantisers must not take a router for a target.
        self.hidden_weight: nn.Parameter | None = None
        if router_hidden_size is not None:
            self.hidden_weight = nn.Parameter(torch.empty(router_hidden_size, hidden_size))
        self.weight = nn.Parameter(torch.empty(num_experts, router_hidden_size or hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation: logits of the same spread at any width, and no two experts tied."""
        for weight in (self.hidden_weight, self.weight):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def make_domain(self, rank: int) -> None:
        """Make room for statistics of its domain with `rank` directions; 0 drops them."""
        H, K = self.hidden_size, min(rank, self.hidden_size)
        shapes = {"memory_mean": (H,), "memory_directions": (K, H), "memory_variance": (H,), "gate_weight": (1, H)}
        device = self.maturity.device
        for name, shape in (shapes | {"gate_bias": (1,)}).items():
            self.register_buffer(name, torch.zeros(shape, device=device) if rank else None)

    @property
    def has_domain(self) -> bool:
        """Whether it has statistics of its domain."""
        return self.memory_mean is not None

    @property
    def domain(self) -> DomainStatistics:
        """The statistics of its domain, on the CPU."""
        return DomainStatistics(self.memory_mean.cpu(), self.memory_directions.cpu(), self.memory_variance.cpu())

    @property
    def first_weight(self) -> Tensor:
        """[N, H]: what the normalised hidden states meet first."""
        return self.weight if self.hidden_weight is None else self.hidden_weight

    def forward(self, normed: Tensor) -> Tensor:
        """normed float32 [..., H] -> logits float32 [..., E]."""
        return self.logits(F.linear(normed, self.first_weight.float()))

    def logits(self, first: Tensor) -> Tensor:
        """Logits [..., E] from the product with first_weight, [..., N]."""
        return first if self.hidden_weight is None else F.linear(F.silu(first), self.weight.float())

    def log_scores(self, logits: Tensor, temperature: float) -> Tensor:
        """Logarithms [..., E] of the scores that a selection bias is added to, from this adapter's own logits."""
        return torch.log_softmax(logits / temperature, dim=-1)
