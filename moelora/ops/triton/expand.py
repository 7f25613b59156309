"""Triton form of ``y += (h * w) B^T`` for few tokens, where a launch costs more than its arithmetic: decoding.

Shapes: T tokens, O out, E experts, r rank, N = E * r.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit(do_not_specialize=["T"])
def _expand_kernel(
    y_ptr, h_ptr, w_ptr, b_ptr, T, width, h_stride, w_stride, w_step, b_stride, scale,
    N: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_there = (t < T) & (n[None, :] < N)
        h = tl.load(h_ptr + t * h_stride + n[None, :], is_there, 0.0)
        w = tl.load(w_ptr + t * w_stride + (n[None, :] // R) * w_step, is_there, 0.0).to(tl.float32) * scale
        b = tl.load(b_ptr + o[None, :] * b_stride + n[:, None], (o[None, :] < width) & (n[:, None] < N), 0.0)
        hw = (h.to(tl.float32) * w).to(h.dtype)
        total = tl.dot(hw, b, total, input_precision="ieee")
    at = y_ptr + t.to(tl.int64) * width + o[None, :]
    there = (t < T) & (o[None, :] < width)
    tl.store(at, (tl.load(at, there, 0.0).to(tl.float32) + total).to(y_ptr.dtype.element_ty), there)


def add_expanded(y_TO: Tensor, h_TN: Tensor, weights_TE: Tensor, B_ON: Tensor, rank: int, scale: float) -> None:
    """Add ``weighted(h_TN, ...) B_ON^T`` to y_TO, which is contiguous, in place. Rows of h and B are contiguous."""
    (T, width), N = y_TO.shape, B_ON.shape[1]
    block_t = min(64, max(16, triton.next_power_of_2(T)))
    block_n = min(128, max(16, triton.next_power_of_2(N)))
    grid = (triton.cdiv(width, 32), triton.cdiv(T, block_t))
    launch(
        _expand_kernel, grid, y_TO, y_TO, h_TN, weights_TE, B_ON, T, width, h_TN.stride(0), *weights_TE.stride(),
        B_ON.stride(0), scale, N=N, R=rank, BLOCK_T=block_t, BLOCK_O=32, BLOCK_N=block_n,
    )  # fmt: skip
