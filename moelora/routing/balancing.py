"""The balancing losses there are. A new one is registered here, or in a file of its own beside this.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .losses import load_balancing_loss, z_loss


@dataclass(frozen=True)
class BalancingLoss:
    """One value of `load_balance_loss_type`.

    Attributes:
        help: what it is, as the configuration's help has it.
        formula: the loss of one router, as docs/maths.md has it.
        source: where it comes from.
        of: the loss [...] of [`moelora.routing.sums.RoutingSums`].
        reads: names of the sums that it reads and most others do not: "top1", "squared_lse".
        is_optimised: it is added to the training loss, times `router_aux_loss_coef`; else it is only reported.
        moves_bias: a bias of each expert is moved after every step, by `bias_update_speed`.
    """

    name: str
    help: str
    formula: str
    source: str
    of: Callable[[Any], Tensor]
    reads: frozenset[str] = frozenset()
    is_optimised: bool = True
    moves_bias: bool = False


BALANCING_LOSSES: dict[str, BalancingLoss] = {}


def register_balancing_loss(loss: BalancingLoss) -> None:
    """Let `load_balance_loss_type` have this value."""
    BALANCING_LOSSES[loss.name] = loss


def load_loss(sums: Any) -> Tensor:
    """GShard's loss [...]."""
    return load_balancing_loss(sums.assignments, sums.probs, sums.num_tokens)


register_balancing_loss(
    BalancingLoss(
        name="aux_loss",
        help="GShard, top-k load",
        formula="E Σ_e f_e P_e, f_e = share of the top-k assignments",
        source="GShard, arXiv:2006.16668",
        of=load_loss,
    )
)
register_balancing_loss(
    BalancingLoss(
        name="z_loss",
        help="ST-MoE",
        formula="Σ_t logsumexp(z_t)² / n",
        source="ST-MoE, arXiv:2202.08906, eq. 5",
        of=lambda sums: z_loss(sums.squared_lse, sums.num_tokens),
        reads=frozenset({"squared_lse"}),
    )
)
register_balancing_loss(
    BalancingLoss(
        name="switch",
        help="top-1 load",
        formula="the same as `aux_loss` with the top-1 assignments",
        source="Switch Transformer, arXiv:2101.03961, eq. 4",
        of=lambda sums: load_balancing_loss(sums.top1, sums.probs, sums.num_tokens),
        reads=frozenset({"top1"}),
    )
)
