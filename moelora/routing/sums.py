"""What routers did: sums kept on the device, turned into numbers only when somebody asks.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import sums_layout
from .balancing import BALANCING_LOSSES
from .decision import Routing, top_k_mask
from .losses import masked_sum

_COUNTING = threading.Lock()


def counting_alone() -> AbstractContextManager[Any]:
    """Held while something is added to what all threads share, so that none loses what another adds meanwhile.

    Compiled graphs know no locks; training and evaluation count apart, which is why they may run beside each other.
    """
    return nullcontext() if torch.compiler.is_compiling() else _COUNTING


@dataclass(frozen=True)
class RoutingSums:
    """Sums of routing decisions over their non-padding tokens, of one router or (leading dimension) of several.

    Counts and sums come as one tensor, so that those of all routers add up in one operation; `ops.sums_layout`
    says what lies where.
    """

    packed: Tensor  # [..., F] float32 or wider, without gradient; the Triton router writes it
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
        reads = {"top1", "squared_lse"} if loss_type is None else BALANCING_LOSSES[loss_type].reads
        probs_TE, selected_TE = routing.probs, routing.selected
        squared_lse_T1 = None
        if "squared_lse" in reads:
            squared_lse_T1 = logits_TE.logsumexp(dim=-1, keepdim=True).square()
        with torch.no_grad():
            entropy_T1 = torch.special.entr(probs_TE).sum(-1, keepdim=True)
            zero_T1 = torch.zeros_like(entropy_T1)
            is_limited = routing.kept is not selected_TE
            dropped_T1 = (selected_TE & ~routing.kept).sum(-1, keepdim=True) if is_limited else zero_T1
            top1_TE = top_k_mask(probs_TE, 1) if "top1" in reads else zero_T1.expand_as(probs_TE)
            parts = {
                "num_tokens": torch.ones_like(entropy_T1),
                "assignments": selected_TE,
                "top1": top1_TE,
                "dropped": dropped_T1,
                "mass": routing.weights,
                "entropy": entropy_T1,
                "top1_probs": probs_TE.amax(dim=-1, keepdim=True),
                "probs": probs_TE,
                "squared_lse": zero_T1 if squared_lse_T1 is None else squared_lse_T1,
            }
            packed = masked_sum(torch.cat([parts[name] for name, _ in sums_layout.PARTS], dim=-1), mask_T)
        squared_lse = packed[-1] if squared_lse_T1 is None else masked_sum(squared_lse_T1, mask_T).squeeze(-1)
        return cls(packed, masked_sum(probs_TE, mask_T), squared_lse)

    @classmethod
    def of_packed(cls, packed: Tensor) -> RoutingSums:
        """The same without gradients, from `packed` [..., F] alone."""
        probs, squared_lse = packed.split(sums_layout.sizes(sums_layout.num_experts_of(packed.shape[-1])), dim=-1)[-2:]
        return cls(packed, probs, squared_lse.squeeze(-1))

    def _part(self, name: str) -> Tensor:
        start, length = sums_layout.place(name, self.probs.shape[-1])
        return self.packed.narrow(-1, start, length)

    num_tokens = property(lambda self: self._part("num_tokens").squeeze(-1), doc="[...]")
    assignments = property(lambda self: self._part("assignments"), doc="[..., E]")
    top1 = property(lambda self: self._part("top1"), doc="[..., E]")
    dropped = property(lambda self: self._part("dropped").squeeze(-1), doc="[...]")
    mass = property(lambda self: self._part("mass"), doc="[..., E]")
    entropy = property(lambda self: self._part("entropy").squeeze(-1), doc="[...]")
    top1_probs = property(lambda self: self._part("top1_probs").squeeze(-1), doc="[...]")

    def balancing_loss(self, loss_type: str) -> Tensor:
        """The balancing loss of that name, [...] float32."""
        return BALANCING_LOSSES[loss_type].of(self)


def without_non_finite(packed_LF: Tensor) -> tuple[Tensor, Tensor]:
    """Routers' sums [L, F] with zeros for those with a NaN or an infinity among them, which are also [L, 1] bool.

    One such forward, added to maturity or to statistics, would stay in them for good.

    Example:
        >>> without_non_finite(torch.tensor([[1.0, 2.0], [torch.inf, 1.0]]))
        (tensor([[1., 2.],
                [0., 0.]]), tensor([[False],
                [ True]]))
    """
    totals_L1 = packed_LF.sum(-1, keepdim=True)
    left_out_L1 = (totals_L1 - totals_L1).isnan()  # a quarter of what isfinite() costs the host
    return packed_LF.masked_fill(left_out_L1, 0.0), left_out_L1


@dataclass(frozen=True)
class RouterStats:
    """One router's behaviour since the statistics were last reset, padding excluded.

    expert_load is each expert's share of the top-k assignments, mean_probability its mean probability, entropy the mean
    entropy of the probabilities in nats (log E when undecided), top1_probability the mean probability of the first
    choice, dropped the share of assignments beyond capacity, maturity as of now, dead_experts those without an
    assignment, balancing_loss its loss over all these tokens. non_finite counts the forwards that are in none of these
    (nor in maturity), because there was a NaN or an infinity in the router's sums.
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
    non_finite: int = 0


def describe(
    sums: RoutingSums, maturity_E: Tensor, balancing_loss: float, non_finite: float = 0.0
) -> RouterStats | None:
    """The statistics that sums amount to, as numbers; None where nothing was routed. Pass tensors of the CPU."""
    # Plain numbers from here on: a log describes every router, and a tensor operation costs more than all this sums.
    counted = int(sums.num_tokens)
    if counted == 0 and non_finite == 0:
        return None
    num_tokens = max(counted, 1)
    assignments = sums.assignments.tolist()
    num_assignments = max(sum(assignments), 1.0)
    return RouterStats(
        num_tokens=counted,
        expert_load=[count / num_assignments for count in assignments],
        mean_probability=[total / num_tokens for total in sums.probs.tolist()],
        entropy=float(sums.entropy) / num_tokens,
        top1_probability=float(sums.top1_probs) / num_tokens,
        dropped=float(sums.dropped) / num_assignments,
        maturity=maturity_E.tolist(),
        dead_experts=[expert for expert, count in enumerate(assignments) if count == 0],
        balancing_loss=balancing_loss,
        non_finite=int(non_finite),
    )


def counting_dtype(device: torch.device) -> torch.dtype:
    """What sums over many forwards are kept in: float32 adds no single token to 2**24; MPS has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


class _RunningSum:
    """A vector of sums, to which one forward at a time is added."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def beside(self, others_LF: Tensor) -> Tensor:
        """The sums, on the device of what is about to be added."""
        if self.values is not None and self.values.device == others_LF.device:
            return self.values
        # What is made in inference mode could not be added to outside of it. (Dynamo does not know such modes.)
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
            fresh = torch.zeros(others_LF.shape[1:], dtype=others_LF.dtype, device=others_LF.device)
            self.values = fresh if self.values is None else fresh + self.values.to(fresh.device)
        return self.values


class RoutingTotals:
    """Running sums of one router: a forward's [`RoutingSums`], and whether it was left out."""

    def __init__(self) -> None:
        self._training, self._evaluation = _RunningSum(), _RunningSum()

    @staticmethod
    def add_each(totals: Sequence[RoutingTotals], counted_LF: Tensor, is_training_step: bool) -> None:
        """Add row l of counted_LF [L, F + 1] to totals[l], on its device and all rows in one operation."""
        counted_LF = counted_LF.to(counting_dtype(counted_LF.device))
        with counting_alone():
            sums = [total._training if is_training_step else total._evaluation for total in totals]
            torch._foreach_add_([each.beside(counted_LF) for each in sums], list(counted_LF.unbind(0)))

    def reset(self) -> None:
        """Forget everything."""
        with counting_alone():
            self._training, self._evaluation = _RunningSum(), _RunningSum()

    def report(self, maturity_E: Tensor, loss_type: str) -> RouterStats | None:
        """The statistics as numbers (synchronises with the device); None before the first token."""
        with counting_alone():
            found = [each.values.clone() for each in (self._training, self._evaluation) if each.values is not None]
        if not found:
            return None
        values = torch.stack([values.cpu() for values in found]).sum(0)
        sums = RoutingSums.of_packed(values[:-1])
        return describe(sums, maturity_E.cpu(), float(sums.balancing_loss(loss_type)), float(values[-1]))
