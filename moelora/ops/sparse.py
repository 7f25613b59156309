"""The sparse form: each token times its own experts alone, for routing that gives weight to few of many.

Linears that read the same x are computed in one autograd function, as in fused.py, whose letters and order of sums this
shares. Of every pair p of a token t and one of its experts e, with rows sorted by expert:

Forward:    h_p = A_e dropout(x_t);  y_t = sum_p w_p B_e h_p;  y += x W^T + b, in place.
Backward:   g_p = B_e^T dy_t;  dw_p = <g_p, h_p>;  dh_p = w_p g_p;  dB_e = sum_p dy_t (w_p h_p)^T;
            dA_e = sum_p dh_p dropout(x_t)^T;  dx_t = sum_p A_e^T dh_p;  dx += dy W, in place.

Saved are x (once), h [G, P, r], the pairs and their weights, and of dropout one byte per element of x: none
of it grows with the number of experts. The reference is reference.py.
Letters: T tokens, D in, O out, E experts, r rank, P pairs, G linears of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .expert_pairs import ExpertPairs
from .fused import (
    Reader,
    _chunks,
    _frozen_part,
    _halves,
    _joined,
    _unstacked,
    _without_autocast,
    compute_dtype,
)
from .gathered import expand, factor_gradients, shrink
from .pool import ExpertPool


@dataclass(frozen=True)
class _Call:
    """What is constant in one call, and in what order its tensors come."""

    pairs: ExpertPairs
    num_readers: int
    num_pools: int  # of each reader
    rank: int  # of one expert
    scale: float
    drop_rate: float

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """(outside, weight, bias) of every reader; the factors A of each; the factors B of each."""
        start = 3 * self.num_readers
        As, Bs = _halves(values[start:])
        return _chunks(values[:start], 3), _chunks(As, self.num_pools), _chunks(Bs, self.num_pools)

    def weighted(self, values_GPr: Tensor, weights_P: Tensor) -> Tensor:
        """[G, P, r] in the dtype of values: each pair's times its weight times scale."""
        return (values_GPr * (weights_P * self.scale)[:, None]).to(values_GPr.dtype)

    def by_input(self, As: Sequence[Tensor]) -> Tensor:
        """[E * r, D], of all adapters, as [E, r, D]."""
        return _whole(As, 0).unflatten(0, (-1, self.rank))

    def by_output(self, Bs: Sequence[Tensor]) -> Tensor:
        """[O, E * r], of all adapters, as [E, r, O]."""
        return _whole(Bs, 1).unflatten(1, (-1, self.rank)).permute(1, 2, 0)


class _SparseMixture(torch.autograd.Function):
    """One y [T, O] for each reader of x [T, D], as [`moelora.ops.fused._Mixture`] has them."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weights: Tensor, *tensors: Any):
        frozen, As, Bs = call.split(tensors)
        ys, h, kept = _outputs(call, x, weights, frozen, As, Bs)
        ctx.save_for_backward(x, weights, kept, h, *(weight for _, weight, _ in frozen), *tensors[3 * len(frozen) :])
        ctx.call, ctx.device = call, x.device.type
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None):
        with _without_autocast(ctx.device):  # backward may be called inside an autocast region, too
            return _gradients(ctx, dys)


def _outputs(
    call: _Call,
    x: Tensor,
    weights: Tensor,
    frozen: Sequence[Sequence[Any]],
    As: Sequence[Sequence[Tensor]],
    Bs: Sequence[Sequence[Tensor]],
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """y [T, O] of every reader; h [G, P, r]; what dropout kept of x [T, D], None where it rests."""
    read, kept = torch.native_dropout(x, call.drop_rate, True) if call.drop_rate > 0 else (x, None)
    h = x.new_empty(len(As), len(weights), call.rank)
    shrink(read, [call.by_input(A) for A in As], call.pairs, h)
    hw = call.weighted(h, weights).split(1)
    ys = tuple(_expand(call, x, hw_i, B, *parts) for hw_i, B, parts in zip(hw, Bs, frozen, strict=True))
    return ys, h, kept


def _expand(call: _Call, x: Tensor, hw: Tensor, Bs: Sequence[Tensor], outside: Any, weight: Any, bias: Any) -> Tensor:
    """The pairs' hw [1, P, r] times their blocks of B, plus what is frozen: [T, O]."""
    blocks = [call.by_output(Bs)]
    if outside is None:
        y = expand(hw, blocks, call.pairs)
        return (y if bias is None else y.add_(bias)).addmm_(x, weight.t())
    if outside.dtype != hw.dtype:
        return (outside + expand(hw, blocks, call.pairs)).to(outside.dtype)
    return expand(hw, blocks, call.pairs, onto=outside.clone(memory_format=torch.contiguous_format))


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    call: _Call = ctx.call
    x, weights, kept, h, *saved = ctx.saved_tensors
    Ws, (As, Bs) = saved[: call.num_readers], (_chunks(f, call.num_pools) for f in _halves(saved[call.num_readers :]))
    _, needs_x, needs_weights, *needs = ctx.needs_input_grad
    needs_outside, needs_A, needs_B = call.split(needs)
    keep_rate = 1 - call.drop_rate

    flat = [None if dy is None else dy.to(h.dtype) for dy in dys]
    g = torch.zeros_like(h)
    for dy, B, g_i in zip(flat, Bs, g.split(1), strict=True):
        if dy is not None:
            shrink(dy, [call.by_output(B)], call.pairs, g_i)
    hw, dh = call.weighted(h, weights), call.weighted(g, weights)
    dw = (g.to(weights.dtype) * h).sum(dim=(0, 2)).mul_(call.scale) if needs_weights else None
    dBs: list[Sequence[Tensor | None]] = [[None] * call.num_pools] * len(Bs)
    for i, (dy, needed) in enumerate(zip(flat, needs_B, strict=True)):
        if dy is not None and any(needed):
            (dBs[i],) = _of_factors(call, hw[i : i + 1], dy, Bs[i : i + 1], dim=1)
    dAs: list[Sequence[Tensor | None]] = [[None] * call.num_pools] * len(As)
    if any(map(any, needs_A)):
        read = x if kept is None else (x * kept).div_(keep_rate)
        found = _of_factors(call, dh, read, As, dim=0)
        dAs = [none if dy is None else dA for dA, none, dy in zip(found, dAs, dys, strict=True)]
    dx = None
    if needs_x:
        dx = expand(dh, [call.by_input(A) for A in As], call.pairs)
        _add_frozen(dx, flat, Ws, kept, keep_rate)
    d_frozen = [(dy if needed[0] else None, None, None) for dy, needed in zip(dys, needs_outside, strict=True)]
    return None, dx, dw, *_joined(d_frozen), *_joined(dAs), *_joined(dBs)


def _of_factors(
    call: _Call, h: Tensor, rows: Tensor, factors: Sequence[Sequence[Tensor]], dim: int
) -> list[list[Tensor]]:
    """The gradients of the factors A (dim 0) or B (dim 1) of some linears, for h [G, P, r] and rows [T, W]."""
    shape = list(factors[0][0].shape)
    shape[dim] = call.pairs.num_experts * call.rank
    wholes = [mine[0].new_empty(shape) for mine in factors]
    blocks = [call.by_output([whole]) if dim else call.by_input([whole]) for whole in wholes]
    factor_gradients(h, rows, call.pairs, blocks)
    return [_unstacked(whole, mine, dim) for whole, mine in zip(wholes, factors, strict=True)]


def _add_frozen(
    dx: Tensor, dys: Sequence[Tensor | None], Ws: Sequence[Tensor | None], kept: Tensor | None, keep_rate: float
) -> None:
    """From the gradient of what was read to that of x, in place."""
    if kept is not None:
        dx.mul_(kept).div_(keep_rate)
    for dy, W in zip(dys, Ws, strict=True):
        if dy is not None and W is not None:
            dx.addmm_(dy, W)


def mixture_sparse(x: Tensor, readers: Sequence[Reader], pairs: ExpertPairs) -> list[Tensor]:
    """[`moelora.ops.mixture_fused`] of x [..., D] under the weights that pairs were made of: [..., O] for each reader.

    Args:
        readers: linears that all go with each other ([`Reader.goes_with`]) and whose pools can be fused.
    """
    pools, dtype = readers[0].pools, compute_dtype(x)
    scale, weights = _scaled(pools, pairs)
    call = _Call(pairs, len(readers), len(pools), pools[0].rank, scale, pools[0].drop_rate)
    frozen = [_frozen_part(reader.base_layer, x, dtype) for reader in readers]
    As = [pool.lora_A for reader in readers for pool in reader.pools]
    Bs = [pool.lora_B for reader in readers for pool in reader.pools]
    x_TD = x.to(dtype).flatten(0, -2)
    with _without_autocast(x.device.type):
        ys = _SparseMixture.apply(call, x_TD, weights, *_joined(frozen), *As, *Bs)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _scaled(pools: Sequence[ExpertPool], pairs: ExpertPairs) -> tuple[float, Tensor]:
    """The scale that all experts share, and the weights [P]; where adapters differ, in the weights."""
    scale = pools[0].scaling
    if all(pool.scaling == scale for pool in pools):
        return scale, pairs.weights
    by_adapter = [pairs.weights.new_full((pool.num_experts,), pool.scaling) for pool in pools]
    scales = torch.cat([*by_adapter, pairs.weights.new_zeros(1)])  # the last one is of pairs of no expert
    return 1.0, pairs.weights * scales.index_select(0, pairs.experts)


def _whole(factors: Sequence[Tensor], dim: int) -> Tensor:
    """Those of all adapters side by side."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=dim)
