"""Routing weights on the rank blocks: ``(h * w)`` and its gradients, the one elementwise step of the mixture.

Shapes: T tokens, G linears that read the same x under the same weights, E experts, r rank, N = G * E * r.
"""

from __future__ import annotations

from torch import Tensor

from .triton import kernels_for


def weighted(h_TN: Tensor, weights_TE: Tensor, rank: int, scale: float) -> Tensor:
    """[T, N] in the dtype of h: each expert's rank block, in every linear, times the expert's weight times scale."""
    if kernels_for(h_TN):
        from .triton.weighted import weighted as kernel

        return kernel(h_TN, weights_TE, rank, scale)
    return _times(h_TN, weights_TE * scale, rank)


def weighted_backward(
    g_TN: Tensor, h_TN: Tensor, weights_TE: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For g = d loss / d weighted: weighted(h) made again, d loss / d h (both [T, N]) and d loss / d weights [T, E]."""
    if kernels_for(h_TN):
        from .triton.weighted import weighted_backward as kernel

        return kernel(g_TN, h_TN, weights_TE, rank, scale)
    products = _blocks(g_TN * h_TN, weights_TE, rank)
    dw_TE = products.sum(dim=(1, 3), dtype=weights_TE.dtype) * scale
    scaled_TE = weights_TE * scale
    return _times(h_TN, scaled_TE, rank), _times(g_TN, scaled_TE, rank), dw_TE


def _times(values_TN: Tensor, weights_TE: Tensor, rank: int) -> Tensor:
    weights = weights_TE.to(values_TN.dtype)[:, None, :, None]
    return (_blocks(values_TN, weights_TE, rank) * weights).view(values_TN.shape)


def _blocks(values_TN: Tensor, weights_TE: Tensor, rank: int) -> Tensor:
    """[T, G, E, r]."""
    T, E = weights_TE.shape
    return values_TN.view(T, values_TN.shape[1] // (E * rank), E, rank)
