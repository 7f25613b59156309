"""What a product saves of its input: the input, or that of which it is a product, which autograd keeps in any case.

``down_proj(act(gate) * up)``: backward of the product in the brackets keeps act(gate) and up. To make what down_proj
reads of them again is one launch in place of a tensor as wide as the MLP for every block. Liger's kernels keep gate
and up alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_BYTES = 64 * 2**20  # below, where the host is waited for, a launch is worth more than the memory
_LIGERS = {"LigerSiLUMulFunctionBackward", "LigerGELUMulFunctionBackward"}
_MULTIPLIERS = ("gate_multiplier", "down_multiplier")


class Source(NamedTuple):
    """Of what a tensor is made again."""

    tensors: Sequence[Tensor]
    make: Callable[..., Tensor]  # called with them


def source_of(x: Tensor) -> Source:
    """Of what x can be made again, to the last bit: the factors that its autograd node has saved, or else x itself."""
    node = x.grad_fn
    if node is None or x.numel() * x.element_size() < MIN_BYTES or _is_watched():
        return Source([x], _itself)
    found = None
    if node.name() == "MulBackward0":
        found = Source([node._saved_self, node._saved_other], torch.mul)  # type: ignore[attr-defined]
    elif node.name() in _LIGERS:
        found = Source(node.saved_tensors, _Again(node))  # type: ignore[attr-defined]
    is_saved = found is not None and all(tensor is not None for tensor in found.tensors)
    return found if found is not None and is_saved else Source([x], _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def _is_watched() -> bool:
    """Whether somebody (a checkpoint, offloading) keeps saved tensors elsewhere; to ask for one has side effects."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _Again:
    """Runs the forward of one of Liger's functions again."""

    def __init__(self, node: Any) -> None:
        self._function = node._forward_cls
        self._multipliers = [getattr(node, name) for name in _MULTIPLIERS if hasattr(node, name)]

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._function.forward(_NoContext(), *tensors, *self._multipliers)


class _NoContext:
    """Stands in for the context of an autograd function that runs for its result alone."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps nothing."""
