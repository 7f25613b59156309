"""The factors of linears as they are multiplied: stacked, and cast to the dtype of the products.

Shapes: D in, O out, R = E * r all ranks of one linear, G linears of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 64  # elements; at 128 bytes every matrix begins where products like it


class Operands(NamedTuple):
    """What a group multiplies, with a gradient for its factors."""

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
        self.is_made = len(As) > 1 or any(factor.dtype != dtype for factor in self.factors)
        self._rows = [A.shape[0] for A in As]
        self._widths = [B.shape[1] for B in Bs[:num_pools]]
        self.shapes = [(sum(self._rows), As[0].shape[1])]
        self.shapes += [(B.shape[0], sum(self._widths)) for B in Bs[::num_pools]]

    def split(self, A: Tensor | None, *Bs: Tensor | None) -> list[Tensor | None]:
        """Each factor's part of matrices that are stacked like this, in the order of `factors`."""
        pools = self.num_pools
        parts: list[Tensor | None] = [None] * len(self.As) if A is None else list(A.split(self._rows))
        for B in Bs:
            parts += [None] * pools if B is None else B.split(self._widths, dim=1)
        return parts

    def split_gradients(self, A: Tensor | None, *Bs: Tensor | None) -> list[Tensor | None]:
        """The same of gradients. A linear whose B has none had no part in the loss, and neither had its A."""
        pools, parts = self.num_pools, self.split(A, *Bs)
        for i, B in enumerate(Bs):
            if B is None:
                parts[i * pools : (i + 1) * pools] = [None] * pools
        return parts


def operands_of(stacks: Sequence[FactorStack]) -> list[Operands]:
    """What each group multiplies. All that has to be cast or stacked is, by one operation into one buffer.

    Args:
        stacks: on one device, of one dtype.
    """
    to_make = [stack for stack in stacks if stack.is_made]
    made = iter(_Stack.apply(to_make, *(factor for stack in to_make for factor in stack.factors)) if to_make else ())
    operands = []
    for stack in stacks:
        A, *Bs = [next(made) for _ in stack.shapes] if stack.is_made else stack.factors
        operands.append(Operands(A, Bs))
    return operands


class _Stack(torch.autograd.Function):
    """The matrices of all stacks, in their order, from the factors of all; one operation each way."""

    @staticmethod
    def forward(ctx: Any, stacks: Sequence[FactorStack], *factors: Tensor) -> tuple[Tensor, ...]:
        matrices = _side_by_side(factors[0], stacks[0].dtype, [shape for stack in stacks for shape in stack.shapes])
        torch._foreach_copy_(_of_each(FactorStack.split, stacks, matrices), factors)
        ctx.stacks = stacks
        ctx.set_materialize_grads(False)
        return tuple(matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        factors = [factor for stack in ctx.stacks for factor in stack.factors]
        parts = _of_each(FactorStack.split_gradients, ctx.stacks, gradients)
        found = [i for i, part in enumerate(parts) if part is not None and ctx.needs_input_grad[1 + i]]
        made: list[Tensor | None] = [None] * len(factors)
        if found:
            like = factors[found[0]]
            results = _side_by_side(like, like.dtype, [factors[i].shape for i in found])
            torch._foreach_copy_(results, [parts[i] for i in found])
            for i, result in zip(found, results, strict=True):
                made[i] = result.to(factors[i].dtype)
        return None, *made


def _of_each(split: Callable[..., list[Any]], stacks: Sequence[FactorStack], matrices: Sequence[Any]) -> list[Any]:
    """What split makes of each stack's own matrices."""
    parts, start = [], 0
    for stack in stacks:
        end = start + len(stack.shapes)
        parts += split(stack, *matrices[start:end])
        start = end
    return parts


def _side_by_side(like: Tensor, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Matrices, uninitialised, in one piece of memory: an allocation costs the host as much as a small product."""
    starts, end = [], 0
    for rows, columns in shapes:
        starts.append(end)
        end += -(-rows * columns // ALIGNMENT) * ALIGNMENT
    buffer = like.new_empty(end, dtype=dtype)
    return [buffer.as_strided(shape, (shape[1], 1), start) for shape, start in zip(shapes, starts, strict=True)]
