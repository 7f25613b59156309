"""Triton form of gate.py: one pass over h instead of three.

Shapes: T tokens, E experts, r rank, R = E * r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _blocks(T, E, r, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """Indices of this program's tokens [BT, 1, 1], experts [1, BE, 1] and ranks [1, 1, BR], and which of them exist."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :, None]
    j = tl.arange(0, BLOCK_R)[None, None, :]
    return t.to(tl.int64), e, j, (t < T) & (e < E), (t < T) & (e < E) & (j < r)


@triton.jit
def _weighted_kernel(
    h_ptr, w_ptr, hw_ptr, T, E, r, h_stride, w_stride, w_step, scale,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t, e, j, te, ter = _blocks(T, E, r, BLOCK_T, BLOCK_E, BLOCK_R)
    h = tl.load(h_ptr + t * h_stride + e * r + j, ter, 0.0).to(tl.float32)
    w = tl.load(w_ptr + t * w_stride + e * w_step, te, 0.0).to(tl.float32) * scale
    tl.store(hw_ptr + t * E * r + e * r + j, (h * w).to(hw_ptr.dtype.element_ty), ter)


@triton.jit
def _weighted_backward_kernel(
    g_ptr, h_ptr, w_ptr, hw_ptr, dh_ptr, dw_ptr, T, E, r, g_stride, h_stride, w_stride, w_step, scale,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t, e, j, te, ter = _blocks(T, E, r, BLOCK_T, BLOCK_E, BLOCK_R)
    g = tl.load(g_ptr + t * g_stride + e * r + j, ter, 0.0).to(tl.float32)
    h = tl.load(h_ptr + t * h_stride + e * r + j, ter, 0.0).to(tl.float32)
    w = tl.load(w_ptr + t * w_stride + e * w_step, te, 0.0).to(tl.float32) * scale
    tl.store(hw_ptr + t * E * r + e * r + j, (h * w).to(hw_ptr.dtype.element_ty), ter)
    tl.store(dh_ptr + t * E * r + e * r + j, (g * w).to(dh_ptr.dtype.element_ty), ter)
    dw = tl.sum(g * h, axis=2, keep_dims=True) * scale
    tl.store(dw_ptr + t * E + e, dw.to(dw_ptr.dtype.element_ty), te)


def _launch(h_TR: Tensor, weights_TE: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """Grid, (T, E, r) and block sizes."""
    (T, R), E = h_TR.shape, weights_TE.shape[-1]
    r = R // E
    block_r = triton.next_power_of_2(r)
    block_e = min(triton.next_power_of_2(E), max(1, 256 // block_r))
    block_t = max(1, 4096 // (block_e * block_r))  # 4096 elements, 32 for each of 128 threads
    grid = (triton.cdiv(T, block_t), triton.cdiv(E, block_e))
    return grid, (T, E, r), {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_R": block_r}


def weighted(h_TR: Tensor, weights_TE: Tensor, scale: float) -> Tensor:
    """See gate.py."""
    grid, sizes, blocks = _launch(h_TR, weights_TE)
    hw = torch.empty(h_TR.shape, dtype=h_TR.dtype, device=h_TR.device)
    strides = h_TR.stride(0), *weights_TE.stride()
    _weighted_kernel[grid](h_TR, weights_TE, hw, *sizes, *strides, scale, **blocks)
    return hw


def weighted_backward(g_TR: Tensor, h_TR: Tensor, weights_TE: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """See gate.py."""
    grid, sizes, blocks = _launch(h_TR, weights_TE)
    hw, dh = (torch.empty(h_TR.shape, dtype=h_TR.dtype, device=h_TR.device) for _ in range(2))
    dw = torch.empty(weights_TE.shape, dtype=weights_TE.dtype, device=h_TR.device)
    strides = g_TR.stride(0), h_TR.stride(0), *weights_TE.stride()
    _weighted_backward_kernel[grid](g_TR, h_TR, weights_TE, hw, dh, dw, *sizes, *strides, scale, **blocks)
    return hw, dh, dw
