"""Starts kernels. Triton's own launcher binds every argument by name and looks at it each time; here, a kernel that was
started before with arguments of the same kinds is started as it was compiled then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""By kernel, device, options and kinds of arguments: the compiled kernel, and its constants as it takes them."""


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of a tensor.

    Args:
        kernel: whose constants come after all else, and are given by name.
        on: a launch goes to the current device, which need not be the tensor's.
    """
    device = on.device
    if device.type != "cuda" or torch.version.hip is not None:  # the interpreter; AMD's kernels are of more kinds
        kernel[grid](*args, **options)
        return
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            launch(kernel, grid, on, *args, **options)
        return
    key = (id(kernel), device.index, *options, *options.values(), *map(_kind, args))
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[grid](*args, **options)
        _COMPILED[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
    else:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _kind(value: Any) -> Any:
    """What Triton compiles anew for, or more: types, whether addresses and numbers are multiples of 16, ones."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)
