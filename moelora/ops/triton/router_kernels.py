"""The kernels of router.py, but for capacity: capacity_kernels.py.

No atomics: programs write partial sums, which torch adds up in a fixed order.
Products of a bfloat16 h take W as three bfloat16 terms, as in norm_linear.py; others are float32 throughout.
Shapes: T tokens, H width, E experts, K top-k, BT x BE x BH a block of tokens, all experts padded, a block of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _terms(exact):
    """Three bfloat16 tensors that sum to `exact`, largest first."""
    a = exact.to(tl.bfloat16)
    rest = exact - a.to(tl.float32)
    b = rest.to(tl.bfloat16)
    return a, b, (rest - b.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _exact_dot(half, exact, total):
    """total + half @ exact in the precision of exact."""
    if half.dtype == tl.bfloat16:
        if exact.dtype == tl.bfloat16:
            return tl.dot(half, exact, total)
        else:
            a, b, c = _terms(exact.to(tl.float32))
            return tl.dot(half, a, tl.dot(half, b, tl.dot(half, c, total)))
    else:
        return tl.dot(half.to(tl.float32), exact.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _dot_like(left, right, like):
    """left @ right, two bfloat16 terms each (16 bits) where the result is rounded to bfloat16's 8."""
    if like.dtype == tl.bfloat16:
        a, b, _ = _terms(left)
        total = tl.dot(b, right.to(tl.bfloat16))
        if right.dtype != tl.bfloat16:
            right = right.to(tl.float32)
            total = tl.dot(a, (right - right.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16), total)
        return tl.dot(a, right.to(tl.bfloat16), total)
    else:
        return tl.dot(left, right.to(tl.float32), input_precision="ieee")


@triton.jit
def _softmax(z, exists):
    """softmax(z) [BT, BE] and logsumexp(z) [BT, 1] over the experts that exist."""
    z = tl.where(exists, z, -float("inf"))
    top = tl.max(z, axis=1, keep_dims=True)
    exps = tl.exp(z - top)
    total = tl.sum(exps, axis=1, keep_dims=True)
    return exps / total, top + tl.log(total)


@triton.jit
def _top_k(p, e, exists, E: tl.constexpr, K: tl.constexpr):
    """[BT, BE] bool: exactly K experts per token, of equal ones the first."""
    left = tl.where(exists, p, -1.0)
    if K < E:
        for _ in range(K):
            left = tl.where(e == tl.argmax(left, axis=1, keep_dims=True), -1.0, left)
    else:
        left = tl.full(p.shape, -1.0, tl.float32)
    return exists & (left < 0)


@triton.jit
def _shares(selected, maturity_ptr, e, E: tl.constexpr):
    """What part of its probability each expert weighs in with, before normalisation: [BT, BE]."""
    if maturity_ptr is None:
        return tl.where(selected, 1.0, 0.0)
    else:
        return tl.where(selected, 1.0, 1.0 - tl.load(maturity_ptr + e, e < E, 1.0))


@triton.jit
def counted_tokens(mask_ptr, t, T):
    """[BT, 1] bool: tokens that are there and no padding."""
    counted = t < T
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + t, t < T, 0) != 0)
    return counted


@triton.jit(do_not_specialize=["T"])  # every length of a prompt would compile anew
def forward_kernel(
    h_ptr, w_ptr, maturity_ptr, mask_ptr, weights_ptr, sums_ptr, z_ptr, rstd_ptr, priority_ptr,
    T, h_stride, temperature, scale, eps,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
    SUMS: tl.constexpr, AT_NUM_TOKENS: tl.constexpr, AT_ASSIGNMENTS: tl.constexpr, AT_TOP1: tl.constexpr,
    AT_DROPPED: tl.constexpr, AT_MASS: tl.constexpr, AT_ENTROPY: tl.constexpr, AT_TOP1_PROBS: tl.constexpr,
    AT_PROBS: tl.constexpr, AT_SQUARED_LSE: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)[:, None]).to(tl.int64)
    e = tl.arange(0, BE)[None, :]
    z = tl.zeros((BT, BE), tl.float32)
    squares = tl.zeros((BT, BH), tl.float32)
    for start in range(0, H, BH):
        column = start + tl.arange(0, BH)
        h = tl.load(h_ptr + t * h_stride + column[None, :], (t < T) & (column[None, :] < H), 0.0)
        w = tl.load(w_ptr + e * H + column[:, None], (e < E) & (column[:, None] < H), 0.0)
        squares += h.to(tl.float32) * h.to(tl.float32)
        if BT == 1:
            z += tl.sum(tl.trans(h).to(tl.float32) * w.to(tl.float32), axis=0, keep_dims=True)
        else:
            z = _exact_dot(h, w, z)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1, keep_dims=True) / H + eps)
    z = z * rstd
    if z_ptr is not None:
        tl.store(z_ptr + t * E + e, z, (t < T) & (e < E))
        tl.store(rstd_ptr + t, rstd, t < T)

    p, _ = _softmax(z / temperature, e < E)
    selected = _top_k(p, e, e < E, E, K)
    shares = p * _shares(selected, maturity_ptr, e, E)
    weights = shares / tl.sum(shares, axis=1, keep_dims=True)
    tl.store(weights_ptr + t * E + e, weights * scale, (t < T) & (e < E))

    counted = counted_tokens(mask_ptr, t, T)
    if priority_ptr is not None:  # [E, T]
        tl.store(priority_ptr + e * T + t, tl.where(counted & selected, p, -1.0), (t < T) & (e < E))

    first = e == tl.argmax(tl.where(e < E, p, -1.0), axis=1, keep_dims=True)
    entropy = tl.where(p > 0, -p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
    _, lse = _softmax(z, e < E)
    column = tl.arange(0, BE)
    sums_ptr += tl.program_id(0) * SUMS
    tl.store(sums_ptr + AT_NUM_TOKENS, tl.sum(tl.where(counted, 1.0, 0.0)))
    tl.store(sums_ptr + AT_ASSIGNMENTS + column, tl.sum(tl.where(counted & selected, 1.0, 0.0), axis=0), column < E)
    tl.store(sums_ptr + AT_TOP1 + column, tl.sum(tl.where(counted & first, 1.0, 0.0), axis=0), column < E)
    tl.store(sums_ptr + AT_DROPPED, 0.0)
    tl.store(sums_ptr + AT_MASS + column, tl.sum(tl.where(counted, weights, 0.0), axis=0), column < E)
    tl.store(sums_ptr + AT_ENTROPY, tl.sum(tl.where(counted, entropy, 0.0)))
    tl.store(sums_ptr + AT_TOP1_PROBS, tl.sum(tl.where(counted & first, p, 0.0)))
    tl.store(sums_ptr + AT_PROBS + column, tl.sum(tl.where(counted, p, 0.0), axis=0), column < E)
    tl.store(sums_ptr + AT_SQUARED_LSE, tl.sum(tl.where(counted, lse * lse, 0.0)))


@triton.jit
def _dz(
    z_ptr, dropped_ptr, maturity_ptr, mask_ptr, dweights_ptr, dprobs_ptr, dlse_ptr, t, e, T, temperature, scale,
    E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """z and d loss / d z, [BT, BE], zero where there is no token or expert."""
    exists = (t < T) & (e < E)
    counted = counted_tokens(mask_ptr, t, T)
    z = tl.load(z_ptr + t * E + e, exists, 0.0)
    p, _ = _softmax(z / temperature, e < E)
    dp = tl.zeros_like(p)
    if dweights_ptr is not None:
        selected = _top_k(p, e, e < E, E, K)
        shares = _shares(selected, maturity_ptr, e, E)
        kept = shares
        if dropped_ptr is not None:
            dropped = tl.load(dropped_ptr + t * E + e, exists, 0) != 0
            kept = _shares(selected & (dropped == 0), maturity_ptr, e, E)
        dweights = tl.load(dweights_ptr + t * E + e, exists, 0.0) * scale
        total = tl.sum(p * shares, axis=1, keep_dims=True)
        dp = (kept * dweights - shares * tl.sum(dweights * p * kept, axis=1, keep_dims=True) / total) / total
    if dprobs_ptr is not None:
        dp += tl.where(counted, tl.load(dprobs_ptr + e, e < E, 0.0), 0.0)
    dz = p * (dp - tl.sum(p * dp, axis=1, keep_dims=True)) / temperature
    if dlse_ptr is not None:  # of the sum of logsumexp(z)^2
        q, lse = _softmax(z, e < E)
        dz += tl.where(counted, 2.0 * tl.load(dlse_ptr) * lse * q, 0.0)
    return z, tl.where(exists, dz, 0.0)


@triton.jit(do_not_specialize=["T"])  # every length of a prompt would compile anew
def backward_kernel(
    h_ptr, w_ptr, maturity_ptr, mask_ptr, z_ptr, rstd_ptr, dropped_ptr, dweights_ptr, dprobs_ptr, dlse_ptr,
    dh_ptr, dw_ptr, scaled_ptr, T, h_stride, temperature, scale,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)[:, None]).to(tl.int64)
    e = tl.arange(0, BE)[None, :]
    z, dz = _dz(
        z_ptr, dropped_ptr, maturity_ptr, mask_ptr, dweights_ptr, dprobs_ptr, dlse_ptr, t, e, T, temperature, scale,
        E, K,
    )  # fmt: skip
    rstd = tl.load(rstd_ptr + t, t < T, 0.0)
    scaled = dz * rstd
    along = tl.sum(dz * z, axis=1, keep_dims=True) * rstd * rstd / H
    if scaled_ptr is not None:
        tl.store(scaled_ptr + t * E + e, scaled, (t < T) & (e < E) & (tl.program_id(1) == 0))
    if dh_ptr is not None or dw_ptr is not None:
        for step in range(0, SPAN, BH):
            start = tl.program_id(1) * SPAN + step
            column = (start + tl.arange(0, BH))[None, :]
            h = tl.load(h_ptr + t * h_stride + column, (t < T) & (column < H), 0.0)
            by_column = start + tl.arange(0, BH)[:, None]
            if dh_ptr is not None:
                row = tl.arange(0, BE)[:, None]
                w = tl.load(w_ptr + row * H + column, (row < E) & (column < H), 0.0)
                dh = _dot_like(scaled, w, h) - h.to(tl.float32) * along
                tl.store(dh_ptr + t * H + column, dh.to(h.dtype), (t < T) & (column < H))
            if dw_ptr is not None:
                dw = _exact_dot(tl.trans(h), scaled, tl.zeros((BH, BE), tl.float32))
                at = dw_ptr + tl.program_id(0).to(tl.int64) * E * H + e * H + by_column
                tl.store(at, dw, (e < E) & (by_column < H))
