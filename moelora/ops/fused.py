"""The hand-written form: experts concatenated along the rank, products accumulated in place, x read once per group.

Linears that read the same x under the same routing weights (q, k and v; gate and up) are computed together:

Forward:    h = dropout(x) A^T for all of them;  y = (h * w) B^T + b;  y += x W^T, in place.
Backward:   g = dy B;  dB = dy^T (h * w);  dw_e = <g_e, h_e>;  dh = g * w;  dA = dh^T dropout(x);
            dx = dh A;  dx += dy W for each of them, in place.

The small product comes first and the frozen one accumulates onto it: y is then read inside a product that is bound by
arithmetic, not in a pass of its own, and the sum is rounded once. Saved are x (once), h and w, and of dropout one byte
per element of x; h * w is made again. The reference is reference.py.
Letters: T tokens, D in, O out, E experts, r rank, R = E * r, G linears of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .pool import ExpertPool
from .triton import kernels_for
from .weighted import weighted, weighted_backward

FEW_TOKENS = 64  # up to which a launch costs more than the arithmetic in it


@dataclass(frozen=True)
class Reader:
    """A linear that reads x: its base layer, and the factors of its adapters in expert order."""

    base_layer: nn.Module
    pools: Sequence[ExpertPool]

    def goes_with(self, other: Reader) -> bool:
        """Whether one product with x can serve both."""
        mine, its = ([(p.num_experts, p.rank, p.scaling, p.drop_rate) for p in r.pools] for r in (self, other))
        return mine == its


@dataclass(frozen=True)
class _Layout:
    """What is constant in one call, and in what order its tensors come."""

    num_readers: int
    num_pools: int  # of each reader
    rank: int  # of one expert
    scale: float
    drop_rate: float

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """(outside, weight, bias) of every reader; every factor A; the factors B of every reader."""
        start = 3 * self.num_readers
        middle = start + self.num_readers * self.num_pools
        return _chunks(values[:start], 3), list(values[start:middle]), _chunks(values[middle:], self.num_pools)


class _Mixture(torch.autograd.Function):
    """One y [T, O] for each reader of x [T, D], under weights [T, E]. What is frozen is either the weight [O, D] and
    bias [O] of a plain linear, which are constants here, or `outside` [T, O], what another layer made of x.

    No y is a view made in here: autograd forbids to change those in place, as some models do with their projections.
    """

    @staticmethod
    def forward(ctx: Any, layout: _Layout, x: Tensor, weights: Tensor, *tensors: Any):
        frozen, As, Bs = layout.split(tensors)
        ys, h, kept = _outputs(layout, x, weights, frozen, As, Bs)
        ctx.save_for_backward(x, h, weights, kept, *(weight for _, weight, _ in frozen), *As, *_joined(Bs))
        ctx.layout, ctx.device = layout, x.device.type
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None):
        with _without_autocast(ctx.device):  # backward may be called inside an autocast region, too
            return _Mixture._gradients(ctx, dys)

    @staticmethod
    def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        x, h, weights, kept, *saved = ctx.saved_tensors
        Ws, As, Bs = saved[: layout.num_readers], *_halves(saved[layout.num_readers :])
        _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        needs_outside, needs_A, needs_B = layout.split(needs)
        keep_rate = 1 - layout.drop_rate

        flat = [None if dy is None else dy.to(h.dtype) for dy in dys]
        g = _products(flat, _chunks(Bs, layout.num_pools), h)
        hw, dh, dw = weighted_backward(g, h, weights, layout.rank, layout.scale)
        hws = hw.chunk(layout.num_readers, dim=1)
        dBs: list[Any] = [None] * len(Bs)
        for i, (dy, needed) in enumerate(zip(flat, needs_B, strict=True)):
            if dy is not None and any(needed):
                mine = slice(i * layout.num_pools, (i + 1) * layout.num_pools)
                dBs[mine] = _unstacked(dy.t() @ hws[i], Bs[mine], dim=1)
        dAs: list[Any] = [None] * len(As)
        if any(needs_A):
            dAs = _unstacked(dh.t() @ (x if kept is None else (x * kept).div_(keep_rate)), As)
            is_read = [dy is not None for dy in dys for _ in range(layout.num_pools)]
            dAs = [dA if read else None for dA, read in zip(dAs, is_read, strict=True)]
        dx = None
        if needs_x:
            dx = dh @ _stacked(As, h.dtype)
            if kept is not None:
                dx.mul_(kept).div_(keep_rate)
            for dy, W in zip(flat, Ws, strict=True):
                if dy is not None and W is not None:
                    dx.addmm_(dy, W)
        d_frozen = [(dy if needed[0] else None, None, None) for dy, needed in zip(dys, needs_outside, strict=True)]
        return None, dx, dw if needs_weights else None, *_joined(d_frozen), *dAs, *dBs


def _outputs(
    layout: _Layout,
    x: Tensor,
    weights: Tensor,
    frozen: Sequence[Sequence[Any]],
    As: Sequence[Tensor],
    Bs: Sequence[Sequence[Tensor]],
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """y [T, O] of every reader; h [T, G * R]; what dropout kept of x [T, D], None where it rests."""
    read, kept = torch.native_dropout(x, layout.drop_rate, True) if layout.drop_rate > 0 else (x, None)
    h = F.linear(read, _stacked(As, x.dtype))
    if h.shape[0] <= FEW_TOKENS and kernels_for(h):
        hs = h.chunk(layout.num_readers, dim=1)
        ys = tuple(_expand_few(x, h_i, weights, B, layout, part) for h_i, B, part in zip(hs, Bs, frozen, strict=True))
    else:
        hws = weighted(h, weights, layout.rank, layout.scale).chunk(layout.num_readers, dim=1)
        ys = tuple(_expand(x, hw, B, *parts) for hw, B, parts in zip(hws, Bs, frozen, strict=True))
    return ys, h, kept


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _expand(x: Tensor, hw: Tensor, factors_B: Sequence[Tensor], outside: Any, weight: Any, bias: Any) -> Tensor:
    """hw [T, R] times B^T, plus what is frozen: [T, O]."""
    B = _stacked(factors_B, hw.dtype, dim=1)
    if outside is None:
        return F.linear(hw, B, bias).addmm_(x, weight.t())
    return torch.addmm(outside, hw, B.t()) if outside.dtype == hw.dtype else (outside + hw @ B.t()).to(outside.dtype)


def _expand_few(
    x: Tensor, h: Tensor, weights: Tensor, factors_B: Sequence[Tensor], layout: _Layout, frozen: Sequence[Any]
) -> Tensor:
    """What _expand makes of weighted(h), in one launch after the frozen product."""
    from .triton.expand import add_expanded

    outside, weight, bias = frozen
    y = F.linear(x, weight, bias) if outside is None else outside.clone(memory_format=torch.contiguous_format)
    add_expanded(y, h, weights, _stacked(factors_B, h.dtype, dim=1), layout.rank, layout.scale)
    return y


def _products(dys: Sequence[Tensor | None], factors_B: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """dy [T, O] B [O, R] for every reader, side by side: [T, G * R]; zero where there is no dy."""
    products = torch.empty_like(like)
    for dy, Bs, product in zip(dys, factors_B, products.chunk(len(dys), dim=1), strict=True):
        if dy is None:
            product.zero_()
        else:
            torch.mm(dy, _stacked(Bs, like.dtype, dim=1), out=product)
    return products


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    if len(factors) == 1:
        return factors[0].to(dtype)
    return torch.cat([factor.to(dtype) for factor in factors], dim=dim)


def _unstacked(gradient: Tensor, factors: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    if len(factors) == 1:
        return [gradient.to(factors[0].dtype)]
    pieces = gradient.split([factor.shape[dim] for factor in factors], dim=dim)
    return [piece.to(factor.dtype) for piece, factor in zip(pieces, factors, strict=True)]


def _chunks(values: Sequence[Any], size: int) -> list[Any]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _halves(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _joined(groups: Iterable[Sequence[Any]]) -> list[Any]:
    return [value for group in groups for value in group]


def can_fuse(pools: Sequence[ExpertPool]) -> bool:
    """Whether the hand-written form serves these; else the caller uses a form that autograd differentiates."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the plain form, and does not trace in-place autograd functions
    return len({(pool.rank, pool.drop_rate) for pool in pools}) == 1 and pools[0].drop_rate < 1


def mixture_fused(x: Tensor, readers: Sequence[Reader], weights: Tensor) -> list[Tensor]:
    """base_layer(x) plus the mixture for every reader: x [..., D], weights [..., E] -> [..., O] each.

    x and the factors are cast to the dtype that a linear would compute in (x's own, or autocast's), and the frozen
    product joins the function where nobody watches it.

    Args:
        readers: linears that all go with each other ([`Reader.goes_with`]) and whose pools can be fused.
    """
    pools, dtype = readers[0].pools, compute_dtype(x)
    scale = pools[0].scaling
    if any(pool.scaling != scale for pool in pools):
        shares = weights.split([pool.num_experts for pool in pools], dim=-1)
        scale, weights = 1.0, torch.cat([share * p.scaling for share, p in zip(shares, pools, strict=True)], dim=-1)
    layout = _Layout(len(readers), len(pools), pools[0].rank, scale, pools[0].drop_rate)
    frozen = [_frozen_part(reader.base_layer, x, dtype) for reader in readers]
    As = [pool.lora_A for reader in readers for pool in reader.pools]
    Bs = [[pool.lora_B for pool in reader.pools] for reader in readers]
    x_TD, weights_TE = x.to(dtype).flatten(0, -2), weights.flatten(0, -2)
    with _without_autocast(x.device.type):
        if torch.is_grad_enabled():
            ys = _Mixture.apply(layout, x_TD, weights_TE, *_joined(frozen), *As, *_joined(Bs))
        else:  # to one token the way through autograd costs as much as all the arithmetic
            ys = _outputs(layout, x_TD, weights_TE, frozen, As, Bs)[0]
    lead = x.shape[:-1]
    return [y.view(*lead, y.shape[-1]) for y in ys]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes x in; autocast leaves float64 alone."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def _frozen_part(base_layer: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """(None, weight, bias) of a plain linear that computes in dtype; of others (what they make of x as [T, O], None,
    None)."""
    if is_plain(base_layer, dtype):
        return None, base_layer.weight, base_layer.bias  # type: ignore[return-value]
    outside = base_layer(x)
    return outside.reshape(-1, outside.shape[-1]), None, None


def is_plain(base_layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling it does nothing but x W^T + b in dtype with frozen W and b.

    It does more where somebody hooked or replaced its forward, trains it, or changed the type of its weight.
    """
    # Hooks first: where ZeRO-3 has some, looking at the weight gathers it.
    forward_hooks = base_layer._forward_hooks or base_layer._forward_pre_hooks
    is_hooked = forward_hooks or base_layer._backward_hooks or base_layer._backward_pre_hooks
    if type(base_layer) is not nn.Linear or is_hooked or "forward" in vars(base_layer):
        return False
    parameters = [base_layer.weight] if base_layer.bias is None else [base_layer.weight, base_layer.bias]
    return not any(p.requires_grad or p.dtype != dtype or type(p) not in (nn.Parameter, Tensor) for p in parameters)
