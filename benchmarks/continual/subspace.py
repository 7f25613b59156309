"""Subspaces that a layer's inputs span: gradient projection memory (Saha et al. 2021, arXiv:2103.09762).

Letters: N inputs, D their width, k directions in memory. A moment is X^T X [D, D] of inputs X [N, D]; its trace is
their energy. A memory [D, k] has orthonormal columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quality.batches import Batches
from ..quality.trainer import autocast

NOTHING = 1e-12  # share of the energy that is rounding


def free_directions(moment: Tensor, memory: Tensor, count: int) -> Tensor:
    """[count, D], orthonormal: where inputs are largest outside of the memory; rows of zeros once nothing is left."""
    energies, directions = _outside(moment, memory)
    is_something = energies[:count] > NOTHING * moment.trace()
    return (directions[:, :count] * is_something).t().to(memory.dtype)


def remember(memory: Tensor, moment: Tensor, share: float) -> Tensor:
    """The memory with as few further directions as it needs to hold this share of the inputs' energy."""
    energies, directions = _outside(moment, memory)
    lost = energies.sum() - energies.cumsum(0)  # with one further direction, with two, ...
    allowed = (1 - share) * moment.trace()
    count = 0 if energies.sum() <= allowed else int((lost > allowed).sum()) + 1
    return torch.cat([memory, directions[:, :count].to(memory.dtype)], dim=1)


def _outside(moment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [D] and directions [D, D] of what is left of the inputs outside of the memory, the largest first."""
    basis = memory.double()
    projector = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) - basis @ basis.t()
    energies, directions = torch.linalg.eigh(projector @ moment.double() @ projector)
    return energies.flip(0).clamp(min=0), directions.flip(1)


@torch.no_grad()
def input_moments(model: nn.Module, names: Sequence[str], batches: Batches, device: str) -> dict[str, Tensor]:
    """The moment of what enters each of these modules, over all tokens of all batches but padding."""
    modules = {name: model.get_submodule(name) for name in names}
    moments: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        assert mask is not None
        with torch.autocast(device, enabled=False):
            x = inputs[0].float() * mask.unsqueeze(-1)
            moment = x.flatten(0, 1).t() @ x.flatten(0, 1)
        moments[name] = moments[name] + moment if name in moments else moment

    handles = [module.register_forward_pre_hook(partial(add, name=name)) for name, module in modules.items()]
    try:
        model.eval()
        for step in range(len(batches)):
            ids, _, mask = batches.batch(step)
            options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
            with autocast(device):
                model(input_ids=ids, attention_mask=mask, **options)
    finally:
        for handle in handles:
            handle.remove()
    return moments
