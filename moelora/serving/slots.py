"""The mixtures that are being served, each in a slot of its own, and what weighs the ranks of a batch's tokens.

The readable form, on any device and for every router type; ops/slot_tables.py has the form for CUDA graphs.
Shapes: T tokens, H router input width, R rank that a server keeps for every LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..routing.pooled import AddUp, PooledRouter
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


Gates = dict[int, Tensor]
"""By slot, [its tokens, E * r]: what their ranks are multiplied by; slots that are not there, by ones."""
OverContext = Callable[[str, Rows, Tensor, int | None], Tensor]
"""Sums a router's densities [T, A] of some of a batch's tokens over the context of each, by its `domain_window`."""


class Slots:
    """What each slot holds; empty ones, and those of plain LoRAs, hold no mixture.

    Args:
        over_context: asked where the text decides between adapters.
    """

    def __init__(self, over_context: OverContext) -> None:
        self.over_context = over_context
        self._mixtures: dict[int, ServedMixture] = {}
        self._of_model: dict[int, Tensor] = {}  # "model" scope: what the first block's input has decided
        self._batch: Sequence[Group] = ()
        self._found: dict[str, list[tuple[int, Rows, ServedMixture]]] = {}  # in that batch

    def set(self, slot: int, mixture: ServedMixture) -> None:
        """Put a mixture into a slot."""
        self._mixtures[slot] = mixture
        self._batch = ()

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._mixtures.pop(slot, None)
        self._batch = ()

    def hold(self, scope: str) -> bool:
        """Whether any slot holds a mixture of this scope."""
        return any(mixture.scope == scope for mixture in self._mixtures.values())

    def routed(self, groups: Sequence[Group], by: str) -> list[tuple[int, Rows, ServedMixture]]:
        """Those of a batch's groups that are mixtures which a "block", or a "linear", decides about."""
        if groups is not self._batch:
            pairs = [(slot, rows, self._mixtures[slot]) for slot, rows in groups if slot in self._mixtures]
            self._found = {
                "linear": [found for found in pairs if found[2].scope == "module"],
                "block": [found for found in pairs if found[2].scope != "module"],
            }
            self._batch = groups
        return self._found[by]

    def block_gates(self, block: str, is_first: bool, hidden_TH: Tensor, groups: Sequence[Group]) -> Gates:
        """What multiplies the ranks of the tokens of mixtures in a block.

        Args:
            is_first: of the model; its input decides where the model has one router.
            hidden_TH: what enters the block.
        """
        gates = {}
        for slot, rows, mixture in self.routed(groups, "block"):
            name = "" if mixture.scope == "model" else block
            if (router := mixture.routers.get(name)) is None:
                continue  # no expert in this block
            if name or is_first:
                gates[slot] = mixture.gate(name, router.weights(hidden_TH[rows], self._add_up(name, rows, router)))
            else:
                gates[slot] = self._of_model[slot]
            if not name:
                self._of_model[slot] = gates[slot]
        return gates

    def linear_gates(self, linear: str, x_TD: Tensor, groups: Sequence[Group]) -> Gates:
        """The same for a linear and the mixtures of which each linear has a router of its own."""
        gates = {}
        for slot, rows, mixture in self.routed(groups, "linear"):
            if (router := mixture.routers.get(linear)) is not None:
                gates[slot] = mixture.gate(linear, router.weights(x_TD[rows], self._add_up(linear, rows, router)))
        return gates

    def _add_up(self, name: str, rows: Rows, router: PooledRouter) -> AddUp:
        return lambda densities_TA: self.over_context(name, rows, densities_TA, router.config.domain_window)


def write_gates(gates: Gates, groups: Sequence[Group], gate_TR: Tensor) -> None:
    """Write gates by slot into that of a whole batch, [T, R]; all else stays as it is."""
    for slot, rows in groups:
        if slot in gates:
            gate_TR[rows, : gates[slot].shape[1]] = gates[slot]
