"""Triton form of gathered.py: rows are gathered inside the products, so no copy of them is ever written.

One program takes a tile: pairs of one expert in one slot. In one slot a token has one pair, so its row of y is written
by one program alone, slot after slot: no atomics, and sums in a fixed order. A launch reads the rows once for up to
three linears (q, k and v).
Shapes: T tokens, E experts, r rank, W width, P pairs, G linears; blocks of BP pairs, BW columns and BR >= r ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..expert_pairs import ExpertPairs
from .launch import launch

MAX_LINEARS = 3  # of one launch, up to MAX_SHARED_RANK; above, a program has registers for one
MAX_SHARED_RANK = 32
BLOCK = 4096  # elements of a block of rows, and of a block of a factor
GRADIENT_BLOCK, GRADIENT_PAIRS = 8192, 32  # of a block of a gradient; pairs in one step of the loop over an expert's
MAX_COLUMNS = 128
EXPAND_BYTES, EXPAND_STEPS = 256, 4  # of a row of y, in one step of the loop of a program, and how many steps


@triton.jit
def _tile(tiles_ptr, tokens_ptr, BP: tl.constexpr):
    """This program's expert, its pairs [BP], which of them there are, and their tokens [BP]."""
    tiles_ptr += tl.program_id(0) * 3
    p = tl.load(tiles_ptr + 1) + tl.arange(0, BP)
    there = p < tl.load(tiles_ptr + 2)
    return tl.load(tiles_ptr).to(tl.int64), p, there, tl.load(tokens_ptr + p, there, 0).to(tl.int64)


@triton.jit
def _plus_product(total, left, f_ptr, at, is_there):
    """total + left @ the block of a factor that lies there, in the dtype of left."""
    return tl.dot(left, tl.load(f_ptr + at, is_there, 0.0).to(left.dtype), total, input_precision="ieee")


@triton.jit
def _shrink_kernel(
    x_ptr, f0_ptr, f1_ptr, f2_ptr, h_ptr, tokens_ptr, tiles_ptr, P, W, E, x_row, x_step, f_expert, f_rank, f_step,
    G: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    expert, p, there, t = _tile(tiles_ptr, tokens_ptr, BP)
    j = tl.arange(0, BR)
    total0 = tl.zeros((BP, BR), tl.float32)
    total1 = total0
    total2 = total0
    for start in range(0, tl.where(expert < E, W, 0), BW):
        w = start + tl.arange(0, BW)
        x = tl.load(x_ptr + t[:, None] * x_row + w[None, :] * x_step, there[:, None] & (w < W)[None, :], 0.0)
        at = expert * f_expert + j[None, :] * f_rank + w[:, None].to(tl.int64) * f_step
        is_there = (j < R)[None, :] & (w < W)[:, None]
        total0 = _plus_product(total0, x, f0_ptr, at, is_there)
        if G > 1:
            total1 = _plus_product(total1, x, f1_ptr, at, is_there)
        if G > 2:
            total2 = _plus_product(total2, x, f2_ptr, at, is_there)
    h_ptr += p[:, None] * R + j[None, :]
    is_there = there[:, None] & (j < R)[None, :]
    tl.store(h_ptr, total0.to(h_ptr.dtype.element_ty), is_there)
    if G > 1:
        tl.store(h_ptr + P * R, total1.to(h_ptr.dtype.element_ty), is_there)
    if G > 2:
        tl.store(h_ptr + 2 * P * R, total2.to(h_ptr.dtype.element_ty), is_there)


@triton.jit
def _expand_kernel(
    y_ptr, h_ptr, f0_ptr, f1_ptr, f2_ptr, tokens_ptr, tiles_ptr, P, W, E, y_row, f_expert, f_rank, f_step,
    G: tl.constexpr, ADDS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    expert, p, there, t = _tile(tiles_ptr, tokens_ptr, BP)
    j = tl.arange(0, BR)
    h_ptr += p[:, None] * R + j[None, :]
    has_h = there[:, None] & (j < R)[None, :]
    h0 = tl.load(h_ptr, has_h, 0.0)
    h1 = h0
    h2 = h0
    if G > 1:
        h1 = tl.load(h_ptr + P * R, has_h, 0.0)
    if G > 2:
        h2 = tl.load(h_ptr + 2 * P * R, has_h, 0.0)
    if ADDS:
        there = there & (expert < E)
    first = tl.program_id(1) * SPAN
    for start in tl.range(first, tl.minimum(first + SPAN, W), BW, num_stages=3):
        w = start + tl.arange(0, BW)
        at = expert * f_expert + j[:, None] * f_rank + w[None, :].to(tl.int64) * f_step
        has_f = (expert < E) & (j < R)[:, None] & (w < W)[None, :]
        total = _plus_product(tl.zeros((BP, BW), tl.float32), h0, f0_ptr, at, has_f)
        if G > 1:
            total = _plus_product(total, h1, f1_ptr, at, has_f)
        if G > 2:
            total = _plus_product(total, h2, f2_ptr, at, has_f)
        row = y_ptr + t[:, None] * y_row + w[None, :]
        has_y = there[:, None] & (w < W)[None, :]
        if ADDS:
            total += tl.load(row, has_y, 0.0).to(tl.float32)
        tl.store(row, total.to(y_ptr.dtype.element_ty), has_y)


@triton.jit
def _gradient_kernel(
    d0_ptr, d1_ptr, d2_ptr, h_ptr, x_ptr, tokens_ptr, ends_ptr, P, W, x_row, x_step, d_expert, d_rank, d_step,
    G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    j = tl.arange(0, BR)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    end = tl.load(ends_ptr + expert * K + K - 1)
    total0 = tl.zeros((BW, BR), tl.float32)
    total1 = total0
    total2 = total0
    for start in range(tl.load(ends_ptr + expert * K - 1, expert > 0, 0), end, BP):
        p = start + tl.arange(0, BP)
        t = tl.load(tokens_ptr + p, p < end, 0).to(tl.int64)
        x = tl.load(x_ptr + t[:, None] * x_row + w[None, :] * x_step, (p < end)[:, None] & (w < W)[None, :], 0.0)
        at = p[:, None] * R + j[None, :]
        is_there = (p < end)[:, None] & (j < R)[None, :]
        total0 = _plus_product(total0, tl.trans(x), h_ptr, at, is_there)
        if G > 1:
            total1 = _plus_product(total1, tl.trans(x), h_ptr + P * R, at, is_there)
        if G > 2:
            total2 = _plus_product(total2, tl.trans(x), h_ptr + 2 * P * R, at, is_there)
    at = expert.to(tl.int64) * d_expert + j[None, :] * d_rank + w[:, None].to(tl.int64) * d_step
    is_there = (j < R)[None, :] & (w < W)[:, None]
    tl.store(d0_ptr + at, total0.to(d0_ptr.dtype.element_ty), is_there)
    if G > 1:
        tl.store(d1_ptr + at, total1.to(d1_ptr.dtype.element_ty), is_there)
    if G > 2:
        tl.store(d2_ptr + at, total2.to(d2_ptr.dtype.element_ty), is_there)


def _launches(
    factors: Sequence[Tensor], pairs: int, block: int, columns: int
) -> Iterator[tuple[slice, list[Tensor], dict[str, Any]]]:
    """Which linears each launch serves, at most three whose factors are laid out alike; three factors; its blocks."""
    start = 0
    for end in range(1, len(factors) + 1):
        first = factors[start]
        _, rank, width = first.shape
        most = MAX_LINEARS if rank <= MAX_SHARED_RANK else 1
        if end < len(factors) and end - start < most and _are_alike(first, factors[end]):
            continue
        padded = max(16, triton.next_power_of_2(rank))  # what tl.dot takes
        blocks = {
            "G": end - start,
            "R": rank,
            "BP": pairs,
            "BW": min(columns, block // padded, max(16, triton.next_power_of_2(width))),
            "BR": padded,
        }
        yield slice(start, end), [*factors[start:end], first, first][:MAX_LINEARS], blocks
        start = end


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def shrink(x_TW: Tensor, factors_ErW: Sequence[Tensor], pairs: ExpertPairs, out_GPr: Tensor) -> None:
    """See ops/gathered.py; out_GPr is contiguous."""
    (_, P, _), W, tiles = out_GPr.shape, x_TW.shape[1], pairs.tiles
    columns = min(MAX_COLUMNS, BLOCK // pairs.tile_rows)
    for served, factors, blocks in _launches(factors_ErW, pairs.tile_rows, BLOCK, columns):
        launch(
            _shrink_kernel, (tiles.shape[0] * tiles.shape[1],), x_TW, x_TW, *factors, out_GPr[served], pairs.tokens,
            tiles, P, W, pairs.num_experts, *x_TW.stride(), *factors[0].stride(), **blocks, num_stages=4,
        )  # fmt: skip


def expand(h_GPr: Tensor, factors_ErW: Sequence[Tensor], pairs: ExpertPairs, out_TW: Tensor, adds: bool) -> None:
    """See ops/gathered.py; h_GPr is contiguous."""
    (_, P, _), W = h_GPr.shape, out_TW.shape[1]
    columns = EXPAND_BYTES // h_GPr.element_size()
    for served, factors, blocks in _launches(factors_ErW, pairs.tile_rows, BLOCK, columns):
        span = blocks["BW"] * EXPAND_STEPS
        for slot, tiles in enumerate(pairs.tiles):
            is_first = served.start == slot == 0
            launch(
                _expand_kernel, (len(tiles), triton.cdiv(W, span)), h_GPr, out_TW, h_GPr[served], *factors,
                pairs.tokens, tiles, P, W, pairs.num_experts, out_TW.stride(0), *factors[0].stride(),
                ADDS=adds or not is_first, SPAN=span, **blocks,
            )  # fmt: skip


def factor_gradients(h_GPr: Tensor, x_TW: Tensor, pairs: ExpertPairs, outs_ErW: Sequence[Tensor]) -> None:
    """See ops/gathered.py; h_GPr is contiguous."""
    (_, P, _), W = h_GPr.shape, x_TW.shape[1]
    for served, outs, blocks in _launches(outs_ErW, GRADIENT_PAIRS, GRADIENT_BLOCK, MAX_COLUMNS):
        launch(
            _gradient_kernel, (pairs.num_experts, triton.cdiv(W, blocks["BW"])), x_TW, *outs, h_GPr[served], x_TW,
            pairs.tokens, pairs.ends, P, W, *x_TW.stride(), *outs[0].stride(), K=pairs.num_slots, **blocks,
        )  # fmt: skip
