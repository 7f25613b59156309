"""The factors of linears as they are multiplied: stacked, and cast to the dtype of the products.

Shapes: D in, O out, R = E * r all ranks of one linear, G linears of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # elements; at 128 bytes every matrix begins where products like it


class Operands(NamedTuple):
    """What a group multiplies; the gradients are its factors' own."""

    A: Tensor  # [G * R, D], of all linears
    Bs: Sequence[Tensor]  # [O, R], of each
    is_scaled: bool = False  # the scale is in Bs
    is_weighted: bool = False  # constant routing weights are in A


class FactorStack:
    """The factors of a group's linears, and how they are stacked.

    Args:
        As: [E * r, D] of each pool of the first linear, then of the next.
        Bs: [O, E * r], likewise.
        num_pools: of each linear.
        dtype: of the products.
    """

    def __init__(self, As: Sequence[Tensor], Bs: Sequence[Tensor], num_pools: int, dtype: torch.dtype) -> None:
        self.As, self.Bs, self.num_pools, self.dtype = As, Bs, num_pools, dtype
        self.factors = (*As, *Bs)
        self.factor_dtype = self.factors[0].dtype
        self.is_made = len(As) > 1 or any(factor.dtype != dtype for factor in self.factors)
        self._rows = [A.shape[0] for A in As]
        self._widths = [B.shape[1] for B in Bs[:num_pools]]
        self.shapes = [(sum(self._rows), As[0].shape[1])]
        self.shapes += [(B.shape[0], sum(self._widths)) for B in Bs[::num_pools]]

    def split(self, A: Tensor | None, *Bs: Tensor | None) -> list[Tensor | None]:
        """Each factor's part of matrices that are stacked like this, in the order of `factors`."""
        pools = self.num_pools
        parts: list[Tensor | None] = [None] * len(self.As)
        if A is not None:
            parts = list(A.split(self._rows)) if len(self.As) > 1 else [A]
        for B in Bs:
            parts += [None] * pools if B is None else B.split(self._widths, dim=1) if pools > 1 else [B]
        return parts

    def split_gradients(
        self, dys: Sequence[Tensor | None], A: Tensor | None, *Bs: Tensor | None
    ) -> list[Tensor | None]:
        """The same of gradients. A linear whose output nobody used, which has no dy, has none, rather than zeros."""
        pools, parts = self.num_pools, self.split(A, *Bs)
        for i, dy in enumerate(dys):
            if dy is None:
                parts[i * pools : (i + 1) * pools] = [None] * pools
        return parts


def operands_of(stacks: Sequence[FactorStack]) -> list[Operands]:
    """What each group multiplies. All that has to be cast or stacked is, by one operation into one buffer.

    Args:
        stacks: on one device, of one dtype.
    """
    to_make = [stack for stack in stacks if stack.is_made]
    made = iter(_made(to_make) if to_make else ())
    operands = []
    for stack in stacks:
        A, *Bs = [next(made) for _ in stack.shapes] if stack.is_made else stack.factors
        operands.append(Operands(A, Bs))
    return operands


@torch.no_grad()
def _made(stacks: Sequence[FactorStack]) -> list[Tensor]:
    """The matrices of all stacks, in their order."""
    factors = [factor for stack in stacks for factor in stack.factors]
    matrices = _side_by_side(factors[0], stacks[0].dtype, [shape for stack in stacks for shape in stack.shapes])
    parts: list[Any] = []
    start = 0
    for stack in stacks:
        end = start + len(stack.shapes)
        parts += stack.split(*matrices[start:end])
        start = end
    torch._foreach_copy_(parts, factors)
    return matrices


def _side_by_side(like: Tensor, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Matrices, uninitialised, in one piece of memory: an allocation costs the host as much as a small product."""
    starts, end = [], 0
    for rows, columns in shapes:
        starts.append(end)
        end += -(-rows * columns // ALIGNMENT) * ALIGNMENT
    buffer = like.new_empty(end, dtype=dtype)
    return [buffer.as_strided(shape, (shape[1], 1), start) for shape, start in zip(shapes, starts, strict=True)]
