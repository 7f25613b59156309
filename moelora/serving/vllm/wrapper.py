"""vLLM's LoRA products, with the ranks of mixtures weighed between the two; on a CPU, products of our own.

vLLM computes ``y += B (A x)`` for each token with its LoRA's factors by an object that it calls a punica wrapper. A
mixture is ``y += B (gate * (A x))``: one multiplication more. Shapes: T tokens, R rank, S slots, n slices of a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from ..slots import Group, Rows, groups_of

Stacked = tuple[Tensor, ...]
"""A linear's factors by slice, each [S, 1, ...]."""


class Weighed:
    """Mixed into the platform's wrapper.

    Attributes:
        gate: [T, R] float32 in force in the block that runs; None outside of blocks, and where no token is a mixture's.
        gates_of_linear: gives the gates by slice of a linear, from its A factors and its input; None where no mixture
            has a router for each linear.
        multiply: multiplies shrunk activations by a gate, in place.
    """

    token_lora_indices: Tensor  # vLLM's
    gate: Tensor | None
    gates_of_linear: Callable[[Stacked, Tensor], list[Tensor] | None] | None
    multiply: Callable[[Tensor, Tensor], object]
    _gates: list[Tensor] | None  # by slice, of the linear that runs
    _groups: list[Group] | None

    @property
    def groups(self) -> list[Group]:
        """The tokens of each slot in the batch; another list for every batch."""
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
        self._gates = None if self.gates_of_linear is None else self.gates_of_linear(lora_a_stacked, x)
        added = super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]
        self._gates = None
        return added

    def add_expand(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See vLLM. x [n, T, R] is overwritten."""
        if self._gates is not None:
            self.multiply(x, torch.stack(self._gates))
        elif self.gate is not None:
            self.multiply(x, self.gate)
        return super().add_expand(y, x, *args, **kwargs)  # type: ignore[misc]


class ProductsBySlot(Weighed):
    """On a CPU: two products for the tokens of each slot, where vLLM gathers a matrix for every token.

    It also leaves tokens without a LoRA alone, to which vLLM applies the LoRA in the last slot when all are in use
    (vllm-project/vllm#48421).

    Attributes:
        ranks: of the LoRA in each slot; beyond it factors are zero.
        heads: the slots whose LoRA acts on the logits.
    """

    ranks: dict[int, int]
    heads: set[int]
    sampler_indices: Tensor  # vLLM's

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Stacked,
        lora_b_stacked: Stacked,
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """See vLLM. y [T, O], in place; the scale is in the factors and 1 here."""
        gates = None if self.gates_of_linear is None else self.gates_of_linear(lora_a_stacked, x)
        for slot, rows in self.groups:
            tokens, own = x[rows].float(), y[rows]  # views of consecutive rows, copies of others
            rank = self.ranks.get(slot, lora_a_stacked[0].shape[2])
            gate = None if self.gate is None else self.gate[rows, :rank]
            for index, part in enumerate(own.split(output_slices, dim=1)):
                shrunk = tokens @ lora_a_stacked[index][slot, 0, :rank].float().t()
                if gates is not None:
                    shrunk *= gates[index][rows, :rank]
                elif gate is not None:
                    shrunk *= gate
                _add_product(part, shrunk, lora_b_stacked[index][slot, 0, :, :rank])
            _write_back(y, rows, own)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """See vLLM. An embedding is never a mixture's."""
        for slot, rows in self.groups:
            own = y[rows]
            _add_product(own, x[rows].float(), lora_b_stacked[slot, 0])
            _write_back(y, rows, own)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """See vLLM. A row is a request here; or a token of a prompt whose log-probabilities are asked for, and then
        vLLM does not say whose.

        Raises:
            NotImplementedError: that would have to be known, because a LoRA acts on the logits.
        """
        if not self.heads:
            return
        if self.sampler_indices.shape[0] != x.shape[0]:
            raise NotImplementedError(
                "log-probabilities of prompts beside a LoRA of lm_head: vLLM does not say which rows are whose; "
                "unload that LoRA, or do not ask for them"
            )
        for slot, rows in groups_of(self.sampler_indices.tolist()):
            if slot not in self.heads:
                continue
            own, B_VR = y[rows], lora_b_stacked[slot, 0]  # logits beyond the vocabulary fill a multiple of 64
            _add_product(own[:, : len(B_VR)], x[rows].float() @ lora_a_stacked[slot, 0].float().t(), B_VR)
            _write_back(y, rows, own)


def _add_product(y: Tensor, shrunk: Tensor, factor: Tensor) -> None:
    """y += shrunk @ factor^T, computed in float32."""
    if y.dtype == factor.dtype == torch.float32:
        y.addmm_(shrunk, factor.t())
    else:
        y += (shrunk @ factor.float().t()).to(y.dtype)


def _write_back(y: Tensor, rows: Rows, own: Tensor) -> None:
    if not isinstance(rows, slice):
        y[rows] = own


def weighed(wrapper: Any) -> Any:
    """The same wrapper, of a class that weighs; it shares what the other has."""
    cls = type(wrapper)
    own = ProductsBySlot if cls is PunicaWrapperCPU else Weighed
    made: Any = object.__new__(type(f"Weighed{cls.__name__}", (own, cls), {}))
    made.__dict__ = wrapper.__dict__
    made.gate = made.gates_of_linear = made._gates = made._groups = None
    made.multiply, made.ranks, made.heads = Tensor.mul_, {}, set()
    return made
