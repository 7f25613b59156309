"""Balancing losses as functions of sums over tokens (docs/maths.md). Imports torch only.

Sums, not means, because they add up over data-parallel ranks and leave padding out without indexing.
Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(assignments_E: Tensor, probs_sum_E: Tensor, num_tokens: Tensor) -> Tensor:
    """``E * sum_e f_e P_e``: 1 when balanced, E when one expert takes everything.

    f_e is expert e's share of the assignments and P_e its mean probability. With top-k assignments this is the
    auxiliary loss of GShard (arXiv:2006.16668), with top-1 assignments that of Switch (arXiv:2101.03961, eq. 4). Only
    probs_sum_E carries a gradient; f is a count.

    Args:
        assignments_E: [..., E] assignments per expert, over non-padding tokens; leading dimensions are routers.
        probs_sum_E: [..., E] sum of the routing probabilities over the same tokens.
        num_tokens: [...] number of those tokens.

    Returns:
        [...]

    Example:
        >>> probs = torch.full((8, 4), 0.25)
        >>> load_balancing_loss(torch.full((4,), 4.0), probs.sum(0), torch.tensor(8.0)).item()
        1.0
    """
    load_E = assignments_E / assignments_E.sum(-1, keepdim=True).clamp(min=1)
    return assignments_E.shape[-1] * (load_E * probs_sum_E).sum(-1) / num_tokens.clamp(min=1)


def z_loss(squared_lse_sum: Tensor, num_tokens: Tensor) -> Tensor:
    """``mean_t logsumexp(z_t)^2`` (ST-MoE, arXiv:2202.08906, eq. 5): keeps router logits small.

    Args:
        squared_lse_sum: [...] sum over non-padding tokens of the squared logsumexp of their logits.
        num_tokens: [...] number of those tokens.

    Returns:
        [...]

    Example:
        >>> logits = torch.zeros(5, 4)
        >>> total = logits.logsumexp(-1).square().sum()
        >>> round(z_loss(total, torch.tensor(5.0)).item(), 4)  # log(4) ** 2
        1.9218
    """
    return squared_lse_sum / num_tokens.clamp(min=1)


def masked_sum(values_TX: Tensor, mask_T: Tensor | None) -> Tensor:
    """Sum of values_TX [T, ...] over the tokens where mask_T [T] bool is True; None: over all.

    Example:
        >>> masked_sum(torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]), torch.tensor([True, False])).tolist()
        [1.0, 2.0]
    """
    if mask_T is None:
        return values_TX.sum(dim=0)
    shape = (-1,) + (1,) * (values_TX.dim() - 1)
    return torch.where(mask_T.view(shape), values_TX, 0).sum(dim=0)
