"""Forwards that torch transforms or traces: not for functions with a backward by hand, nor for changes in place."""

from __future__ import annotations

import torch


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp ...) or torch.jit.trace runs this; torch.compile has ways of its own."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
