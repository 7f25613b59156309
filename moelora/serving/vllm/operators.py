"""`torch.ops.moelora`: routing as torch.compile sees it, opaque.

What is traced would bake in what happens to be served then, and vLLM drops the guards that would notice.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor


class Routing(Protocol):
    """An engine's."""

    def route(self, hidden_TH: Tensor, residual_TH: Tensor | None, gate_TR: Tensor, block: int) -> None:
        """Write the gate of a block."""

    def weigh(self, shrunk: Tensor, gate_TR: Tensor) -> None:
        """Multiply shrunk activations by the gate, in place."""


_engines: weakref.WeakValueDictionary[int, Routing] = weakref.WeakValueDictionary()
_library = torch.library.Library("moelora", "FRAGMENT")
_library.define("route(Tensor hidden, Tensor? residual, Tensor(a!) gate, int engine, int block) -> ()")
_library.define("weigh(Tensor(a!) shrunk, Tensor gate, int engine) -> ()")


def number(engine: Routing) -> int:
    """What the operators know an engine by."""
    found = max(_engines, default=-1) + 1
    _engines[found] = engine
    return found


def _route(hidden: Tensor, residual: Tensor | None, gate: Tensor, engine: int, block: int) -> None:
    _engines[engine].route(hidden, residual, gate, block)


def _weigh(shrunk: Tensor, gate: Tensor, engine: int) -> None:
    _engines[engine].weigh(shrunk, gate)


for _device in ("CPU", "CUDA"):
    _library.impl("route", _route, _device)
    _library.impl("weigh", _weigh, _device)
for _name in ("route", "weigh"):
    torch.library.register_fake(f"moelora::{_name}", lambda *arguments: None, lib=_library)
