"""What torch.autocast makes of a computation that is written by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes x in; autocast leaves float64 alone."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A region without autocast; entering one costs the host more than a product, so only where there is autocast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS
