"""What torch.autocast makes of a computation that is written by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes x in; autocast leaves float64 alone."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


class _WithoutAutocast:
    """``torch.autocast(device, enabled=False)`` where there is autocast, for a tenth of what that costs the host."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *raised: object) -> None:
        torch.set_autocast_enabled(self._device, True)


@cache
def _without(device: str) -> _WithoutAutocast:
    return _WithoutAutocast(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A region without autocast."""
    if not torch.is_autocast_enabled(device):
        return _AS_IT_IS
    return torch.autocast(device, enabled=False) if torch.compiler.is_compiling() else _without(device)
