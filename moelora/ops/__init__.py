"""The mixture's compute: one function, several backends, chosen here and nowhere else.

Shapes: D in, O out, E experts, r rank of one expert, R = E * r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .autocast import compute_dtype
from .concat import mixture_concat
from .expert_pairs import ExpertPairs, chooses_sparse
from .fused import FusedGroup, Reader, can_fuse, is_plain, launches_cost_most, mixture_fused, scaled_weights
from .gathered import serves_sparse
from .operands import Operands, operands_of
from .pool import ExpertPool, drop_rate
from .reference import mixture_reference
from .sparse import mixture_sparse
from .transforms import is_transformed

__all__ = [
    "BACKENDS",
    "ExpertPairs",
    "ExpertPool",
    "FusedGroup",
    "Operands",
    "Reader",
    "can_fuse",
    "chooses_sparse",
    "compute_dtype",
    "drop_rate",
    "is_plain",
    "is_transformed",
    "launches_cost_most",
    "mixture",
    "mixture_by_expert",
    "mixture_fused",
    "mixture_linear",
    "mixture_sparse",
    "operands_of",
    "scaled_weights",
    "serves_sparse",
]

BACKENDS = {"concat": mixture_concat, "reference": mixture_reference}


def mixture(x: Tensor, pools: Sequence[ExpertPool], weights: Tensor, *, backend: str = "concat") -> Tensor:
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


def mixture_linear(x: Tensor, reader: Reader, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The reader's base layer applied to x [..., D] plus the mixture, by the fastest form that serves it.

    Args:
        args, kwargs: passed on to the base layer.

    Returns:
        [..., O] in the dtype of the base layer's output.
    """
    if can_fuse(reader.pools):
        if args or kwargs:
            reader = Reader(_given(reader.base_layer, args, kwargs), reader.pools)
        return mixture_fused(x, [reader], weights)[0]
    return _base_plus_mixture(x, reader, weights, "concat", args, kwargs)


def _given(base_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def called(x: Tensor) -> Tensor:
        return base_layer(x, *args, **kwargs)

    return called


def mixture_by_expert(x: Tensor, reader: Reader, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[`mixture_linear`] expert by expert, each in the very operations, in their order, of PEFT's plain LoRA.

    With one expert of weight 1 it is that LoRA, bit for bit: in products over all ranks at once the sums would be
    rounded in another order.
    """
    return _base_plus_mixture(x, reader, weights, "reference", args, kwargs)


def _base_plus_mixture(
    x: Tensor, reader: Reader, weights: Tensor, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    result = reader.base_layer(x, *args, **kwargs)
    delta = mixture(x.to(reader.pools[0].lora_A.dtype), reader.pools, weights, backend=backend)
    return (result + delta).to(result.dtype)
