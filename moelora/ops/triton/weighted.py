"""Triton form of weighted.py's backward: one pass over g and h instead of four.

Shapes: T tokens, G linears, E experts, r rank, N = G * E * r.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _blocks(T, E, r, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """Indices of this program's tokens [BT, 1, 1], experts [1, BE, 1] and ranks [1, 1, BR], and which of them exist."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :, None]
    j = tl.arange(0, BLOCK_R)[None, None, :]
    return t.to(tl.int64), e, j, (t < T) & (e < E), (t < T) & (e < E) & (j < r)


@triton.jit(do_not_specialize=["T"])  # every length of a prompt would compile anew
def _weighted_backward_kernel(
    g_ptr, h_ptr, w_ptr, hw_ptr, dh_ptr, dw_ptr, T, w_stride, w_step, scale,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t, e, j, te, ter = _blocks(T, E, R, BLOCK_T, BLOCK_E, BLOCK_R)
    w = tl.load(w_ptr + t * w_stride + e * w_step, te, 0.0).to(tl.float32) * scale
    dw = tl.zeros((BLOCK_T, BLOCK_E, 1), tl.float32)
    for linear in range(G):
        at = t * (G * E * R) + linear * (E * R) + e * R + j
        g = tl.load(g_ptr + at, ter, 0.0).to(tl.float32)
        h = tl.load(h_ptr + at, ter, 0.0).to(tl.float32)
        tl.store(hw_ptr + at, (h * w).to(hw_ptr.dtype.element_ty), ter)
        tl.store(dh_ptr + at, (g * w).to(dh_ptr.dtype.element_ty), ter)
        dw += tl.sum(g * h, axis=2, keep_dims=True)
    tl.store(dw_ptr + t * E + e, (dw * scale).to(dw_ptr.dtype.element_ty), te)


@cache
def _constants(N: int, E: int, r: int) -> dict[str, int]:
    """The sizes and blocks that are constant at compile time."""
    block_r = triton.next_power_of_2(r)
    block_e = min(triton.next_power_of_2(E), max(1, 256 // block_r))
    block_t = max(1, 4096 // (block_e * block_r))  # 4096 elements, 32 for each of 128 threads
    return {"G": N // (E * r), "E": E, "R": r, "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_R": block_r}


def weighted_backward(
    g_TN: Tensor, h_TN: Tensor, weights_TE: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See weighted.py. g_TN and h_TN are contiguous."""
    (T, N), E = h_TN.shape, weights_TE.shape[-1]
    constants = _constants(N, E, rank)
    grid = (-(-T // constants["BLOCK_T"]), -(-E // constants["BLOCK_E"]))
    hw, dh, dw = torch.empty_like(h_TN), torch.empty_like(h_TN), weights_TE.new_empty(weights_TE.shape)
    written = (hw, dh, dw, T, *weights_TE.stride(), scale)
    launch(_weighted_backward_kernel, grid, h_TN, g_TN, h_TN, weights_TE, *written, **constants)
    return hw, dh, dw
