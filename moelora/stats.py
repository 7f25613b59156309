"""What routers did: sums kept on the device, turned into numbers only when somebody asks.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .losses import load_balancing_loss, masked_sum, z_loss
from .routing import Routing, top_k_mask

PER_EXPERT = ("assignments", "top1", "mass", "probs")  # sums [E]; the others are []


@dataclass(frozen=True)
class RoutingSums:
    """Sums of one routing decision over its non-padding tokens. The Triton router writes them in this order."""

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
    def of(
        cls, routing: Routing, logits_TE: Tensor, mask_T: Tensor | None = None, loss_type: str | None = None
    ) -> RoutingSums:
        """Sum up routing, whose logits are logits_TE [T, E], over the tokens where mask_T [T] is True (None: all).

        A loss_type leaves out (as zero) what only other losses need, for this runs in every forward of every router;
        the Triton router has all sums in hand and leaves out nothing.
        """
        num_experts = logits_TE.shape[-1]
        with torch.no_grad():
            probs = routing.probs
            columns = [routing.selected, routing.weights, torch.special.entr(probs).sum(-1, keepdim=True)]
            columns += [probs.amax(dim=-1, keepdim=True)]
            if routing.kept is not routing.selected:
                columns.append(routing.kept)
            if loss_type in (None, "switch"):
                columns.append(top_k_mask(probs, 1))
            pieces = iter(masked_sum(torch.cat(columns, dim=-1), mask_T).split([c.shape[-1] for c in columns]))
            assignments, mass, entropy, top1_probs = (next(pieces) for _ in range(4))
            zero = torch.zeros_like(entropy[0])
            dropped = zero if routing.kept is routing.selected else (assignments - next(pieces)).sum()
            top1 = next(pieces, zero.expand(num_experts))
            num_tokens = zero.new_full((), logits_TE.shape[0]) if mask_T is None else mask_T.sum()
        needs_lse = loss_type in (None, "z_loss")
        return cls(
            num_tokens=num_tokens,
            assignments=assignments,
            top1=top1,
            dropped=dropped,
            mass=mass,
            entropy=entropy[0],
            top1_probs=top1_probs[0],
            probs=masked_sum(routing.probs, mask_T),
            squared_lse=masked_sum(logits_TE.logsumexp(dim=-1).square(), mask_T) if needs_lse else zero,
        )

    def flat(self) -> Tensor:
        """All sums in one tensor [4E + 5], without gradients."""
        return torch.cat([value.detach().reshape(-1).to(self.mass.dtype) for value in vars(self).values()])

    @classmethod
    def of_flat(cls, flat: Tensor) -> RoutingSums:
        """The sums that `flat` [4E + 5] made one tensor of."""
        names = [field.name for field in fields(cls)]
        num_experts = (flat.shape[0] - len(names)) // len(PER_EXPERT) + 1
        pieces = flat.split([num_experts if name in PER_EXPERT else 1 for name in names])
        shaped = (piece if name in PER_EXPERT else piece[0] for name, piece in zip(names, pieces, strict=True))
        return cls(*shaped)

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


def describe(sums: RoutingSums, maturity_E: Tensor, balancing_loss: float) -> RouterStats | None:
    """The statistics that sums amount to, as numbers; None without a token. Pass tensors of the CPU: each is read."""
    # Plain numbers from here on: a log describes every router, and a tensor operation costs more than all this sums.
    if (num_tokens := int(sums.num_tokens)) == 0:
        return None
    assignments = sums.assignments.tolist()
    num_assignments = max(sum(assignments), 1.0)
    return RouterStats(
        num_tokens=num_tokens,
        expert_load=[count / num_assignments for count in assignments],
        mean_probability=[total / num_tokens for total in sums.probs.tolist()],
        entropy=float(sums.entropy) / num_tokens,
        top1_probability=float(sums.top1_probs) / num_tokens,
        dropped=float(sums.dropped) / num_assignments,
        maturity=maturity_E.tolist(),
        dead_experts=[expert for expert, count in enumerate(assignments) if count == 0],
        balancing_loss=balancing_loss,
    )


class RoutingTotals:
    """Running [`RoutingSums`] of one router."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def add(self, flat: Tensor) -> None:
        """Add one forward's sums, made flat, on their device."""
        self._flat = flat if self._flat is None else self._flat.to(flat.device) + flat

    def reset(self) -> None:
        """Forget everything."""
        self._flat = None

    def report(self, maturity_E: Tensor, loss_type: str) -> RouterStats | None:
        """The statistics as numbers (synchronises with the device); None before the first token."""
        if self._flat is None:
            return None
        sums = RoutingSums.of_flat(self._flat.cpu())
        return describe(sums, maturity_E.cpu(), float(sums.balancing_loss(loss_type)))
