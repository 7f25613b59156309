"""Products of the rows of sorted pairs with the factors of their experts, and the factors' gradients.

Each takes a factor as [E, r, W], a view of A [E * r, D] or B [O, E * r]; W is that linear's input or output width.
Here is the readable form, a loop over experts for which the host has to know where each one's pairs end: it serves the
CPU and defines what is correct. On a GPU triton/gathered.py gathers rows inside its products.
Shapes: T tokens, E experts, r rank, W width, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .expert_pairs import ExpertPairs
from .triton import kernels_for


def serves_sparse(x: Tensor) -> bool:
    """Whether these serve x without making the host wait: on a GPU, where the kernels do."""
    return not x.is_cuda or kernels_for(x)


def shrink(x_TW: Tensor, factor_ErW: Tensor, pairs: ExpertPairs, out_Pr: Tensor) -> None:
    """Write each pair's token times its expert's factor, rounded to the dtype of x; zero for a pair of no expert."""
    if kernels_for(x_TW):
        from .triton.gathered import shrink as kernel

        return kernel(x_TW, factor_ErW, pairs, out_Pr)
    out_Pr.zero_()
    for expert, rows in _rows_of_experts(pairs):
        out_Pr[rows] = x_TW[pairs.tokens[rows]] @ factor_ErW[expert].t().to(x_TW.dtype)
    return None


def expand(h_Pr: Tensor, factor_ErW: Tensor, pairs: ExpertPairs, onto: Tensor | None = None) -> Tensor:
    """[T, W] in the dtype of h: each token's pairs times their experts' factors, summed.

    Args:
        onto: [T, W], contiguous, what the sum is added to, in place; None: zeros.
    """
    if kernels_for(h_Pr):
        from .triton.gathered import expand as kernel

        return kernel(h_Pr, factor_ErW, pairs, onto)
    y_TW = h_Pr.new_zeros(pairs.num_tokens, factor_ErW.shape[2]) if onto is None else onto
    for expert, rows in _rows_of_experts(pairs):
        y_TW.index_add_(0, pairs.tokens[rows], h_Pr[rows] @ factor_ErW[expert].to(h_Pr.dtype))
    return y_TW


def factor_gradient(h_Pr: Tensor, x_TW: Tensor, pairs: ExpertPairs, out_ErW: Tensor) -> None:
    """Write ``sum of h_p x_t^T`` over each expert's pairs p, t being p's token; zero for an expert without any."""
    if kernels_for(x_TW):
        from .triton.gathered import factor_gradient as kernel

        return kernel(h_Pr, x_TW, pairs, out_ErW)
    out_ErW.zero_()
    for expert, rows in _rows_of_experts(pairs):
        out_ErW[expert] = h_Pr[rows].t() @ x_TW[pairs.tokens[rows]]
    return None


def _rows_of_experts(pairs: ExpertPairs) -> Iterator[tuple[int, slice]]:
    """Every expert that has any pairs, and which."""
    start = 0
    for expert, end in enumerate(pairs.ends.view(-1, pairs.num_slots)[:-1, -1].tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
