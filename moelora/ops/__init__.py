"""The mixture's compute: one function, several backends, chosen here and nowhere else.

Shapes: D in, O out, E experts, r rank of one expert, R = E * r.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .concat import mixture_concat
from .fused import can_fuse, mixture_fused
from .pool import ExpertPool
from .reference import mixture_reference

__all__ = ["BACKENDS", "ExpertPool", "can_fuse", "mixture", "mixture_fused", "mixture_linear"]

BACKENDS = {"concat": mixture_concat, "reference": mixture_reference}


def mixture(x: Tensor, pools: list[ExpertPool], weights: Tensor, *, backend: str = "concat") -> Tensor:
    """``sum_e weights_e * scaling_e * B_e A_e dropout(x)`` for every token.

    Args:
        x: [..., D], in the dtype of the factors.
        pools: the adapters' factors, in expert order.
        weights: [..., E] routing weights, E being the experts of all pools together.
        backend: "concat" (one product over all ranks) or "reference" (a loop over experts; what the others are
            tested against).

    Returns:
        [..., O] in the dtype of the factors.

    Raises:
        ValueError: backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` ({backend!r}) is not one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](x, pools, weights)


def mixture_linear(
    base_layer: nn.Module, x: Tensor, pools: list[ExpertPool], weights: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """base_layer(x) plus the mixture, by the fastest form that serves this base layer.

    Args:
        args, kwargs: passed on to the base layer.

    Returns:
        [..., O] in the dtype of the base layer's output.
    """
    if not args and not kwargs and can_fuse(base_layer, pools):
        return mixture_fused(base_layer, x, pools, weights)
    result = base_layer(x, *args, **kwargs)
    delta = mixture(x.to(pools[0].lora_A.dtype), pools, weights)
    return (result + delta).to(result.dtype)
