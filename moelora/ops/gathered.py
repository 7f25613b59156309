"""Products of the rows of sorted pairs with the factors of their experts, and the factors' gradients.

Each takes the factors of G linears that share the rows, as [E, r, W]: views of A [E * r, D] or B [O, E * r], W being
that linear's input or output width. Here is the readable form, a loop over experts for which the host has to know where
each one's pairs end: it serves the CPU and defines what is correct. On a GPU triton/gathered.py gathers rows inside its
products.
Shapes: T tokens, E experts, r rank, W width, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .expert_pairs import ExpertPairs
from .triton import kernels_for


def serves_sparse(x: Tensor) -> bool:
    """Whether these serve x without making the host wait: on a GPU, where the kernels do."""
    return not x.is_cuda or kernels_for(x)


def shrink(x_TW: Tensor, factors_ErW: Sequence[Tensor], pairs: ExpertPairs, out_GPr: Tensor) -> None:
    """Write each pair's token times its expert's factors, rounded to the dtype of x; zero for a pair of no expert."""
    if kernels_for(x_TW):
        from .triton.gathered import shrink as kernel

        return kernel(x_TW, factors_ErW, pairs, out_GPr)
    out_GPr.zero_()
    for expert, rows in _rows_of_experts(pairs):
        for out_Pr, factor_ErW in zip(out_GPr, factors_ErW, strict=True):
            out_Pr[rows] = x_TW[pairs.tokens[rows]] @ factor_ErW[expert].t().to(x_TW.dtype)
    return None


def expand(
    h_GPr: Tensor, factors_ErW: Sequence[Tensor], pairs: ExpertPairs, out_TW: Tensor, adds: bool = False
) -> None:
    """Write each token's pairs times their experts' factors, summed over pairs and linears.

    Args:
        out_TW: contiguous, of the dtype of h.
        adds: to what is there, instead.
    """
    if kernels_for(h_GPr):
        from .triton.gathered import expand as kernel

        return kernel(h_GPr, factors_ErW, pairs, out_TW, adds)
    if not adds:
        out_TW.zero_()
    for expert, rows in _rows_of_experts(pairs):
        for h_Pr, factor_ErW in zip(h_GPr, factors_ErW, strict=True):
            out_TW.index_add_(0, pairs.tokens[rows], h_Pr[rows] @ factor_ErW[expert].to(h_Pr.dtype))
    return None


def factor_gradients(h_GPr: Tensor, x_TW: Tensor, pairs: ExpertPairs, outs_ErW: Sequence[Tensor]) -> None:
    """Write ``sum of h_p x_t^T`` over each expert's pairs p, t being p's token; zero for an expert without any."""
    if kernels_for(x_TW):
        from .triton.gathered import factor_gradients as kernel

        return kernel(h_GPr, x_TW, pairs, outs_ErW)
    for out_ErW in outs_ErW:
        out_ErW.zero_()
    for expert, rows in _rows_of_experts(pairs):
        for h_Pr, out_ErW in zip(h_GPr, outs_ErW, strict=True):
            out_ErW[expert] = h_Pr[rows].t() @ x_TW[pairs.tokens[rows]]
    return None


def _rows_of_experts(pairs: ExpertPairs) -> Iterator[tuple[int, slice]]:
    """Every expert that has any pairs, and which."""
    start = 0
    for expert, end in enumerate(pairs.ends.view(-1, pairs.num_slots)[:-1, -1].tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
