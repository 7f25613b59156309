"""Experts concatenated along the rank: each rank block of ``h = x A^T`` is multiplied by its expert's weight.

Autograd differentiates it, so it serves wherever fused.py does not, and torch.compile fuses it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pool import ExpertPool


def mixture_concat(x: Tensor, pools: Sequence[ExpertPool], weights: Tensor) -> Tensor:
    """See [`moelora.ops.mixture`]."""
    hidden = [F.linear(pool.dropout(x), pool.lora_A) for pool in pools]
    shares = weights.split([pool.num_experts for pool in pools], dim=-1)
    weighted = [h * _per_rank(share, pool).to(h.dtype) for h, share, pool in zip(hidden, shares, pools, strict=True)]
    if len(pools) == 1:
        return F.linear(weighted[0], pools[0].lora_B)
    return F.linear(torch.cat(weighted, dim=-1), torch.cat([pool.lora_B for pool in pools], dim=1))


def _per_rank(weights: Tensor, pool: ExpertPool) -> Tensor:
    """[..., E] -> [..., E * r]: each expert's weight, scaled, once for every rank of its block."""
    return (weights * pool.scaling).unsqueeze(-1).expand(*weights.shape, pool.rank).flatten(-2)
