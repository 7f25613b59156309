"""The kernels of router.py that keep experts within capacity: of one process, and of what data-parallel ranks share.

Over ranks, ops/data_parallel.py is the readable reference and says how it goes. Here each digit is one launch, which
works out the digits before it from their counts, summed over ranks, and counts; the last launch does what
capacity_kernel does, knowing the least that fits. Counts are added by atomics: integers have the same sum in any order.
Shapes: T tokens, E experts, N ranks, BT a block of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..data_parallel import ROUNDS
from .router_kernels import counted_tokens

FIRST, SECOND, THIRD = (tl.constexpr(1 << bits) for _, bits in ROUNDS)  # values of each digit


@triton.jit
def _keys(priority_ptr, e, t, T):
    """Bits of expert e's priorities: of floats from 0 to 1 they are in the order of the floats, of others negative."""
    return tl.load(priority_ptr + e.to(tl.int64) * T + t, t < T, -1.0).to(tl.int32, bitcast=True)


@triton.jit
def _take_back(
    key, least, room, maturity_ptr, mask_ptr, weights_ptr, dropped_ptr, counts_ptr, mass_ptr, e, t, T, scale,
    E: tl.constexpr,
):  # fmt: skip
    """Drop expert e's assignments below `least` and, of those that tie with it, all but the first `room`."""
    tied = (key == least).to(tl.int32)
    dropped = (key >= 0) & (key <= least) & ((tied == 0) | (tl.cumsum(tied, 0) > room))
    at = t.to(tl.int64) * E + e
    weights = tl.load(weights_ptr + at, t < T, 0.0)
    outside = 0.0
    if maturity_ptr is not None:
        outside = 1.0 - tl.load(maturity_ptr + e)
    weights = tl.where(dropped, weights * outside, weights)
    tl.store(weights_ptr + at, weights, dropped)
    tl.store(dropped_ptr + at, dropped.to(tl.uint8), t < T)
    tl.store(counts_ptr + e, tl.sum(tl.where(dropped, 1.0, 0.0)))
    tl.store(mass_ptr + e, tl.sum(tl.where(counted_tokens(mask_ptr, t, T), weights, 0.0)) / scale)


@triton.jit(do_not_specialize=["T"])  # every length of a prompt would compile anew
def capacity_kernel(
    priority_ptr, maturity_ptr, mask_ptr, weights_ptr, dropped_ptr, counts_ptr, mass_ptr, T, scale, share,
    E: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One expert keeps its assignments of highest priority, of equal ones the first; see routing.within_capacity."""
    e = tl.program_id(0)
    t = tl.arange(0, BT)
    key = _keys(priority_ptr, e, t, T)
    fair_share = tl.sum(tl.where(counted_tokens(mask_ptr, t, T), 1.0, 0.0)) * share
    capacity = tl.ceil(fair_share * (1 - 1e-6)).to(tl.int32)
    least = 0
    for step in range(30):  # bit by bit
        candidate = least | (1 << (29 - step))
        least = tl.where(tl.sum((key >= candidate).to(tl.int32)) >= capacity, candidate, least)
    room = capacity - tl.sum((key > least).to(tl.int32))
    _take_back(
        key, least, room, maturity_ptr, mask_ptr, weights_ptr, dropped_ptr, counts_ptr, mass_ptr, e, t, T, scale, E
    )


@triton.jit
def _with_digit(counts, least, room, SIZE: tl.constexpr):
    """`least` with its next digit, by the candidates' counts [SIZE], and how many with that digit fit."""
    digit = tl.arange(0, SIZE)
    from_top = tl.cumsum(counts, 0, reverse=True)
    chosen = tl.maximum(tl.sum((from_top >= room).to(tl.int32)) - 1, 0)
    return least * SIZE + chosen, room - tl.sum(tl.where(digit > chosen, counts, 0))


@triton.jit
def _least(first_ptr, second_ptr, e, SHARE: tl.constexpr, E: tl.constexpr):
    """The first digits, as far as they are counted, of the least that expert e keeps; how many such assignments fit."""
    least = 0
    room = 0
    if first_ptr is not None:
        # In float64, as the reference; a constant, because Triton takes a float argument as float32.
        assignments = tl.load(first_ptr + E * FIRST).to(tl.float64)
        room = tl.ceil(assignments * SHARE * (1 - 1e-6)).to(tl.int32)
        counts = tl.load(first_ptr + e * FIRST + tl.arange(0, FIRST))
        least, room = _with_digit(counts, least, room, FIRST)
    if second_ptr is not None:
        counts = tl.load(second_ptr + e * SECOND + tl.arange(0, SECOND))
        least, room = _with_digit(counts, least, room, SECOND)
    return least, room


@triton.jit(do_not_specialize=["T"])
def count_kernel(
    priority_ptr, first_ptr, second_ptr, counts_ptr, T, SHARE: tl.constexpr, E: tl.constexpr, LOW: tl.constexpr,
    BITS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Counts one expert's candidates in a block of tokens by the digit after those already counted over ranks.

    Adds to what ranks._counts_of_digit returns: counts [E * 2^BITS + 1], the last one of all experts together.
    """
    e = tl.program_id(0)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    key = _keys(priority_ptr, e, t, T)
    least, _ = _least(first_ptr, second_ptr, e, SHARE, E)
    is_candidate = (key >= 0) & (key >> (LOW + BITS) == least)
    digit = (key >> LOW) & ((1 << BITS) - 1)
    tl.atomic_add(counts_ptr + (e << BITS) + digit, 1, is_candidate, sem="relaxed")
    tl.atomic_add(counts_ptr + (E << BITS), tl.sum(is_candidate.to(tl.int32)), sem="relaxed")


@triton.jit(do_not_specialize=["T", "rank"])
def capacity_over_ranks_kernel(
    priority_ptr, first_ptr, second_ptr, third_ptr, maturity_ptr, mask_ptr, weights_ptr, dropped_ptr, counts_ptr,
    mass_ptr, T, scale, rank, SHARE: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr = 16,
):  # fmt: skip
    """capacity_kernel, with the least that fits from the counts of each digit over ranks; third [N, E * THIRD + 1]."""
    e = tl.program_id(0)
    least, room = _least(first_ptr, second_ptr, e, SHARE, E)
    digit = tl.arange(0, THIRD)
    counts = tl.zeros((THIRD,), tl.int32)
    on_lower_ranks = tl.zeros((THIRD,), tl.int32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)[:, None]
        part = tl.load(third_ptr + n * (E * THIRD + 1) + e * THIRD + digit[None, :], n < N, 0)
        counts += tl.sum(part, axis=0)
        on_lower_ranks += tl.sum(tl.where(n < rank, part, 0), axis=0)
    least, room = _with_digit(counts, least, room, THIRD)
    room -= tl.sum(tl.where(digit == least % THIRD, on_lower_ranks, 0))
    t = tl.arange(0, BT)
    key = _keys(priority_ptr, e, t, T)
    _take_back(
        key, least, room, maturity_ptr, mask_ptr, weights_ptr, dropped_ptr, counts_ptr, mass_ptr, e, t, T, scale, E
    )
