"""The mixtures that are being served, each in a slot of its own, and what weighs the ranks of a batch's tokens.

The readable form, on any device and for every router type; ops/slot_tables.py has the form for CUDA graphs.
Shapes: T tokens, H router input width, R rank that a server keeps for every LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..routing.pooled import AddUp
from .mixture import ServedMixture

Rows = slice | Tensor
"""Some of a batch's tokens: a slice, or their indices."""
Group = tuple[int, Rows]
"""A slot with the tokens that use it."""


def groups_of(slots: Sequence[int]) -> list[Group]:
    """The tokens of each slot in use, given each token's; -1 is none.

    Example:
        >>> groups_of([2, 2, -1, 0, 2])
        [(2, tensor([0, 1, 4])), (0, slice(3, 4, None))]
    """
    tokens: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        if slot >= 0:
            tokens.setdefault(slot, []).append(token)
    return [(slot, _as_rows(indices)) for slot, indices in tokens.items()]


def _as_rows(indices: list[int]) -> Rows:
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else torch.tensor(indices)


class Slots:
    """What each slot holds; empty ones, and those of plain LoRAs, are not in `mixtures`."""

    def __init__(self) -> None:
        self.mixtures: dict[int, ServedMixture] = {}
        self._of_model: dict[int, Tensor] = {}  # "model" scope: what the first block's inputs have decided

    def of_scope(self, groups: Sequence[Group], scopes: Sequence[str]) -> list[tuple[int, Rows, ServedMixture]]:
        """Those of a batch's groups that are mixtures of one of these scopes."""
        found = ((slot, rows, self.mixtures.get(slot)) for slot, rows in groups)
        return [(slot, rows, mixture) for slot, rows, mixture in found if mixture and mixture.scope in scopes]

    def weigh_block(
        self,
        block: str,
        is_first: bool,
        hidden_TH: Tensor,
        groups: Sequence[Group],
        add_up: Callable[[Rows], AddUp],
        gate_TR: Tensor,
    ) -> None:
        """Write what multiplies the ranks of the tokens of mixtures in a block; other tokens' rows stay as they are.

        Args:
            is_first: of the model; its input decides where the model has one router.
            hidden_TH: what enters the block.
            add_up: gives, for some of the tokens, what sums their densities over their context.
        """
        for slot, rows, mixture in self.of_scope(groups, ("block", "model")):
            name = "" if mixture.scope == "model" else block
            if (router := mixture.routers.get(name)) is None:
                continue  # no expert in this block
            if mixture.scope == "block" or is_first:
                self._of_model[slot] = router.weights(hidden_TH[rows], add_up(rows))
            _write(mixture, name, self._of_model[slot], rows, gate_TR)

    def weigh_linear(
        self, linear: str, x_TD: Tensor, groups: Sequence[Group], add_up: Callable[[Rows], AddUp], gate_TR: Tensor
    ) -> None:
        """The same for a linear and the mixtures of which each linear has a router of its own."""
        for _, rows, mixture in self.of_scope(groups, ("module",)):
            if (router := mixture.routers.get(linear)) is not None:
                _write(mixture, linear, router.weights(x_TD[rows], add_up(rows)), rows, gate_TR)


def _write(mixture: ServedMixture, router: str, weights_TE: Tensor, rows: Rows, gate_TR: Tensor) -> None:
    own_TR = gate_TR[rows]  # a view of consecutive rows, a copy of others
    mixture.write_gate(router, weights_TE, own_TR)
    if not isinstance(rows, slice):
        gate_TR[rows] = own_TR
