"""LoRA for serving: every token belongs to a slot, or to none, and every slot holds the factors of one LoRA.

The factors of all slots are stacked and never move, so that a CUDA graph captured once multiplies by whatever they hold
later. `add_slot_lora_reference` says what is correct; triton/slot_lora.py does it on a GPU.

Shapes: T tokens, D width of the input, O of an output, R rank, S slots, n outputs of one input (slices), G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokensBySlot:
    """A batch's tokens, sorted by slot: a group for each slot that occurs, in any order. All [G] or [T] int32.

    Attributes:
        slots: [G], of each group; what is no slot is a group of tokens without a LoRA, or none at all. No slot twice.
        counts: [G], tokens in each group.
        starts: [G] or longer, where each group begins in `tokens`.
        tokens: [T] or longer, indices of rows; those that are no row are left out.
    """

    slots: Tensor
    counts: Tensor
    starts: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, slot_T: Tensor, num_slots: int) -> TokensBySlot:
        """Sort a batch; slot_T [T] integers, -1 where a token has no LoRA. The host waits for nothing."""
        slots = torch.arange(-1, num_slots, device=slot_T.device)
        counts = (slot_T == slots[:, None]).sum(dim=1)
        return cls(*(part.int() for part in (slots, counts, counts.cumsum(0) - counts, slot_T.argsort(stable=True))))


def add_slot_lora_reference(
    y_TO: Tensor,
    x_TD: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    slot_T: Tensor,
    gate: Tensor | None = None,
) -> None:
    """Add ``B (gate * (A x))`` of each token's slot to y, output by output. The host waits for the slots' tokens.

    Products are summed in float32; the shrunk activations are rounded to the dtype of B before they are expanded, as in
    vLLM, and the sum with y to that of y, once, where vLLM rounds the product before it adds it, too.

    Args:
        y_TO: [T, sum of O], in place; the outputs lie side by side.
        x_TD: [T, D].
        a: n of [S, 1, R, D].
        b: n of [S, 1, O, R].
        slot_T: [T] integers; any number that is no slot means none.
        gate: [T, R], or [n, T, R], float32; None stands for ones.
    """
    for slot in range(a[0].shape[0]):
        tokens = (slot_T == slot).nonzero().flatten()
        start = 0
        for index, (a_SRD, b_SOR) in enumerate(zip(a, b, strict=True)):
            shrunk = x_TD[tokens].float() @ a_SRD[slot, 0].float().t()
            if gate is not None:
                shrunk *= (gate if gate.dim() == 2 else gate[index])[tokens]
            columns = slice(start, start := start + b_SOR.shape[2])
            product = shrunk.to(b_SOR.dtype).float() @ b_SOR[slot, 0].float().t()
            y_TO[tokens, columns] = (y_TO[tokens, columns].float() + product).to(y_TO.dtype)
