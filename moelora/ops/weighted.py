"""Routing weights on the rank blocks: ``(h * w)`` and its gradients, the one elementwise step of the mixture.

Shapes: T tokens, G linears that read the same x under the same weights, E experts, r rank, N = G * E * r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton import kernels_for


def weighted(h_TN: Tensor, weights_TE: Tensor, rank: int) -> Tensor:
    """[T, N] in the dtype of h: each expert's rank block, in every linear, times the expert's weight."""
    return _times(h_TN, weights_TE, rank)


def weighted_(h_TN: Tensor, weights_TE: Tensor, rank: int) -> Tensor:
    """The same in place."""
    T, E = weights_TE.shape
    h_TN.view(T, h_TN.shape[1] // (E * rank), E, rank).mul_(weights_TE.view(T, 1, E, 1))
    return h_TN


def weighted_backward(
    g_TN: Tensor, h_TN: Tensor, weights_TE: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For g = d loss / d (scale * weighted): scale * weighted(h), d loss / d h (both [T, N]) and d loss / d weights
    [T, E]."""
    if kernels_for(h_TN):
        from .triton.weighted import weighted_backward as kernel

        return kernel(g_TN, h_TN, weights_TE, rank, scale)
    T, E = weights_TE.shape
    products = (g_TN * h_TN).view(T, h_TN.shape[1] // (E * rank), E, rank)
    dw_TE = products.sum(dim=(1, 3), dtype=weights_TE.dtype) * scale
    scaled_TE = weights_TE * scale
    return _times(h_TN, scaled_TE, rank), _times(g_TN, scaled_TE, rank), dw_TE


def _times(values_TN: Tensor, weights_TE: Tensor, rank: int) -> Tensor:
    """One launch, which multiplies in the wider of the two dtypes and rounds once."""
    T, E = weights_TE.shape
    shape = (T, values_TN.shape[1] // (E * rank), E, rank)
    weights = weights_TE.view(T, 1, E, 1)
    if values_TN.dtype is weights_TE.dtype:
        return (values_TN.view(shape) * weights).view(values_TN.shape)
    product = torch.empty_like(values_TN)
    torch.mul(values_TN.view(shape), weights, out=product.view(shape))
    return product
