"""Triton form of `ops.slot_lora.add_slot_lora_reference`: two launches a linear, whatever the slots hold.

shrink: a program multiplies a block of tokens of one slot with a few rows of one A over a span of columns, weighs the
        products by the gate, and leaves them; nothing is added atomically, so that results repeat bit for bit.
expand: a program adds up the parts of a block of tokens, multiplies them with rows of one B, and adds that to y.
A program finds its slot and tokens on the device, so a captured graph follows whatever a batch brings later.
Letters: T tokens, D width, R rank, O outputs, S slots, G groups, n slices; BT, BD, BR, BO are blocks of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..slot_lora import TokensBySlot

MAX_SLICES = 3
DTYPES = {torch.bfloat16, torch.float16}
FULL_DEVICE = 512  # programs of expand that run at once
OVERLAP = False  # let expand load its factors while shrink ends: programmatic dependent launch, from Hopper on


@dataclass(frozen=True)
class Tiling:
    """How both kernels are cut up.

    Attributes:
        tokens: BT, of a block; those of one slot share it.
        ranks: BR of shrink; expand takes up to 64.
        columns: BD of shrink.
        outputs: BO of expand.
        stages: of loads ahead in shrink.
        splits: spans of columns, each with a program and a part of its own.
    """

    tokens: int
    ranks: int
    columns: int
    outputs: int
    stages: int
    splits: int


def tiling_of(T: int, R: int, D: int, outs: Sequence[int]) -> Tiling:
    """Few tokens: many programs that each read a little, for the factors alone take time; else blocks that reuse them.

    As few kinds as will do: each is compiled when it is first met.
    """
    if T == 1:
        programs = len(outs) * triton.cdiv(R, 16)
        return Tiling(1, 16, 256, 64, 3, min(32, 1 << max(0, (192 // programs).bit_length() - 1)))
    if T <= 16:
        return Tiling(16, 16, 256, 64, 4, _splits(120 * D / sum(outs), 16))
    splits = _splits(
        100 * D / (triton.cdiv(T, 64) * sum(outs)), 8 if R <= 64 else 4
    )  # expand keeps all parts in registers
    if T <= 64:
        return Tiling(64, 16, 128, 128, 3, splits)
    return Tiling(64, min(64, max(16, triton.next_power_of_2(R))), 64, 128, 4, splits)


def _splits(ratio: float, most: int) -> int:
    """The power of 2 next to the root: what a program of shrink reads is divided by it, what expand reads multiplied.

    Args:
        ratio: of the times that the two would take with one split; its constants are estimates for an H200.
    """
    return min(most, 1 << max(0, round(math.log2(ratio) / 2)))


def cuts(tiling: Tiling, D: int) -> tuple[int, int, int]:
    """The columns of a block and of a span of shrink, and how many spans there are."""
    width = min(tiling.columns, max(16, triton.next_power_of_2(D)))
    span = triton.cdiv(triton.cdiv(D, tiling.splits), width) * width
    return width, span, triton.cdiv(D, span)


def blocks_of(T: int, S: int, tokens: int) -> int:
    """The most blocks that T tokens of S slots fill, none of which holds tokens of two."""
    return min(T, triton.cdiv(T, tokens) + S - 1) if tokens < T else min(T, S)


@triton.jit
def _read_groups(slots_ptr, counts_ptr, starts_ptr, S: tl.constexpr, G: tl.constexpr, BT: tl.constexpr):
    """Of every group its slot, where it starts and ends among the sorted tokens, and its blocks' end and number."""
    group = tl.arange(0, triton.next_power_of_2(G))
    slot = tl.load(slots_ptr + group, group < G, -1)
    count = tl.load(counts_ptr + group, group < G, 0)
    start = tl.load(starts_ptr + group, group < G, 0)
    blocks = tl.where((slot >= 0) & (slot < S), (count + BT - 1) // BT, 0)
    return slot, start, start + count, tl.cumsum(blocks, axis=0), blocks


@triton.jit
def _find_tokens(groups, tokens_ptr, block, T, BT: tl.constexpr):
    """A block's slot, its tokens [BT, 1], and which of them exist; the slot is -1 where there are no more blocks."""
    slot, start, stop, end, blocks = groups
    mine = (block < end) & (block >= end - blocks)
    first = tl.sum(tl.where(mine, start + (block - end + blocks) * BT, 0), axis=0)
    at = first + tl.arange(0, BT)[:, None]
    t = tl.load(tokens_ptr + at, at < tl.sum(tl.where(mine, stop, 0), axis=0), -1)
    exists = (t >= 0) & (t < T)
    return tl.max(tl.where(mine, slot, -1), axis=0), tl.where(exists, t, 0).to(tl.int64), exists


@triton.jit
def _of_slice(piece, first_ptr, second_ptr, third_ptr):
    """The pointer of a slice; there may be fewer than three."""
    pointer = first_ptr
    if second_ptr is not None:
        pointer = tl.where(piece == 1, second_ptr, pointer)
    if third_ptr is not None:
        pointer = tl.where(piece == 2, third_ptr, pointer)
    return pointer


@triton.jit(do_not_specialize=["T"])  # every length of a prompt would compile anew
def shrink_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, gate_ptr, parts_ptr, slots_ptr, counts_ptr, starts_ptr, tokens_ptr,
    T, x_stride, gate_step, gate_stride,
    SLICES: tl.constexpr, D: tl.constexpr, R: tl.constexpr, S: tl.constexpr, G: tl.constexpr, SPAN: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Parts [splits, n, T, R] float32; what no slot needs is not written."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    piece = tl.program_id(0) // tl.cdiv(R, BR)
    r = (tl.program_id(0) % tl.cdiv(R, BR)) * BR + tl.arange(0, BR)[None, :]
    groups = _read_groups(slots_ptr, counts_ptr, starts_ptr, S, G, BT)
    slot, t, exists = _find_tokens(groups, tokens_ptr, tl.program_id(2), T, BT)
    if slot < 0:
        return
    x_ptr += t * x_stride
    a_ptr = _of_slice(piece, a0_ptr, a1_ptr, a2_ptr) + (slot.to(tl.int64) * R + r) * D
    if BT == 1:  # no tensor cores: their chain of sums would take longer than the loads
        products = tl.zeros((BD, BR), tl.float32)
    else:
        total = tl.zeros((BT, BR), tl.float32)
    for step in range(0, SPAN, BD):
        d = tl.program_id(1) * SPAN + step + tl.arange(0, BD)
        across, down = d[None, :], d[:, None]
        a = tl.load(a_ptr + down, (r < R) & (down < D), 0.0)
        x = tl.load(x_ptr + across, exists & (across < D), 0.0)
        if BT == 1:
            products += tl.trans(x).to(tl.float32) * a.to(tl.float32)
        else:
            total = tl.dot(x, a, total)
    if BT == 1:
        total = tl.sum(products, axis=0, keep_dims=True)
    there = exists & (r < R)
    if gate_ptr is not None:
        total *= tl.load(gate_ptr + piece * gate_step + t * gate_stride + r, there, 0.0)
    part = (tl.program_id(1) * SLICES + piece).to(tl.int64)
    tl.store(parts_ptr + (part * T + t) * R + r, total, there)


@triton.jit
def _add_parts(
    parts_ptr, piece, t, r, exists, T, SLICES: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The shrunk activations of a slice, [BT, BR], from all splits; they are loaded at once, so that none waits."""
    split = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None, None]
    at = ((piece + split * SLICES).to(tl.int64) * T + t[None, :, :]) * R + r[None, :, :]
    return tl.sum(tl.load(parts_ptr + at, (split < SPLITS) & (exists & (r < R))[None, :, :], 0.0), axis=0)


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    y_ptr, parts_ptr, b0_ptr, b1_ptr, b2_ptr, slots_ptr, counts_ptr, starts_ptr, tokens_ptr, T, y_stride,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, SLICES: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    G: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds to y [T, O0 + O1 + O2]."""
    second = tl.cdiv(O0, BO)
    third = second + tl.cdiv(O1, BO)
    block = tl.program_id(0)
    piece = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
    o = (block - tl.where(piece == 0, 0, tl.where(piece == 1, second, third))) * BO + tl.arange(0, BO)[None, :]
    width = tl.where(piece == 0, O0, tl.where(piece == 1, O1, O2))
    y_ptr += tl.where(piece == 0, 0, tl.where(piece == 1, O0, O0 + O1)) + o
    b_ptr = _of_slice(piece, b0_ptr, b1_ptr, b2_ptr) + o * R
    groups = _read_groups(slots_ptr, counts_ptr, starts_ptr, S, G, BT)
    # As many programs as run at once, and a loop: of one for every block that there may be, most would find nothing.
    for tokens in tl.range(tl.program_id(1), tl.sum(groups[4], axis=0), tl.num_programs(1), num_stages=1):
        slot, t, exists = _find_tokens(groups, tokens_ptr, tokens, T, BT)
        there = exists & (o < width)
        y = tl.load(y_ptr + t * y_stride, there, 0.0)
        total = tl.zeros((BT, BO), tl.float32)
        for start in tl.range(0, R, BR, num_stages=1):  # unrolled, or ahead, it would not fit into registers
            r = start + tl.arange(0, BR)
            down = r[:, None]
            b = tl.load(b_ptr + slot.to(tl.int64) * width * R + down, (o < width) & (down < R), 0.0)
            if OVERLAP:
                tl.extra.cuda.gdc_wait()
            shrunk = _add_parts(parts_ptr, piece, t, r[None, :], exists, T, SLICES, R, SPLITS).to(b.dtype)
            if BT == 1:
                total += tl.sum(tl.trans(shrunk).to(tl.float32) * b.to(tl.float32), axis=0, keep_dims=True)
            else:
                total = tl.dot(shrunk, b, total)
        tl.store(y_ptr + t * y_stride, (y.to(tl.float32) + total).to(y_ptr.dtype.element_ty), there)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # also without any tokens: this launch must not be over before shrink is


def takes(y_TO: Tensor, x_TD: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether the kernels serve these; reads shapes and dtypes alone."""
    dtypes = {x_TD.dtype, y_TO.dtype, *(factor.dtype for factor in (*a, *b))}
    R, D = a[0].shape[2:]
    return (
        len(dtypes) == 1
        and dtypes < DTYPES
        and len(a) == len(b) <= MAX_SLICES
        and all(tuple(factor.shape[1:]) == (1, R, D) for factor in a)
        and all(factor.dim() == 4 and factor.shape[1] == 1 and factor.shape[3] == R for factor in b)
        and all(factor.is_contiguous() for factor in (*a, *b))
        and x_TD.dim() == y_TO.dim() == 2
        and x_TD.shape == (y_TO.shape[0], D)
        and y_TO.shape[1] >= sum(factor.shape[2] for factor in b)
        and x_TD.stride(1) == y_TO.stride(1) == 1
    )


def add_slot_lora(
    y_TO: Tensor,
    x_TD: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    order: TokensBySlot,
    gate: Tensor | None = None,
    overlap: bool | None = None,
) -> None:
    """See `add_slot_lora_reference`. Waits for nothing on the device, and can be captured in a CUDA graph.

    Args:
        y_TO: [T, sum of O or more] bfloat16 or float16; rows may lie apart, as those of x.
        x_TD: [T, D] of the same dtype.
        a: up to three of [S, 1, R, D], contiguous, of that dtype.
        b: as many of [S, 1, O, R].
        order: the tokens; rows that are not among them are left alone.
        gate: [T, R], or [n, T, R], float32; rows may lie apart.
        overlap: None stands for `OVERLAP`.

    Raises:
        ValueError: something that `takes` refuses, or a gate of another shape.
    """
    if not takes(y_TO, x_TD, a, b):
        given = ", ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in (y_TO, x_TD, *a, *b))
        raise ValueError(f"these kernels take y, x, a and b as documented, of one 16-bit dtype, but got {given}")
    T, R, n = len(x_TD), a[0].shape[2], len(a)
    if gate is not None and (tuple(gate.shape) not in ((T, R), (n, T, R)) or gate.stride(-1) != 1):
        raise ValueError(f"gate has shape {list(gate.shape)}, but must have {[T, R]} or {[n, T, R]}, rows contiguous")
    if T == 0:
        return
    with torch.cuda.device_of(x_TD):  # a launch goes to the current device, which need not be the tensor's
        _launch(y_TO, x_TD, a, b, order, gate, OVERLAP if overlap is None else overlap)


def _launch(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    order: TokensBySlot,
    gate: Tensor | None,
    overlap: bool,
) -> None:
    T, n, (S, _, R, D) = len(x), len(a), a[0].shape
    outs = [factor.shape[2] for factor in b]
    tiling = tiling_of(T, R, D, outs)
    width, span, splits = cuts(tiling, D)
    blocks = blocks_of(T, S, tiling.tokens)
    parts = torch.empty(splits, n, T, R, dtype=torch.float32, device=x.device)
    none: list[Any] = [None] * (MAX_SLICES - n)
    tokens = (order.slots, order.counts, order.starts, order.tokens)
    sizes = {"SLICES": n, "R": R, "S": S, "G": len(order.slots), "BT": tiling.tokens, "OVERLAP": overlap}
    steps = (0, 0) if gate is None else (gate.stride(0) if gate.dim() == 3 else 0, gate.stride(-2))
    shrink_kernel[(n * triton.cdiv(R, tiling.ranks), splits, blocks)](
        x, *a, *none, gate, parts, *tokens, T, x.stride(0), *steps,
        D=D, SPAN=span, BR=tiling.ranks, BD=width, num_warps=4, num_stages=tiling.stages, **sizes,
    )  # fmt: skip
    later = {"launch_pdl": True} if overlap else {}
    programs = sum(triton.cdiv(out, tiling.outputs) for out in outs)
    at_once = min(blocks, max(triton.cdiv(T, tiling.tokens), FULL_DEVICE // programs))
    expand_kernel[(programs, at_once)](
        y, parts, *b, *none, *tokens, T, y.stride(0), *outs, *[0] * (MAX_SLICES - n),
        SPLITS=splits, BO=tiling.outputs, BR=min(64, max(16, triton.next_power_of_2(R))),
        num_warps=8 if tiling.tokens == 64 else 4, **sizes, **later,
    )  # fmt: skip
