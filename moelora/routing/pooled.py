"""What the routers of several adapters together think of tokens. Imports torch only.

Shapes: T tokens, H router input width, N rows of the routers' first weights, E experts of all adapters, A adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.norm_linear import norm_linear
from .domain_classifier import logits_by_domain
from .kinds import RouterKind
from .scorers import ExpertRouter, Router

AddUp = Callable[[Tensor], Tensor]
"""Sums the densities [T, A] of a forward's tokens over the context of each."""


class Scored(NamedTuple):
    """What routers think of tokens."""

    logits: Tensor  # [T, E], whose softmax are the probabilities
    log_scores: Tensor | None  # [T, E], logarithms of what biases are added to; None: the probabilities


def routes_by_domain(routers: Sequence[ExpertRouter]) -> bool:
    """Whether the adapters of these routers, several, all have statistics of their domains, which then decide."""
    return len(routers) > 1 and all(isinstance(router, Router) and router.has_domain for router in routers)


def first_weights(routers: Sequence[Router]) -> Tensor:
    """[N, H]: what the normalised hidden states meet first; where domains decide, their discriminants last."""
    firsts = [router.first_weight for router in routers]
    if routes_by_domain(routers):
        firsts += [router.gate_weight.to(firsts[0].device) for router in routers]
    return firsts[0] if len(firsts) == 1 else torch.cat(firsts)


def score(
    routers: Sequence[Router],
    hidden_TH: Tensor,
    weight_NH: Tensor,
    kind: RouterKind,
    temperature: float,
    add_up: AddUp,
    without: int | None = None,
) -> Scored:
    """Score tokens with the routers of all adapters.

    Args:
        weight_NH: as `first_weights` gives it.
        without: an expert to leave out, as if it had never been.
    """
    sizes = [router.first_weight.shape[0] for router in routers]
    product_TN = norm_linear(hidden_TH.to(weight_NH.device), weight_NH)
    firsts, densities_TA = product_TN.split([sum(sizes), product_TN.shape[-1] - sum(sizes)], dim=-1)
    logits = [router.logits(piece) for router, piece in zip(routers, firsts.split(sizes, dim=-1), strict=True)]
    if without is not None:
        left_out = torch.tensor([without], device=firsts.device)
        together = torch.cat(logits, dim=-1).index_fill(-1, left_out, -torch.inf)
        logits = list(together.split([router.num_experts for router in routers], dim=-1))
    if not routes_by_domain(routers):
        whole = logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)
        return Scored(whole, routers[0].log_scores(whole, temperature) if kind.scores_each_alone else None)
    biases_A = torch.cat([router.gate_bias for router in routers]).to(firsts.device)
    discriminants_AH = weight_NH[sum(sizes) :]
    same_AA = (discriminants_AH[:, None] == discriminants_AH).all(-1)  # their statistics are, to the last bit
    own = [router.log_scores(piece, temperature) for router, piece in zip(routers, logits, strict=True)]
    whole = logits_by_domain(logits, add_up(densities_TA + biases_A), temperature, same_AA)
    return Scored(whole, torch.cat(own, dim=-1))
