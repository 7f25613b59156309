"""Triton kernels, each beside the torch form that defines what is correct. Importing this package imports no triton."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from ..transforms import is_transformed

INTERPRET = False  # tests set it: kernels run on CPU tensors too, if TRITON_INTERPRET=1 was set before triton's import


@cache
def _is_importable() -> bool:
    try:
        import triton.language  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _has_bfloat16(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def kernels_for(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor; else the caller runs the torch form."""
    if torch.compiler.is_compiling() or tensor.dtype == torch.float64:
        return False  # inductor fuses the torch form by itself; float64 is the torch forms' business
    if is_transformed():
        return False
    if tensor.is_cuda:
        return _is_importable() and _has_bfloat16(tensor.device)
    return INTERPRET and os.environ.get("TRITON_INTERPRET") == "1" and _is_importable()


def launches_are_free(tensor: Tensor) -> bool:
    """Whether the kernels serve this tensor and starting one costs the host nothing: while a graph is captured.

    Elsewhere Triton's launcher takes the host longer than one or two operations of torch do.
    """
    if tensor.is_cuda:
        return torch.cuda.is_current_stream_capturing() and kernels_for(tensor)
    return INTERPRET and kernels_for(tensor)
