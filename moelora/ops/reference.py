"""The reference: a loop over experts. It defines what is correct; nothing is fast here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pool import ExpertPool


def mixture_reference(x: Tensor, pools: Sequence[ExpertPool], weights: Tensor) -> Tensor:
    """See [`moelora.ops.mixture`]."""
    total = torch.zeros((*x.shape[:-1], pools[0].lora_B.shape[0]), dtype=x.dtype, device=x.device)
    expert = 0
    for pool in pools:
        dropped = pool.dropout(x)
        for i in range(pool.num_experts):
            block = slice(i * pool.rank, (i + 1) * pool.rank)
            delta = F.linear(F.linear(dropped, pool.lora_A[block]), pool.lora_B[:, block]) * pool.scaling
            total = total + weights[..., expert, None].to(x.dtype) * delta  # exactly delta where the weight is 1
            expert += 1
    return total
