"""What routers did: sums kept on the device, turned into numbers only when somebody asks.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import load_balancing_loss, masked_sum, z_loss
from .routing import Routing, top_k_mask


@dataclass(frozen=True)
class RoutingSums:
    """Sums of one routing decision over its non-padding tokens."""

    num_tokens: Tensor  # []
    assignments: Tensor  # [E] top-k assignments
    top1: Tensor  # [E] tokens whose most probable expert this is
    dropped: Tensor  # [] assignments beyond capacity
    mass: Tensor  # [E] routing weights
    entropy: Tensor  # []
    top1_probs: Tensor  # []
    probs: Tensor  # [E], with gradient
    squared_lse: Tensor  # [], with gradient

    @classmethod
    def of(cls, routing: Routing, logits_TE: Tensor, mask_T: Tensor) -> RoutingSums:
        """Sum up routing, whose logits are logits_TE [T, E], over the tokens where mask_T [T] is True."""
        probs = routing.probs.detach()
        return cls(
            num_tokens=mask_T.sum(),
            assignments=masked_sum(routing.selected.float(), mask_T),
            top1=masked_sum(top_k_mask(probs, 1).float(), mask_T),
            dropped=masked_sum((routing.selected & ~routing.kept).float(), mask_T).sum(),
            mass=masked_sum(routing.weights.detach(), mask_T),
            entropy=masked_sum(torch.special.entr(probs), mask_T).sum(),
            top1_probs=masked_sum(probs.amax(dim=-1), mask_T),
            probs=masked_sum(routing.probs, mask_T),
            squared_lse=masked_sum(logits_TE.logsumexp(dim=-1).square(), mask_T),
        )

    def detached(self) -> dict[str, Tensor]:
        """The sums by name, without gradients."""
        return {name: value.detach() for name, value in vars(self).items()}

    def balancing_loss(self, loss_type: str) -> Tensor:
        """The router's balancing loss, [] float32: see [`moelora.losses`]."""
        if loss_type == "z_loss":
            return z_loss(self.squared_lse, self.num_tokens)
        assignments = self.top1 if loss_type == "switch" else self.assignments
        return load_balancing_loss(assignments, self.probs, self.num_tokens)


@dataclass(frozen=True)
class RouterStats:
    """One router's behaviour since the statistics were last reset, padding excluded.

    expert_load is each expert's share of the top-k assignments, mean_probability its mean probability, entropy the mean
    entropy of the probabilities in nats (log E when undecided), top1_probability the mean probability of the first
    choice, dropped the share of assignments beyond capacity, maturity as of now, dead_experts those without an
    assignment, balancing_loss its loss over all these tokens.
    """

    num_tokens: int
    expert_load: list[float]
    mean_probability: list[float]
    entropy: float
    top1_probability: float
    dropped: float
    maturity: list[float]
    dead_experts: list[int]
    balancing_loss: float


class RoutingTotals:
    """Running [`RoutingSums`] of one router."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] | None = None

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add one forward's sums, on their device."""
        if self._sums is None:
            self._sums = {name: value.clone() for name, value in sums.items()}
        else:
            for name, value in sums.items():
                self._sums[name] = self._sums[name] + value.to(self._sums[name].device)

    def reset(self) -> None:
        """Forget everything."""
        self._sums = None

    def report(self, maturity_E: Tensor, loss_type: str) -> RouterStats | None:
        """The statistics as numbers (synchronises with the device); None before the first token."""
        if self._sums is None or int(self._sums["num_tokens"]) == 0:
            return None
        sums = RoutingSums(**self._sums)
        num_tokens = int(sums.num_tokens)
        load_E = sums.assignments / sums.assignments.sum().clamp(min=1)
        return RouterStats(
            num_tokens=num_tokens,
            expert_load=load_E.tolist(),
            mean_probability=(sums.probs / num_tokens).tolist(),
            entropy=float(sums.entropy) / num_tokens,
            top1_probability=float(sums.top1_probs) / num_tokens,
            dropped=float(sums.dropped / sums.assignments.sum().clamp(min=1)),
            maturity=maturity_E.tolist(),
            dead_experts=(sums.assignments == 0).nonzero().flatten().tolist(),
            balancing_loss=float(sums.balancing_loss(loss_type)),
        )
