"""Triton form of gathered.py: rows are gathered inside the products, so no copy of them is ever written.

One program takes a tile: pairs of one expert in one slot. In one slot a token has one pair, so its row of y is written
by one program alone, slot after slot: no atomics, and sums in a fixed order.
Shapes: T tokens, E experts, r rank, W width, P pairs; blocks of BP pairs, BW columns and BR >= r ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..expert_pairs import ExpertPairs

SHRINK_ELEMENTS = 4096  # of all rows of a tile, in one step of the loop over their width
EXPAND_BYTES, EXPAND_STEPS = 256, 4  # of a row of y, in one step of the loop of a program, and how many steps
GRADIENT_COLUMNS, GRADIENT_PAIRS = 128, 32  # of a factor, for one program, and in one step of the loop over its pairs


@triton.jit
def _tile(tiles_ptr, tokens_ptr, BP: tl.constexpr):
    """This program's expert, its pairs [BP], which of them there are, and their tokens [BP]."""
    tiles_ptr += tl.program_id(0) * 3
    p = tl.load(tiles_ptr + 1) + tl.arange(0, BP)
    there = p < tl.load(tiles_ptr + 2)
    return tl.load(tiles_ptr).to(tl.int64), p, there, tl.load(tokens_ptr + p, there, 0).to(tl.int64)


@triton.jit
def _shrink_kernel(
    x_ptr, f_ptr, h_ptr, tokens_ptr, tiles_ptr, W, E, x_row, x_step, f_expert, f_rank, f_step,
    R: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    expert, p, there, t = _tile(tiles_ptr, tokens_ptr, BP)
    j = tl.arange(0, BR)
    total = tl.zeros((BP, BR), tl.float32)
    width = tl.where(expert < E, W, 0)
    for start in range(0, width, BW):
        w = start + tl.arange(0, BW)
        x = tl.load(x_ptr + t[:, None] * x_row + w[None, :] * x_step, there[:, None] & (w < W)[None, :], 0.0)
        at = f_ptr + expert * f_expert + j[None, :] * f_rank + w[:, None] * f_step
        f = tl.load(at, (j < R)[None, :] & (w < W)[:, None], 0.0).to(x.dtype)
        total = tl.dot(x, f, total, input_precision="ieee")
    tl.store(h_ptr + p[:, None] * R + j[None, :], total.to(h_ptr.dtype.element_ty), there[:, None] & (j < R)[None, :])


@triton.jit
def _expand_kernel(
    y_ptr, h_ptr, f_ptr, tokens_ptr, tiles_ptr, W, E, y_row, f_expert, f_rank, f_step,
    R: tl.constexpr, ADDS: tl.constexpr, SPAN: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    expert, p, there, t = _tile(tiles_ptr, tokens_ptr, BP)
    j = tl.arange(0, BR)
    h = tl.load(h_ptr + p[:, None] * R + j[None, :], there[:, None] & (j < R)[None, :], 0.0)
    if ADDS:
        there = there & (expert < E)
    first = tl.program_id(1) * SPAN
    for start in tl.range(first, tl.minimum(first + SPAN, W), BW, num_stages=3):
        w = start + tl.arange(0, BW)
        at = f_ptr + expert * f_expert + j[:, None] * f_rank + w[None, :].to(tl.int64) * f_step
        f = tl.load(at, (expert < E) & (j < R)[:, None] & (w < W)[None, :], 0.0).to(h.dtype)
        total = tl.dot(h, f, input_precision="ieee")
        at = y_ptr + t[:, None] * y_row + w[None, :]
        if ADDS:
            total += tl.load(at, there[:, None] & (w < W)[None, :], 0.0).to(tl.float32)
        tl.store(at, total.to(y_ptr.dtype.element_ty), there[:, None] & (w < W)[None, :])


@triton.jit
def _gradient_kernel(
    out_ptr, h_ptr, x_ptr, tokens_ptr, ends_ptr, W, x_row, x_step, o_expert, o_rank, o_step,
    R: tl.constexpr, K: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    j = tl.arange(0, BR)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    end = tl.load(ends_ptr + expert * K + K - 1)
    total = tl.zeros((BW, BR), tl.float32)
    for start in range(tl.load(ends_ptr + expert * K - 1, expert > 0, 0), end, BP):
        p = start + tl.arange(0, BP)
        t = tl.load(tokens_ptr + p, p < end, 0).to(tl.int64)
        x = tl.load(x_ptr + t[:, None] * x_row + w[None, :] * x_step, (p < end)[:, None] & (w < W)[None, :], 0.0)
        h = tl.load(h_ptr + p[:, None] * R + j[None, :], (p < end)[:, None] & (j < R)[None, :], 0.0)
        total = tl.dot(tl.trans(x), h, total, input_precision="ieee")
    at = out_ptr + expert.to(tl.int64) * o_expert + j[None, :] * o_rank + w[:, None].to(tl.int64) * o_step
    tl.store(at, total.to(out_ptr.dtype.element_ty), (j < R)[None, :] & (w < W)[:, None])


def _blocks(rank: int, pairs: int, width: int, columns: int) -> dict[str, int]:
    return {
        "R": rank,
        "BP": pairs,
        "BW": min(columns, max(16, triton.next_power_of_2(width))),
        "BR": max(16, triton.next_power_of_2(rank)),  # what tl.dot takes
    }


def shrink(x_TW: Tensor, factor_ErW: Tensor, pairs: ExpertPairs, out_Pr: Tensor) -> None:
    """See ops/gathered.py; out_Pr is contiguous."""
    E, r, W = factor_ErW.shape
    blocks = _blocks(r, pairs.tile_rows, W, min(128, SHRINK_ELEMENTS // pairs.tile_rows))
    with torch.cuda.device_of(x_TW):  # a launch goes to the current device, which need not be the tensor's
        _shrink_kernel[(pairs.tiles.shape[0] * pairs.tiles.shape[1],)](
            x_TW, factor_ErW, out_Pr, pairs.tokens, pairs.tiles, W, E, *x_TW.stride(), *factor_ErW.stride(), **blocks,
            num_stages=4,
        )  # fmt: skip


def expand(h_Pr: Tensor, factor_ErW: Tensor, pairs: ExpertPairs, onto: Tensor | None = None) -> Tensor:
    """See ops/gathered.py."""
    E, r, W = factor_ErW.shape
    y_TW = h_Pr.new_empty(pairs.num_tokens, W) if onto is None else onto
    blocks = _blocks(r, pairs.tile_rows, W, EXPAND_BYTES // h_Pr.element_size())
    span = blocks["BW"] * EXPAND_STEPS
    for slot, tiles in enumerate(pairs.tiles):
        with torch.cuda.device_of(h_Pr):
            _expand_kernel[(len(tiles), triton.cdiv(W, span))](
                y_TW, h_Pr, factor_ErW, pairs.tokens, tiles, W, E, y_TW.stride(0), *factor_ErW.stride(),
                ADDS=slot > 0 or onto is not None, SPAN=span, **blocks,
            )  # fmt: skip
    return y_TW


def factor_gradient(h_Pr: Tensor, x_TW: Tensor, pairs: ExpertPairs, out_ErW: Tensor) -> None:
    """See ops/gathered.py."""
    E, r, W = out_ErW.shape
    blocks = _blocks(r, GRADIENT_PAIRS, W, GRADIENT_COLUMNS)
    with torch.cuda.device_of(x_TW):
        _gradient_kernel[(E, triton.cdiv(W, blocks["BW"]))](
            out_ErW, h_Pr, x_TW, pairs.tokens, pairs.ends, W, *x_TW.stride(), *out_ErW.stride(), K=pairs.num_slots,
            **blocks,
        )  # fmt: skip
