"""The mixture's compute: one function, several backends, chosen here and nowhere else.

Shapes: D in, O out, E experts, r rank of one expert, R = E * r.
"""

from __future__ import annotations

from torch import Tensor

from .concat import mixture_concat
from .pool import ExpertPool
from .reference import mixture_reference

__all__ = ["BACKENDS", "ExpertPool", "mixture"]

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
