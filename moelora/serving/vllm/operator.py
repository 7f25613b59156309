"""`torch.ops.moelora.route`: opaque to torch.compile, which would bake in what happens to be served as it traces."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor


class Router(Protocol):
    """What knows the weights of a batch."""

    def fill(self, block: int, hidden_TH: Tensor, residual_TH: Tensor | None, gate_TR: Tensor) -> None:
        """Write them."""


_engines: weakref.WeakValueDictionary[int, Router] = weakref.WeakValueDictionary()
_library = torch.library.Library("moelora", "FRAGMENT")
_library.define("route(Tensor hidden, Tensor? residual, int engine, int block, Tensor(a!) gate) -> ()")


def number(engine: Router) -> int:
    """What the operator knows an engine by."""
    found = len(_engines) and max(_engines) + 1
    _engines[found] = engine
    return found


def _route(hidden: Tensor, residual: Tensor | None, engine: int, block: int, gate: Tensor) -> None:
    _engines[engine].fill(block, hidden, residual, gate)


def _nothing(hidden: Tensor, residual: Tensor | None, engine: int, block: int, gate: Tensor) -> None:
    """Shapes are as given."""


for _device in ("CPU", "CUDA"):
    _library.impl("route", _route, _device)
torch.library.register_fake("moelora::route", _nothing, lib=_library)
