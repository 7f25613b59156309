"""vLLM's LoRA products, with the ranks of mixtures weighed between the two; on a CPU, products of our own.

vLLM computes ``y += B (A x)`` for each token with its LoRA's factors by an object that it calls a punica wrapper. A
mixture is ``y += B (gate * (A x))``: one multiplication more. Shapes: T tokens, R rank, S slots, n slices of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from ..slots import Group, groups_of

Stacked = tuple[Tensor, ...]
"""A linear's factors by slice, each [S, 1, ...]."""


class Weighed:
    """Mixed into the platform's wrapper.

    Attributes:
        gate: [T, R] float32 in force in the block that runs; None outside of blocks, and where no token is a mixture's.
        gates_of_linear: gives the gates by slice of a linear, from its A factors and its input; None by linear where no
            token's mixture has a router there.
    """

    token_lora_indices: Tensor  # vLLM's
    gate: Tensor | None
    gates_of_linear: Callable[[Stacked, Tensor], list[Tensor] | None] | None
    _slice_gates: list[Tensor] | None
    _groups: list[Group] | None

    @property
    def groups(self) -> list[Group]:
        """The tokens of each slot in the batch."""
        if self._groups is None:
            self._groups = groups_of(self.token_lora_indices.tolist())
        return self._groups

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM."""
        super().update_metadata(*args, **kwargs)  # type: ignore[misc]
        self._groups = None

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: Stacked, lora_b_stacked: Stacked, *args: Any, **kwargs: Any
    ) -> Any:
        """See vLLM."""
        self._slice_gates = None if self.gates_of_linear is None else self.gates_of_linear(lora_a_stacked, x)
        added = super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]
        self._slice_gates = None
        return added

    def add_expand(self, y: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
        """See vLLM. x is [n, T, R], or n of [T, R]."""
        gate: Any = self.gate if self._slice_gates is None else torch.stack(self._slice_gates)
        if gate is not None and isinstance(x, Tensor):
            x = x * gate
        elif gate is not None:
            x = [part * own for part, own in zip(x, gate.expand(len(x), -1, -1), strict=True)]
        return super().add_expand(y, x, *args, **kwargs)  # type: ignore[misc]


class ProductsBySlot:
    """On a CPU: a product for the tokens of each slot, where vLLM gathers a matrix for every token.

    It also leaves tokens without a LoRA alone, to which vLLM applies the LoRA in the last slot when all are in use
    (vllm-project/vllm#48421).

    Attributes:
        ranks: of the LoRA in each slot; beyond it factors are zero.
    """

    ranks: dict[int, int]
    groups: list[Group]

    def add_shrink(self, y: Sequence[Tensor], x: Tensor, lora_a_stacked: Stacked, scale: float, **kwargs: Any) -> None:
        """See vLLM. y: n of [T, R] float32, zero before."""
        for slot, rows in self.groups:
            tokens, rank = x[rows].float(), self._rank(slot, lora_a_stacked[0])
            for out, factor in zip(y, lora_a_stacked, strict=True):
                out[rows, :rank] = tokens @ factor[slot, 0, :rank].float().t() * scale

    def add_expand(
        self,
        y: Tensor,
        x: Sequence[Tensor],
        lora_b_stacked: Stacked,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """See vLLM. y [T, O], in place."""
        y = y.view(-1, y.shape[-1])
        for slot, rows in self.groups:
            start = offset_start
            for part, factor, size in zip(x, lora_b_stacked, output_slices, strict=True):
                used = factor[slot, 0, :, : self._rank(slot, part)].float()
                delta = (part[rows, : used.shape[1]] @ used.t()).to(y.dtype)
                target = y[:, start : start + size]
                target[rows] = target[rows] + delta if add_inputs else delta
                start += size

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **kwargs: Any) -> None:
        """See vLLM. An embedding is never a mixture's."""
        ProductsBySlot.add_expand(self, y, [x], (lora_b_stacked,), (y.shape[-1],), **kwargs)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """See vLLM. A row is a request, not a token; where it is neither (log-probabilities of a prompt), no LoRA that
        is served may have the factors that would be needed."""
        wrapper: Any = self
        slots = wrapper.sampler_indices
        if slots.shape[0] != x.shape[0]:
            return self._refuse_logits(lora_b_stacked)
        for slot, rows in groups_of(slots.tolist()):
            shrunk = x[rows].float() @ lora_a_stacked[slot, 0].float().t() * scale
            y[rows] = y[rows] + (shrunk @ lora_b_stacked[slot, 0].float().t()).to(y.dtype)

    def _refuse_logits(self, lora_b_stacked: Tensor) -> None:
        if any(lora_b_stacked[slot].any() for slot in self.ranks):
            raise NotImplementedError(
                "prompt log-probabilities beside a LoRA of lm_head: vLLM does not say which rows are whose; ask for "
                "them without such a LoRA"
            )

    def _rank(self, slot: int, like: Tensor) -> int:
        return self.ranks.get(slot, like.shape[-1])


def weighed(wrapper: Any) -> Any:
    """The same wrapper, of a class that weighs; it shares what the other has."""
    cls = type(wrapper)
    own = (Weighed, ProductsBySlot) if cls is PunicaWrapperCPU else (Weighed,)
    made: Any = object.__new__(type(f"Weighed{cls.__name__}", (*own, cls), {}))
    made.__dict__ = wrapper.__dict__
    made.gate = made.gates_of_linear = made._slice_gates = made._groups = None
    made.ranks = {}
    return made
