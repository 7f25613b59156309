"""The best products of low rank: of a product, of a matrix, and of a linear map that is known by what it does to data.

Imports torch only. Shapes: O out, D in, N ranks of all factors together, r the rank asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_product(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of lora_B @ lora_A of a rank (Eckart and Young, 1936), without forming that product.

    B = Q1 R1 and Aᵀ = Q2 R2, so the singular values of the product are those of R1 R2ᵀ, which is [N, N] at most.

    Args:
        lora_A: [N, D]; lora_B: [O, N].

    Returns:
        A [r, D] and B [O, r], of equal norms; zero beyond the rank of the product.

    Example:
        >>> lora_A, lora_B = truncated_product(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3), rank=2)
        >>> (lora_B @ lora_A).round(decimals=4).abs().diagonal().tolist()
        [3.0, 2.0, 0.0]
    """
    basis_B, core_B = torch.linalg.qr(lora_B)
    basis_A, core_A = torch.linalg.qr(lora_A.T)
    low_A, low_B = truncated(core_B @ core_A.T, rank)
    return low_A @ basis_A.T, basis_B @ low_B


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [O, r], of equal norms, whose product is the best approximation of matrix [O, D]."""
    U, singular, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found = min(rank, len(singular))
    root = singular[:found].sqrt()
    lora_A, lora_B = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(len(matrix), rank)
    lora_A[:found] = root[:, None] * Vh[:found]
    lora_B[:, :found] = U[:, :found] * root
    return lora_A, lora_B


def reduced_rank_regression(
    left: Tensor, start: Tensor, rest: Tensor, second: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The map W of a rank that minimises Σ_t |y_t - W x_t|² (Izenman, 1975), y_t lying in the span of left.

    C = Σ x xᵀ = L Lᵀ. Unrestricted least squares are W* = Σ y xᵀ C⁻¹; what a smaller rank loses is |(W - W*) L|, so
    W L is the best approximation of W* L. Σ y xᵀ is given as left · (start · C + rest), that is
    W* = left · (start + rest · C⁻¹): what start explains is not divided by the rounding of C.

    Args:
        left: [O, N]; start, rest: [N, D]; second: [D, D] = C, positive definite.

    Returns:
        A [r, D] and B [O, r].
    """
    root = torch.linalg.cholesky(second)
    whitened = start @ root + torch.linalg.solve_triangular(root, rest.T, upper=False).T
    lora_A, lora_B = truncated_product(whitened, left, rank)
    return torch.linalg.solve_triangular(root, lora_A, upper=False, left=False), lora_B
