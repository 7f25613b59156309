"""Routers and routing, as maths on tensors (docs/maths.md). Imports torch only.

Shapes: T tokens, H router input width, E experts, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.norm_linear import EPS
from ..ops.ranks import fits_over_ranks
from .domain_classifier import Memory


class ExpertRouter(nn.Module):
    """What every adapter keeps about its experts, whatever the router type.

    Buffers, saved with the adapter and of fixed dtype under any `.to(dtype)`:
        maturity [E] float32: 0 for a new expert, 1 for a mature one.
        tokens_per_expert [E] int64: assignments each expert has had in training.
    """

    maturity: Tensor
    tokens_per_expert: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("maturity", torch.zeros(num_experts))
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64))

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
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Router(ExpertRouter):
    """Scores the experts of one adapter: ``logits_TE = router(rms_norm(h_TH))``, always in float32.

    Args:
        hidden_size: H, width of the hidden states.
        num_experts: E, experts of this adapter.
        router_hidden_size: hidden units of a two-layer router (SiLU between); None for a linear one.
        memory: directions to remember of the adapter's domain; 0 for none.

    Buffers, where there is a memory: memory_mean [H], memory_directions [K, H] and memory_variance [H], see
    [`moelora.routing.domain_classifier.Memory`]; gate_weight [1, H] and gate_bias [1], the domain's discriminant.
    """

    memory_mean: Tensor
    memory_directions: Tensor
    memory_variance: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, router_hidden_size: int | None = None, memory: int = 0
    ) -> None:
        super().__init__(num_experts)
        self.hidden_size = hidden_size
        self.make_memory(memory)
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

    def make_memory(self, rank: int) -> None:
        """Make room for a memory of `rank` directions; 0 forgets."""
        H, K = self.hidden_size, min(rank, self.hidden_size)
        shapes = {"memory_mean": (H,), "memory_directions": (K, H), "memory_variance": (H,), "gate_weight": (1, H)}
        device = self.maturity.device
        for name, shape in (shapes | {"gate_bias": (1,)}).items():
            self.register_buffer(name, torch.zeros(shape, device=device) if rank else None)

    @property
    def remembers(self) -> bool:
        """Whether it has a memory of its domain."""
        return self.memory_mean is not None

    @property
    def memory(self) -> Memory:
        """Its memory of its domain, on the CPU."""
        return Memory(self.memory_mean.cpu(), self.memory_directions.cpu(), self.memory_variance.cpu())

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


def rms_norm(hidden: Tensor) -> Tensor:
    """Root-mean-square normalisation over the last dimension in float32, so that routing sees direction, not scale."""
    return F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=EPS)


@dataclass(frozen=True)
class Routing:
    """The decision for T tokens over E experts."""

    weights: Tensor  # [T, E] float32: what multiplies each expert's output
    probs: Tensor  # [T, E] float32: softmax(logits / temperature)
    selected: Tensor  # [T, E] bool: the top-k assignments
    kept: Tensor  # [T, E] bool: assignments within capacity


def sole_expert(weights: Tensor) -> int | None:
    """The one expert that has any weight in weights [..., E]; None where several have, or none.

    The host waits for the answer, so there is none, None, while a graph is compiled or captured.

    Example:
        >>> sole_expert(torch.tensor([[0.0, 1.0], [0.0, 0.5]])), sole_expert(torch.eye(2))
        (1, None)
    """
    if torch.compiler.is_compiling() or (weights.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    used = weights.flatten(0, -2).any(0).nonzero().flatten().tolist()
    return used[0] if len(used) == 1 else None


def top_k_mask(probs_TE: Tensor, top_k: int) -> Tensor:
    """[T, E] bool, True at each token's top_k experts.

    Example:
        >>> top_k_mask(torch.tensor([[0.2, 0.5, 0.3]]), 2).tolist()
        [[False, True, True]]
    """
    expert_ids = probs_TE.topk(top_k, dim=-1).indices
    return torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, expert_ids, True)


def within_capacity(
    probs_TE: Tensor,
    selected_TE: Tensor,
    mask_T: Tensor | None,
    capacity_factor: float,
    top_k: int,
    over_ranks: bool = False,
) -> Tensor:
    """[T, E] bool: the assignments that fit when each expert keeps its most probable ones.

    An expert keeps ``ceil(capacity_factor * tokens * top_k / E)`` assignments. Tokens outside mask_T [T] bool (None:
    all are inside) neither count nor take room. No host synchronisation: the number of tokens stays on the device.

    Args:
        over_ranks: the tokens are those of all data-parallel ranks together, which must all call this.
    """
    num_tokens, num_experts = probs_TE.shape
    counted_TE = selected_TE if mask_T is None else selected_TE & mask_T[:, None]
    fair_share = (num_tokens if mask_T is None else mask_T.sum()) * (capacity_factor * top_k / num_experts)
    rounded = fair_share * (1 - 1e-6)  # the product of exact shares may land a rounding above an integer
    capacity = math.ceil(rounded) if isinstance(rounded, float) else rounded.ceil()
    priority = torch.where(counted_TE, probs_TE, -1.0)
    if over_ranks:
        within_TE = fits_over_ranks(priority.t(), capacity_factor).t()
        return selected_TE & (within_TE if mask_T is None else within_TE | ~mask_T[:, None])
    order = priority.argsort(dim=0, descending=True, stable=True)
    positions = torch.arange(num_tokens, device=order.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, positions)
    within_TE = rank < capacity
    return selected_TE & (within_TE if mask_T is None else within_TE | ~mask_T[:, None])


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    maturity_E: Tensor | None = None,
    mask_T: Tensor | None = None,
    capacity_factor: float | None = None,
    over_ranks: bool = False,
) -> Routing:
    """Turn router logits into routing weights.

    ``p = softmax(logits / temperature)``; S are each token's top-k experts; expert e weighs in with p_e where it is in
    S and with p_e (1 - maturity_e) elsewhere, normalised to sum to 1. Without maturity that is the usual top-k
    (maturity 1); with maturity 0 it is a dense softmax. An assignment beyond capacity weighs in as if outside S, and
    the token gets what is left.

    Args:
        logits_TE: [T, E] float32.
        maturity_E: [E] in [0, 1]; None means mature.
        mask_T: [T] bool, False on padding; None means all tokens are real.
        capacity_factor: None is dropless; dense routing (top_k = E) never drops.
        over_ranks: capacity is shared by all data-parallel ranks; see `within_capacity`.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> [round(w, 4) for w in route(logits, top_k=2).weights[0].tolist()]
        [0.0, 0.2689, 0.7311]
        >>> [round(w, 4) for w in route(logits, top_k=2, maturity_E=torch.zeros(3)).weights[0].tolist()]
        [0.09, 0.2447, 0.6652]
    """
    probs_TE = torch.softmax(logits_TE if temperature == 1.0 else logits_TE / temperature, dim=-1)
    selected_TE = top_k_mask(probs_TE, top_k)
    kept_TE = selected_TE
    if capacity_factor is not None and top_k < logits_TE.shape[-1]:
        kept_TE = within_capacity(probs_TE.detach(), selected_TE, mask_T, capacity_factor, top_k, over_ranks)
    outside_E = 0.0 if maturity_E is None else 1.0 - maturity_E
    shares_TE = probs_TE * torch.where(selected_TE, 1.0, outside_E)
    total_T1 = shares_TE.sum(dim=-1, keepdim=True)
    if kept_TE is not selected_TE:
        shares_TE = probs_TE * torch.where(kept_TE, 1.0, outside_E)
    return Routing(shares_TE / total_T1, probs_TE, selected_TE, kept_TE)
