"""Balancing without a loss: a bias of each expert decides with the scores who is chosen (arXiv:2408.15664).

Shapes: R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .balancing import BalancingLoss, load_loss, register_balancing_loss


def bias_steps(counts_RE: Tensor, speed: float, groups: Sequence[int] | None = None) -> Tensor:
    """What the biases [R, E] move by after a step in which experts took counts_RE: up for who took less than the mean.

    Args:
        counts_RE: assignments of one optimizer step, over all ranks.
        speed: u of the paper.
        groups: sizes of the groups of experts among which the load is balanced; None: all together.

    Example:
        >>> bias_steps(torch.tensor([[6.0, 1.0, 2.0]]), 0.5).tolist()
        [[-0.5, 0.5, 0.5]]
    """
    pieces = counts_RE.float().split(list(groups) if groups else counts_RE.shape[-1], dim=-1)
    return torch.cat([torch.sign(piece.mean(-1, keepdim=True) - piece) * speed for piece in pieces], dim=-1)


register_balancing_loss(
    BalancingLoss(
        name="loss_free",
        help="no loss: a bias moves towards idle experts",
        formula="none; b_e += u · sign(mean load - load_e) after each step, and S is chosen by score + b",
        source="Loss-Free Balancing, arXiv:2408.15664; DeepSeek-V3",
        of=lambda sums: load_loss(sums).detach(),
        is_optimised=False,
        moves_bias=True,
    )
)
