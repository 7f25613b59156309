"""From logits to routing weights (docs/maths.md). Imports torch only.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.data_parallel import fits_over_ranks
from ..ops.transforms import is_transformed

_LEAST_LOG = -60.0  # of a score that a bias is added to: e^60 is no infinity in float32


@dataclass(frozen=True)
class Routing:
    """The decision for T tokens over E experts."""

    weights: Tensor  # [T, E] float32: what multiplies each expert's output
    probs: Tensor  # [T, E] float32: softmax(logits / temperature)
    selected: Tensor  # [T, E] bool: the top-k assignments
    kept: Tensor  # [T, E] bool: assignments within capacity


def used_experts(weights: Tensor) -> tuple[int, ...] | None:
    """The experts that have any weight in weights [..., E].

    The host waits for the answer, so there is none, None, while a graph is compiled or captured.

    Example:
        >>> used_experts(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]))
        (1, 2)
    """
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or (weights.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return tuple(weights.flatten(0, -2).any(0).nonzero().flatten().tolist())


def top_k_mask(probs_TE: Tensor, top_k: int) -> Tensor:
    """[T, E] bool, True at each token's top_k experts.

    Example:
        >>> top_k_mask(torch.tensor([[0.2, 0.5, 0.3]]), 2).tolist()
        [[False, True, True]]
    """
    expert_ids = probs_TE.topk(top_k, dim=-1).indices
    return torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, expert_ids, 1)  # torch.jit knows no True


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
    place = torch.empty_like(order).scatter_(0, order, positions)
    within_TE = place < capacity
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
    bias_E: Tensor | None = None,
    log_scores_TE: Tensor | None = None,
) -> Routing:
    """Turn router logits into routing weights.

    ``p = softmax(logits / temperature)``; S are each token's top-k experts; expert e weighs in with p_e where it is in
    S and with p_e (1 - maturity_e) elsewhere, normalised to sum to 1. Without maturity that is the usual top-k
    (maturity 1); with maturity 0 it is a dense softmax. An assignment beyond capacity weighs in as if outside S, and
    the token gets what is left. A bias is added to the scores that choose S, and to nothing else.

    Args:
        logits_TE: [T, E] float32.
        maturity_E: [E] in [0, 1]; None means mature.
        mask_T: [T] bool, False on padding; None means all tokens are real.
        capacity_factor: None is dropless; dense routing (top_k = E) never drops.
        over_ranks: capacity is shared by all data-parallel ranks; see `within_capacity`.
        bias_E: [E]; None means no bias.
        log_scores_TE: [T, E] logarithms of the scores that the bias is added to; None means those of p.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> [round(w, 4) for w in route(logits, top_k=2).weights[0].tolist()]
        [0.0, 0.2689, 0.7311]
        >>> [round(w, 4) for w in route(logits, top_k=2, maturity_E=torch.zeros(3)).weights[0].tolist()]
        [0.09, 0.2447, 0.6652]
        >>> route(logits, top_k=1, bias_E=torch.tensor([1.0, 0.0, 0.0])).selected.tolist()
        [[True, False, False]]
    """
    probs_TE = torch.softmax(logits_TE if temperature == 1.0 else logits_TE / temperature, dim=-1)
    preference_TE = probs_TE if bias_E is None else _with_bias(probs_TE.detach(), bias_E, log_scores_TE)
    selected_TE = top_k_mask(preference_TE, top_k)
    kept_TE = selected_TE
    if capacity_factor is not None and top_k < logits_TE.shape[-1]:
        kept_TE = within_capacity(probs_TE.detach(), selected_TE, mask_T, capacity_factor, top_k, over_ranks)
    outside_E = 0.0 if maturity_E is None else 1.0 - maturity_E
    shares_TE = probs_TE * torch.where(selected_TE, 1.0, outside_E)
    total_T1 = shares_TE.sum(dim=-1, keepdim=True)
    if kept_TE is not selected_TE:
        shares_TE = probs_TE * torch.where(kept_TE, 1.0, outside_E)
    return Routing(shares_TE / total_T1, probs_TE, selected_TE, kept_TE)


def softmax_weights(z_TE: Tensor, top_k: int, maturity_E: Tensor | None, scale: float) -> Tensor:
    """The weights of [`route`], without bias and capacity, times scale, in a third of the operations.

    For a decoded token, to which an operation costs more than its arithmetic, and one with a number more than others.
    It has no gradient.

    Args:
        z_TE: logits over temperature, float32.
        maturity_E: None means mature.
    """
    if maturity_E is None and top_k < z_TE.shape[-1]:
        top_TK, chosen_TK = z_TE.topk(top_k, dim=-1)
        weights_TE = torch.zeros_like(z_TE).scatter_(-1, chosen_TK, top_TK.softmax(dim=-1))
    else:
        weights_TE = z_TE.softmax(dim=-1)
        if top_k < z_TE.shape[-1]:
            top_TK, chosen_TK = weights_TE.topk(top_k, dim=-1)
            dense_TE = torch.addcmul(weights_TE, weights_TE, maturity_E, value=-1)  # type: ignore[arg-type]
            shares_TE = dense_TE.scatter_(-1, chosen_TK, top_TK)
            weights_TE = shares_TE.div_(shares_TE.sum(dim=-1, keepdim=True))
    return weights_TE if scale == 1.0 else weights_TE.mul_(scale)


def _with_bias(probs_TE: Tensor, bias_E: Tensor, log_scores_TE: Tensor | None) -> Tensor:
    """[T, E] in the order of score + bias, where each token's p is its scores times a factor of its own."""
    if log_scores_TE is None:
        return probs_TE + bias_E
    return probs_TE * (1 + bias_E * torch.exp(-log_scores_TE.detach().clamp(min=_LEAST_LOG)))
