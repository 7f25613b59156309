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

from ..slots import Gates, Group, Rows, groups_of, write_gates

Stacked = tuple[Tensor, ...]
"""A linear's factors by slice, each [S, 1, ...]."""


class Weighed:
    """Mixed into the platform's wrapper.

    Attributes:
        gate: [T, R] float32 in force in the block that runs; None outside of blocks, and where no token is a mixture's.
        gates: the same by slot, where nothing is captured.
        gates_of_linear: gives them by slice of a linear, from its A factors and its input; None where no mixture has a
            router for each linear.
        reads_gates_by_slot: whether `gate` is not needed.
        multiply: multiplies shrunk activations by a gate, in place.
    """

    token_lora_indices: Tensor  # vLLM's
    reads_gates_by_slot = False
    gate: Tensor | None
    gates: Gates
    gates_of_linear: Callable[[Stacked, Tensor], list[Gates] | None] | None
    multiply: Callable[[Tensor, Tensor], object]
    _of_linear: Tensor | None  # [n, T, R], of the linear that runs
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
        by_slice = None if self.gates_of_linear is None else self.gates_of_linear(lora_a_stacked, x)
        if by_slice is not None:
            whole = x.new_ones(x.shape[0], lora_a_stacked[0].shape[2], dtype=torch.float32)
            gates = [(whole if self.gate is None else self.gate).clone() for _ in by_slice]
            for own, gate_TR in zip(by_slice, gates, strict=True):
                write_gates(own, self.groups, gate_TR)
            self._of_linear = torch.stack(gates)
        added = super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]
        self._of_linear = None
        return added

    def add_expand(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See vLLM. x [n, T, R] is overwritten."""
        if self._of_linear is not None:
            self.multiply(x, self._of_linear)
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

    reads_gates_by_slot = True
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
        by_slice = None if self.gates_of_linear is None else self.gates_of_linear(lora_a_stacked, x)
        for slot, rows in self.groups:
            tokens, own = x[rows].float(), y[rows]  # views of consecutive rows, copies of others
            rank = self.ranks.get(slot, lora_a_stacked[0].shape[2])
            gate = self.gates.get(slot)
            for index, part in enumerate(own.split(output_slices, dim=1)):
                if by_slice is not None:
                    gate = by_slice[index].get(slot, self.gates.get(slot))
                shrunk = tokens @ lora_a_stacked[index][slot, 0, :rank].float().t()
                if gate is not None:
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
    made.gate = made.gates_of_linear = made._of_linear = made._groups = None
    made.gates = {}
    made.multiply, made.ranks, made.heads = Tensor.mul_, {}, set()
    return made
