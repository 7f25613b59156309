"""Subspaces that a layer's inputs span: the memory of gradient projection (Saha et al. 2021, arXiv:2103.09762).

Letters: D width of the inputs, m directions in a memory: [D, m], orthonormal columns, P the projector on them. C [D, D]
is the sum of x x^T over inputs x.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

FOUND = 256  # directions that are looked for at a time; a task's inputs have next to nothing in the others


class Leading(NamedTuple):
    """What lies outside of a memory.

    Args:
        directions: left singular vectors of (1 - P) C as columns [D, k], the leading first, k at most FOUND.
        shares: [k] of |C|_F^2.
        total: the share of all of (1 - P) C, what is not among the directions included.
    """

    directions: Tensor
    shares: Tensor
    total: Tensor


def leading(covariances: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Leading]:
    """By the name of each input. All of one width are decomposed together."""
    by_width: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, C in covariances.items():
        by_width[len(C)][name] = outside(C, memory.get(name)) / torch.linalg.matrix_norm(C)
    found = {}
    for width, rests in by_width.items():
        vectors, squares = _left_singular(torch.stack(list(rests.values())), min(FOUND, width))
        for name, rest, shares, directions in zip(rests, rests.values(), squares, vectors, strict=True):
            found[name] = Leading(directions, shares, rest.square().sum())
    return found


def _left_singular(matrices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors of [N, D, D] as columns [N, D, k], and their squared values [N, k].

    As torch.svd_lowrank, but by an eigendecomposition at its end: a GPU's SVD fails where many values are alike.
    """
    basis = torch.randn(*matrices.shape[:-1], number, dtype=matrices.dtype, device=matrices.device)
    for _ in range(3):
        basis = torch.linalg.qr(matrices @ (matrices.mT @ basis))[0]
    rows = basis.mT @ matrices
    squares, turned = torch.linalg.eigh(rows @ rows.mT)
    return basis @ turned.flip(-1), squares.flip(-1).clamp(min=0)


def extended(memory: Tensor | None, found: Leading, epsilon: float) -> Tensor:
    """[D, m + k] with the smallest k that leaves shares of at most 1 - epsilon together outside, or all directions."""
    directions, shares, total = found
    left = total - torch.cat([shares.new_zeros(1), shares.cumsum(0)])
    count = int((left > 1 - epsilon).sum())
    if memory is None:
        return directions[:, :count].clone()  # a view would keep those of all linears
    new = outside(directions[:, : min(count, len(memory) - memory.shape[1])], memory)
    return torch.linalg.qr(torch.cat([memory, new], dim=1))[0]


def outside(columns: Tensor, memory: Tensor | None) -> Tensor:
    """(1 - P) times columns [D, n]."""
    return columns if memory is None else columns - memory @ (memory.T @ columns)
