"""The factors of linears as they are multiplied: cast to the dtype of the products, and stacked.

Shapes: D in, O out, R = E * r all ranks of one linear, G linears of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # elements; at 128 bytes every matrix begins where products like it


class Operands(NamedTuple):
    """Without gradient."""

    A: Tensor  # [G * R, D], of all linears
    Bs: Sequence[Tensor]  # [O, R], of each


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
        self.is_cast = any(factor.dtype != dtype for factor in self.factors)
        self._rows = [A.shape[0] for A in As]
        self._widths = [B.shape[1] for B in Bs[:num_pools]]
        self.shapes = [(sum(self._rows), As[0].shape[1])]
        self.shapes += [(B.shape[0], sum(self._widths)) for B in Bs[::num_pools]]

    def stacked(self) -> Operands:
        """As they are, where nothing has to be cast."""
        As, Bs, pools = self.As, self.Bs, self.num_pools
        A = As[0] if len(As) == 1 else torch.cat(list(As))
        return Operands(A, Bs if pools == 1 else [torch.cat(Bs[i : i + pools], dim=1) for i in range(0, len(Bs), pools)])

    def places(self, operands: Operands) -> list[Tensor]:
        """Where in these the factors go, each in its turn."""
        places = [operands.A] if len(self.As) == 1 else list(operands.A.split(self._rows))
        for B in operands.Bs:
            places += (B,) if self.num_pools == 1 else B.split(self._widths, dim=1)
        return places


@torch.no_grad()
def operands_of(stacks: Sequence[FactorStack]) -> list[Operands]:
    """What each group multiplies. The factors of all that have to be cast are, by one operation into one buffer.

    Args:
        stacks: on one device, of one dtype.
    """
    cast = [stack for stack in stacks if stack.is_cast]
    if not cast:
        return [stack.stacked() for stack in stacks]
    matrices = iter(_matrices(cast[0].As[0], cast[0].dtype, [shape for stack in cast for shape in stack.shapes]))
    made, places = [], []
    for stack in stacks:
        if stack.is_cast:
            A, *Bs = (next(matrices) for _ in stack.shapes)
            made.append(Operands(A, Bs))
            places += stack.places(made[-1])
        else:
            made.append(stack.stacked())
    torch._foreach_copy_(places, [factor for stack in cast for factor in stack.factors])
    return made


def _matrices(like: Tensor, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Uninitialised, side by side in one piece of memory: an allocation costs the host as much as a small product."""
    starts, end = [], 0
    for rows, columns in shapes:
        starts.append(end)
        end += -(-rows * columns // ALIGNMENT) * ALIGNMENT
    buffer = like.new_empty(end, dtype=dtype)
    return [buffer.as_strided(shape, (shape[1], 1), start) for shape, start in zip(shapes, starts, strict=True)]
