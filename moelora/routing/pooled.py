"""What the routers of several adapters together think of tokens. Imports torch only.

Shapes: T tokens, H router input width, N rows of the routers' first weights, E experts of all adapters, A adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.norm_linear import norm_linear, norm_linear_few
from .decision import route, softmax_weights
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
    firsts = product_TN if len(weight_NH) == sum(sizes) else product_TN[:, : sum(sizes)]
    pieces = [firsts] if len(routers) == 1 else firsts.split(sizes, dim=-1)
    logits = [router.logits(piece) for router, piece in zip(routers, pieces, strict=True)]
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
    whole = logits_by_domain(logits, add_up(product_TN[:, sum(sizes) :] + biases_A), temperature, same_AA)
    return Scored(whole, torch.cat(own, dim=-1))


class PooledRouter:
    """The routers of all active adapters for one block, module or model, as they decide when nothing is learned.

    What they hold is looked at once: make it anew where it has changed.

    Attributes:
        num_experts: E.
        top_k: experts that a token chooses.
        is_softmax: weights are a softmax of one product with the hidden states.

    Args:
        routers: in expert order.
        config: of the mixture's first adapter, which says how all decide.
    """

    def __init__(self, routers: Sequence[Router], config: Any) -> None:
        self.routers = list(routers)
        self.config = config
        self._collect()

    def _collect(self) -> None:
        kind, routers = self.config.router_kind, self.routers
        self.first_NH = first_weights(routers).detach()
        maturity_E = torch.cat([router.maturity for router in routers]) if kind.matures else None
        self.maturity_E = None if maturity_E is None or (maturity_E == 1).all() else maturity_E
        biases = [router.selection_bias for router in routers if router.selection_bias is not None]
        moves_bias = self.config.balancing.moves_bias and len(biases) == len(routers)
        self.bias_E = torch.cat(biases) if moves_bias else None
        is_plain = kind.has_kernel and self.bias_E is None and not routes_by_domain(routers)
        self.is_softmax = is_plain and all(router.hidden_weight is None for router in routers)
        self._over_temperature_EH = self.first_NH.float() / self.config.router_temperature
        self.num_experts = sum(router.num_experts for router in routers)
        self.top_k = min(self.config.top_k_experts, self.num_experts)

    def to(self, device: torch.device | str) -> PooledRouter:
        """Itself, moved."""
        for router in self.routers:
            router.to(device)
        self._collect()
        return self

    @property
    def routes_by_domain(self) -> bool:
        """Whether the text decides between adapters, so that a token's weights depend on those before it."""
        return routes_by_domain(self.routers)

    def weights(self, hidden_TH: Tensor, add_up: AddUp) -> Tensor:
        """[T, E] float32: what multiplies each expert's output, as evaluation has it; no capacity, nothing is counted.

        Args:
            add_up: sums the densities [T, A] of these tokens over the context of each; asked where the text decides.
        """
        config = self.config
        if self.is_softmax:
            z_TE = norm_linear_few(hidden_TH, self._over_temperature_EH)
            return softmax_weights(z_TE, self.top_k, self.maturity_E, config.routing_scale)
        scored = score(self.routers, hidden_TH, self.first_NH, config.router_kind, config.router_temperature, add_up)
        routing = route(
            scored.logits,
            top_k=self.top_k,
            temperature=config.router_temperature,
            maturity_E=self.maturity_E,
            bias_E=self.bias_E,
            log_scores_TE=scored.log_scores,
        )
        return routing.weights * config.routing_scale
