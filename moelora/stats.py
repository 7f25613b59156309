"""What routers did: sums kept on the device, turned into numbers only when somebody asks.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import load_balancing_loss, masked_sum, z_loss
from .routing import Routing, top_k_mask


@dataclass(frozen=True)
class RoutingSums:
    """Sums of routing decisions over their non-padding tokens, of one router or (leading dimension) of several.

    Counts and sums come as one tensor, so that those of all routers add up in one operation. In it lie, in this order:
    num_tokens; assignments [E], the top-k assignments; top1 [E], tokens whose most probable expert this is; dropped,
    assignments beyond capacity; mass [E], routing weights; entropy; top1_probs; probs [E]; squared_lse.
    """

    packed: Tensor  # [..., 4E + 5] float32 or wider, without gradient; the Triton router writes it
    probs: Tensor  # [..., E], with gradient
    squared_lse: Tensor  # [...], with gradient

    @classmethod
    def of(
        cls, routing: Routing, logits_TE: Tensor, mask_T: Tensor | None = None, loss_type: str | None = None
    ) -> RoutingSums:
        """Sum up routing, whose logits are logits_TE [T, E], over the tokens where mask_T [T] is True (None: all).

        A loss_type leaves out (as zero) what only other losses need, for this runs in every forward of every router;
        the Triton router has all sums in hand and leaves out nothing.
        """
        probs_TE, selected_TE = routing.probs, routing.selected
        squared_lse_T1 = torch.zeros_like(logits_TE[:, :1])
        if loss_type in (None, "z_loss"):
            squared_lse_T1 = logits_TE.logsumexp(dim=-1, keepdim=True).square()
        with torch.no_grad():
            top1_TE = top_k_mask(probs_TE, 1) if loss_type in (None, "switch") else torch.zeros_like(selected_TE)
            entropy_T1 = torch.special.entr(probs_TE).sum(-1, keepdim=True)
            dropped_T1 = (selected_TE & ~routing.kept).sum(-1, keepdim=True)
            first = [torch.ones_like(entropy_T1), selected_TE, top1_TE, dropped_T1, routing.weights]
            last = [entropy_T1, probs_TE.amax(dim=-1, keepdim=True), probs_TE, squared_lse_T1]
            packed = masked_sum(torch.cat([*first, *last], dim=-1), mask_T)
        return cls(packed, masked_sum(probs_TE, mask_T), masked_sum(squared_lse_T1, mask_T).squeeze(-1))

    @classmethod
    def of_packed(cls, packed: Tensor) -> RoutingSums:
        """The same without gradients, from `packed` [..., 4E + 5] alone."""
        num_experts = (packed.shape[-1] - 5) // 4
        return cls(packed, packed[..., -num_experts - 1 : -1], packed[..., -1])

    @classmethod
    def stack(cls, sums: Sequence[RoutingSums]) -> RoutingSums:
        """Several routers' sums as one, with a leading dimension."""
        packed, probs = torch.stack([each.packed for each in sums]), torch.stack([each.probs for each in sums])
        return cls(packed, probs, torch.stack([each.squared_lse for each in sums]))

    def _part(self, index: int) -> Tensor:
        E = self.probs.shape[-1]
        return self.packed.split([1, E, E, 1, E, 1, 1, E, 1], dim=-1)[index]

    num_tokens = property(lambda self: self._part(0).squeeze(-1), doc="[...]")
    assignments = property(lambda self: self._part(1), doc="[..., E]")
    top1 = property(lambda self: self._part(2), doc="[..., E]")
    dropped = property(lambda self: self._part(3).squeeze(-1), doc="[...]")
    mass = property(lambda self: self._part(4), doc="[..., E]")
    entropy = property(lambda self: self._part(5).squeeze(-1), doc="[...]")
    top1_probs = property(lambda self: self._part(6).squeeze(-1), doc="[...]")

    def balancing_loss(self, loss_type: str) -> Tensor:
        """The balancing loss, [...] float32: see [`moelora.losses`]."""
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
        self._packed: Tensor | None = None

    @staticmethod
    def add_each(totals: Sequence[RoutingTotals], packed_LF: Tensor) -> None:
        """Add row l of packed_LF [L, 4E + 5] to totals[l], on its device and all rows in one operation."""
        for total in totals:
            if total._packed is None or total._packed.device != packed_LF.device:
                # What is made in inference mode could not be added to outside of it. (Dynamo does not know such modes.)
                with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                    fresh = torch.zeros(packed_LF.shape[1:], dtype=packed_LF.dtype, device=packed_LF.device)
                    total._packed = fresh if total._packed is None else fresh + total._packed.to(fresh.device)
        torch._foreach_add_([total._packed for total in totals if total._packed is not None], list(packed_LF.unbind(0)))

    def reset(self) -> None:
        """Forget everything."""
        self._packed = None

    def report(self, maturity_E: Tensor, loss_type: str) -> RouterStats | None:
        """The statistics as numbers (synchronises with the device); None before the first token."""
        if self._packed is None:
            return None
        sums = RoutingSums.of_packed(self._packed.cpu())
        return describe(sums, maturity_E.cpu(), float(sums.balancing_loss(loss_type)))
