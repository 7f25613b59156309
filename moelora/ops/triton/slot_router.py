"""Triton form of `ops.slot_tables.route_slots_reference`: two launches, whatever the slots hold.

score: a program multiplies a few consecutive tokens with 16 rows of the first layer over a span of columns, slot after
       slot of those that occur among its tokens, and leaves its part of the products and of the sums of squares.
weigh: a warp adds up one token's parts, and goes from there to the token's row of the gate.
Everything that depends on the slots is read on the device, so a captured graph routes whatever they hold later.
Letters: T tokens, H width, N rows, S slots, R columns of the gate; BT x BN x BH are blocks of tokens, rows, columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm_linear import EPS
from ..slot_tables import SlotTables
from .router import DTYPES, Tiling
from .router_kernels import _exact_dot, _softmax

BLOCK_ROWS = 16  # what tl.dot takes at least; most mixtures have fewer experts in a block
MANY_TOKENS = 64  # from which on several tokens share a program that weighs, a warp each


def score_tiling(T: int, dtype: torch.dtype) -> Tiling:
    """Few tokens: one a program, so that none waits for another's slot, and many spans; else blocks that reuse W.

    As few kinds as will do: each is compiled when it is first met.
    """
    if T <= 64:
        return Tiling(1, 128, 4, 2, splits=32 if T <= 16 else 8)
    if dtype == torch.float32:  # without tensor cores
        return Tiling(16, 32, 4, 2, splits=32 if T <= 256 else 8)
    if T <= 1024:
        return Tiling(16, 64, 4, 3, splits=32 if T <= 256 else 8)
    return Tiling(64, 64, 4, 3, splits=8)


def cuts(T: int, H: int, dtype: torch.dtype) -> tuple[Tiling, int, int, int]:
    """The tiling, the columns of a block and of a span, and how many spans there are."""
    tiling = score_tiling(T, dtype)
    width = min(tiling.columns, max(16, triton.next_power_of_2(H)))
    span = triton.cdiv(triton.cdiv(H, tiling.splits), width) * width
    return tiling, width, span, triton.cdiv(H, span)


@triton.jit
def _slot_of(slot_ptr, t, T, S: tl.constexpr):
    """The slot of each token t, and whether it is one of the S; 0 where it is not."""
    slot = tl.load(slot_ptr + t, t < T, -1)
    is_slot = (slot >= 0) & (slot < S)
    return tl.where(is_slot, slot, 0).to(tl.int32), is_slot


@triton.jit
def _entering(h_ptr, residual_ptr, t, column, h_stride, residual_stride, exists):
    """What enters the block, [BT, BH]: the sum in the dtype of h, as the model computes it."""
    h = tl.load(h_ptr + t * h_stride + column, exists, 0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + t * residual_stride + column, exists, 0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def _add_product(h, w, total, BT: tl.constexpr):
    """total + h @ w, h [BT, BH], w [BH, BN] float32, in float32's precision."""
    if BT == 1:
        return total + tl.sum(tl.trans(h).to(tl.float32) * w, axis=0, keep_dims=True)
    elif h.dtype == tl.float16:  # its 11 bits are 8 and 3 of bfloat16, whose range holds those of h and of w
        high = h.to(tl.bfloat16)
        low = (h.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        return _exact_dot(high, w, _exact_dot(low, w, total))
    else:
        return _exact_dot(h, w, total)


@triton.jit(do_not_specialize=["T"])  # every length of a prompt would compile anew
def score_kernel(
    h_ptr, residual_ptr, slot_ptr, first_ptr, num_rows_ptr, products_ptr, squares_ptr, T, h_stride, residual_stride,
    H: tl.constexpr, N: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Products [splits, T, N] and sums of squares [splits, T]; what no router needs is not written."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)[:, None]).to(tl.int64)
    n = tl.program_id(2) * BN + tl.arange(0, BN)[None, :]
    slot, is_slot = _slot_of(slot_ptr, t, T, S)
    num_rows = tl.where(is_slot, tl.load(num_rows_ptr + slot), 0)
    is_scored = num_rows > tl.program_id(2) * BN
    z = tl.zeros((BT, BN), tl.float32)
    squares = tl.zeros((BT, 1), tl.float32)
    for s in range(tl.min(tl.where(is_scored, slot, S)), tl.max(tl.where(is_scored, slot, -1)) + 1):
        mine = is_scored & (slot == s)
        if tl.max(mine.to(tl.int32)) > 0:
            rows = tl.load(num_rows_ptr + s)
            w_ptr = first_ptr + (s * N + n.to(tl.int64)) * H
            slot_z = tl.zeros((BT, BN), tl.float32)
            slot_squares = tl.zeros((BT, BH), tl.float32)
            for step in range(0, SPAN, BH):
                column = tl.program_id(1) * SPAN + step + tl.arange(0, BH)
                across, down = column[None, :], column[:, None]
                h = _entering(h_ptr, residual_ptr, t, across, h_stride, residual_stride, (t < T) & (across < H))
                w = tl.load(w_ptr + down, (n < rows) & (down < H), 0.0)
                slot_squares += h.to(tl.float32) * h.to(tl.float32)
                slot_z = _add_product(h, w, slot_z, BT)
            z = tl.where(mine, slot_z, z)
            squares = tl.where(mine, tl.sum(slot_squares, axis=1, keep_dims=True), squares)
    at = tl.program_id(1).to(tl.int64) * T + t
    tl.store(products_ptr + at * N + n, z, is_scored & (n < num_rows))
    tl.store(squares_ptr + at, squares, is_scored & (tl.program_id(2) == 0))


@triton.jit
def _total(part_ptr, step, exists, SPLITS: tl.constexpr):
    """The sum of all splits' parts, in their order."""
    total = tl.load(part_ptr, exists, 0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + split * step, exists, 0.0)
    return total


@triton.jit
def _second_layer(
    products_ptr, second_ptr, rstd, slot, num_experts, units, t, e, T,
    N: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Logits [BT, BN] from BU hidden units at a time."""
    z = tl.zeros((BT, BN), tl.float32)
    row = ((slot * N + e) * N)[:, :, None]
    for start in range(0, tl.max(units), BU):
        unit = start + tl.arange(0, BU)[None, :]
        first = _total(products_ptr + t * N + unit, T.to(tl.int64) * N, unit < units, SPLITS) * rstd
        active = first / (1.0 + tl.exp(-first))
        exists = (e < num_experts)[:, :, None] & (unit < units)[:, None, :]
        second = tl.load(second_ptr + row + unit[:, None, :], exists, 0.0)
        z += tl.sum(second * active[:, None, :], axis=2)
    return z


@triton.jit
def _top_k_of_each(p, e, exists, num_experts, top_k):
    """[BT, BN] bool: exactly top_k experts a token, of equal ones the first; where that is all, without a search."""
    left = tl.where(exists, p, -1.0)
    is_dense = top_k >= num_experts
    for step in range(tl.max(tl.where(is_dense, 0, top_k))):
        best = e == tl.argmax(left, axis=1, keep_dims=True)
        left = tl.where(best & (step < top_k), -1.0, left)
    return exists & (is_dense | (left < 0))


@triton.jit(do_not_specialize=["T"])
def weigh_kernel(
    products_ptr, squares_ptr, slot_ptr, second_ptr, outside_ptr, num_experts_ptr, num_rows_ptr, has_hidden_ptr,
    rank_ptr, top_k_ptr, temperature_ptr, scale_ptr, gate_ptr, T, gate_stride, eps,
    H: tl.constexpr, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gate [T, R]."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)[:, None]).to(tl.int64)
    e = tl.arange(0, BN)[None, :]
    c = tl.arange(0, BR)[None, :]
    slot, is_slot = _slot_of(slot_ptr, t, T, S)
    num_experts = tl.where(is_slot, tl.load(num_experts_ptr + slot), 0)
    gate = tl.full((BT, BR), 1.0, tl.float32)
    if tl.max(num_experts) > 0:
        is_mixed = num_experts > 0
        exists = e < num_experts
        num_rows = tl.where(is_mixed, tl.load(num_rows_ptr + slot), 0)
        has_hidden = is_mixed & (tl.load(has_hidden_ptr + slot) != 0)
        rstd = 1.0 / tl.sqrt_rn(_total(squares_ptr + t, T, is_mixed, SPLITS) / H + eps)
        z = _total(products_ptr + t * N + e, T.to(tl.int64) * N, exists & (e < num_rows), SPLITS) * rstd
        if tl.max(has_hidden.to(tl.int32)) > 0:
            units = tl.where(has_hidden, num_rows, 0)
            logits = _second_layer(
                products_ptr, second_ptr, rstd, slot, num_experts, units, t, e, T, N, SPLITS, BT, BN, BU
            )
            z = tl.where(has_hidden, logits, z)
        p, _ = _softmax(z / tl.load(temperature_ptr + slot), exists)
        selected = _top_k_of_each(p, e, exists, num_experts, tl.load(top_k_ptr + slot))
        outside = tl.load(outside_ptr + slot * N + e, exists, 0.0)
        shares = tl.where(exists, tl.where(selected, p, p * outside), 0.0)
        weights = shares / tl.sum(shares, axis=1, keep_dims=True) * tl.load(scale_ptr + slot)
        rank = tl.maximum(tl.load(rank_ptr + slot), 1)  # 0 where the slot never held a mixture
        expert = tl.broadcast_to(c // rank, (BT, BR))
        of_column = tl.gather(weights, tl.minimum(expert, BN - 1), axis=1)
        gate = tl.where(is_mixed, tl.where(expert < num_experts, of_column, 0.0), 1.0)
    tl.store(gate_ptr + t * gate_stride + c, gate, (t < T) & (c < R))


def route_slots(
    hidden_TH: Tensor,
    tables: SlotTables,
    block: int,
    slot_T: Tensor,
    gate_TR: Tensor,
    residual_TH: Tensor | None = None,
) -> None:
    """See `route_slots_reference`. Waits for nothing on the device, and can be captured in a CUDA graph.

    Args:
        hidden_TH: [T, H] bfloat16, float16 or float32; rows may lie apart.
        slot_T: [T] int32 or int64; any number that is no slot means none.
        gate_TR: [T, R] float32, written whole; rows may lie apart.
        residual_TH: [T, H] of the same dtype.

    Raises:
        ValueError: a dtype or a shape that does not fit.
    """
    tables.check(hidden_TH, slot_T, gate_TR, residual_TH)
    if hidden_TH.dtype not in DTYPES:
        raise ValueError(f"hidden_TH is {hidden_TH.dtype}, but must be bfloat16, float16 or float32")
    if gate_TR.stride(1) != 1:
        raise ValueError(f"gate_TR has stride {gate_TR.stride(1)} between columns, but must have 1")
    T, H = hidden_TH.shape
    if T == 0:
        return
    hidden = hidden_TH if hidden_TH.stride(1) == 1 else hidden_TH.contiguous()
    residual = residual_TH if residual_TH is None or residual_TH.stride(1) == 1 else residual_TH.contiguous()
    slots = slot_T.contiguous()
    N = tables.first.shape[2]
    tiling, width, span, splits = cuts(T, H, hidden.dtype)
    products = torch.empty(splits, T, N, dtype=torch.float32, device=hidden.device)
    squares = torch.empty(splits, T, dtype=torch.float32, device=hidden.device)
    sizes = {"H": H, "N": N, "S": tables.num_slots}
    at_once = 4 if T > MANY_TOKENS else 1
    with torch.cuda.device_of(hidden):  # a launch goes to the current device, which need not be the tensor's
        score_kernel[(triton.cdiv(T, tiling.tokens), splits, triton.cdiv(N, BLOCK_ROWS))](
            hidden, residual, slots, tables.first[block], tables.num_rows, products, squares, T, hidden.stride(0),
            0 if residual is None else residual.stride(0), SPAN=span, BT=tiling.tokens, BN=BLOCK_ROWS, BH=width,
            num_warps=tiling.warps, num_stages=tiling.stages, **sizes,
        )  # fmt: skip
        weigh_kernel[(triton.cdiv(T, at_once),)](
            products, squares, slots, tables.second[block], tables.outside[block], tables.num_experts,
            tables.num_rows, tables.has_hidden, tables.rank, tables.top_k, tables.temperature, tables.scale, gate_TR,
            T, gate_TR.stride(0), EPS, R=tables.max_rank, SPLITS=splits, BT=at_once,
            BN=max(16, triton.next_power_of_2(N)), BU=16, BR=triton.next_power_of_2(tables.max_rank),
            num_warps=at_once, **sizes,
        )  # fmt: skip
