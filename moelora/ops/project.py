"""``h = x A^T`` once for all linears that read x, and one gradient of x for all of them.

q, k and v read the same x, as do gate and up. One product with their factors stacked reads x once, and in backward
their parts of dx are summed in place instead of by one addition each.

Letters: T tokens, D in, O out, R ranks of one linear's experts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .pool import ExpertPool


@dataclass(frozen=True)
class Projection:
    """What one linear needs of x."""

    x: Tensor  # [T, D], without gradient history
    h: Tensor  # [T, R]
    gradient: InputGradient


class InputGradient:
    """dx of one x, from the backward of every linear that reads it until the backward of their shared projection.

    The projection's node runs after the linears', because they hand it the gradient of h, and only it returns dx. Sums
    belong to one backward pass: what an interrupted or partial one left behind is not taken for another's.

    Args:
        wanted: x needs a gradient.
        num_readers: linears that read x.
    """

    def __init__(self, wanted: bool, num_readers: int) -> None:
        self.wanted = wanted
        self.is_shared = num_readers > 1
        self._task = -1
        self._sum: Tensor | None = None
        self._postponed: tuple[Tensor, Tensor] | None = None

    def add(self, dy: Tensor, weight: Tensor) -> None:
        """Add dy [T, O] @ weight [O, D], the frozen product's part."""
        self._enter()
        if not self.is_shared:
            self._postponed = (dy, weight)  # onto the projection's part: writing that one first saves reading it twice
        elif self._sum is None:
            self._sum = dy @ weight
        else:
            self._sum.addmm_(dy, weight)

    def finish(self, dh: Tensor, lora_A: Tensor, kept: Tensor | None, keep_rate: float) -> Tensor:
        """dx [T, D]: what was added plus dh [T, R] @ lora_A [R, D], the latter through dropout."""
        self._enter()
        dx, postponed = self._sum, self._postponed
        self._sum = self._postponed = None
        if kept is not None:
            through = (dh @ lora_A).mul_(kept).div_(keep_rate)
            dx = through if dx is None else dx.add_(through)
        else:
            dx = dh @ lora_A if dx is None else dx.addmm_(dh, lora_A)
        return dx if postponed is None else dx.addmm_(*postponed)

    def _enter(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._sum, self._postponed = task, None, None


class _Project(torch.autograd.Function):
    """One h [T, R] for each linear, from x [T, D] and their factors [R, D], which are cast to the dtype of x.

    Saved are x and the factors; of dropout one byte per element of x, not a copy of x.
    """

    @staticmethod
    def forward(ctx: Any, gradient, sizes, drop_rate, x, *factors):
        lora_A = stacked(factors, x.dtype)
        kept, dropped = None, x
        if drop_rate > 0:
            dropped, kept = torch.native_dropout(x, drop_rate, True)
        h = dropped @ lora_A.t()
        ctx.save_for_backward(x, lora_A, kept)
        ctx.gradient, ctx.keep_rate = gradient, 1 - drop_rate
        ctx.factors = [(factor.shape[0], factor.dtype) for factor in factors]
        return h.split(sizes, dim=-1) if len(sizes) > 1 else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dhs: Tensor):
        x, lora_A, kept = ctx.saved_tensors
        dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs, dim=-1)
        dx, dA = None, [None] * len(ctx.factors)
        needs_x, *needs_A = ctx.needs_input_grad[3:]
        if any(needs_A):
            read = x if kept is None else (x * kept).div_(ctx.keep_rate)
            pieces = (dh.t() @ read).split([rows for rows, _ in ctx.factors])
            dA = [piece.to(dtype) for piece, (_, dtype) in zip(pieces, ctx.factors, strict=True)]
        if needs_x:
            dx = ctx.gradient.finish(dh, lora_A, kept, ctx.keep_rate)
        return None, None, None, dx, *dA


def project(x: Tensor, readers: Sequence[Sequence[ExpertPool]]) -> list[Projection]:
    """One projection of x [..., D] for each linear, whose pools are given; all must drop out alike."""
    x = x.to(compute_dtype(x)).flatten(0, -2)
    gradient = InputGradient(wanted=x.requires_grad and torch.is_grad_enabled(), num_readers=len(readers))
    sizes = [sum(pool.lora_A.shape[0] for pool in pools) for pools in readers]
    factors = [pool.lora_A for pools in readers for pool in pools]
    with torch.autocast(x.device.type, enabled=False):
        hs = _Project.apply(gradient, sizes, readers[0][0].drop_rate, x, *factors)
    read = x.detach()
    return [Projection(read, h, gradient) for h in (hs if isinstance(hs, tuple) else (hs,))]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes x in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def stacked(factors: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    """The factors in dtype, side by side."""
    cast = [factor.to(dtype) for factor in factors]
    return cast[0] if len(cast) == 1 else torch.cat(cast, dim=dim)
