"""Routing weights on the rank blocks: ``(h * w)`` and its gradients, the one elementwise step of the mixture.

Shapes: T tokens, E experts, r rank, R = E * r.
"""

from __future__ import annotations

from torch import Tensor

from .triton import kernels_for


def weighted(h_TR: Tensor, weights_TE: Tensor, scale: float) -> Tensor:
    """[T, R] in the dtype of h: each expert's rank block of h_TR times its weight times scale."""
    if kernels_for(h_TR):
        from .triton.gate import weighted as kernel

        return kernel(h_TR, weights_TE, scale)
    return _times(h_TR, weights_TE, scale)


def weighted_backward(g_TR: Tensor, h_TR: Tensor, weights_TE: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """For g = d loss / d weighted: weighted(h) made again, d loss / d h (both [T, R]) and d loss / d weights [T, E]."""
    if kernels_for(h_TR):
        from .triton.gate import weighted_backward as kernel

        return kernel(g_TR, h_TR, weights_TE, scale)
    num_experts = weights_TE.shape[-1]
    products = (g_TR * h_TR).unflatten(-1, (num_experts, -1))
    dw_TE = products.sum(-1, dtype=weights_TE.dtype) * scale
    return _times(h_TR, weights_TE, scale), _times(g_TR, weights_TE, scale), dw_TE


def _times(values_TR: Tensor, weights_TE: Tensor, scale: float) -> Tensor:
    blocks = values_TR.unflatten(-1, (weights_TE.shape[-1], -1))
    return (blocks * (weights_TE * scale).to(values_TR.dtype).unsqueeze(-1)).flatten(-2)
