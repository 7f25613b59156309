"""The hand-written form: experts concatenated along the rank, products accumulated in place, x read once per group.

Linears that read the same x under the same routing weights (q, k and v; gate and up) are computed together:

Forward:    h = dropout(x) A^T for all of them;  y = (h * w) B^T + b;  y += x W^T, in place.
Backward:   g = dy B;  dB = dy^T (h * w);  dw_e = <g_e, h_e>;  dh = g * w;  dA = dh^T dropout(x);
            dx = dh A;  dx += dy W for each of them, in place.

The small product comes first and the frozen one accumulates onto it: y is then read inside a product that is bound by
arithmetic, not in a pass of its own, and the sum is rounded once. Saved are x (once), h and w, and of dropout one byte
per element of x; h * w is made again. The factors are saved as they are multiplied: cast and stacked once a step.
The reference is reference.py.
Letters: T tokens, D in, O out, E experts, r rank, R = E * r, G linears of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import compute_dtype, without_autocast
from .pool import ExpertPool
from .triton import launches_are_free
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


Base = tuple[Tensor | None, Tensor | None]


class Operands(NamedTuple):
    """What is multiplied, as it is multiplied, without gradient."""

    A: Tensor  # [G * R, D], the factors of all readers
    Bs: list[Tensor]  # [O, R], of each
    bases: list[Base]  # [D, O] and bias [O] of each that is plain


class FusedGroup:
    """Linears that read one x under one set of weights, ready to be called: what every call would find out again.

    x and the factors are cast to the dtype that a linear would compute in (x's own, or autocast's), and the frozen
    product joins the function where nobody watches it.

    Args:
        readers: all go with each other ([`Reader.goes_with`]), and their pools can be fused.
        dtype: as `compute_dtype` says of x.

    Attributes:
        scalings: (number of experts, scaling) of each pool, as `scaled_weights` takes them.
        bases: what is frozen of each reader: weight [O, D] and bias [O] of a plain linear, which are constants; of
            others both are None.
    """

    def __init__(self, readers: Sequence[Reader], dtype: torch.dtype) -> None:
        pools = readers[0].pools
        self.dtype = dtype
        self.base_layers = [reader.base_layer for reader in readers]
        self.bases = [_base(reader.base_layer, dtype) for reader in readers]
        self.is_plain = all(weight is not None for weight, _ in self.bases)
        self.As = [pool.lora_A for reader in readers for pool in reader.pools]
        self.Bs = [pool.lora_B for reader in readers for pool in reader.pools]
        self.num_readers = len(readers)
        self._no_outside = (None,) * self.num_readers
        self.num_pools = len(pools)  # of each reader
        self.rank = pools[0].rank  # of one expert
        self.drop_rate = pools[0].drop_rate
        self.scalings = tuple((pool.num_experts, pool.scaling) for pool in pools)

    def __call__(self, x: Tensor, weights_TE: Tensor, operands: Operands | None = None) -> Sequence[Tensor]:
        """base_layer(x) plus the mixture for every reader: x [..., D] -> [..., O] each.

        Args:
            weights_TE: of all tokens, times the scalings.
            operands: those of an earlier call without gradients, if they are still the same.
        """
        outside = self._outside(x)
        with without_autocast(x.device.type):
            if x.dtype is not self.dtype:
                x = x.to(self.dtype)
            x_TD = x if x.dim() == 2 else x.flatten(0, -2)
            if torch.is_grad_enabled():
                ys = _Mixture.apply(self, x_TD, weights_TE, *outside, *self.As, *self.Bs)
            else:  # to one token the way through autograd costs as much as all the arithmetic
                ys = self.outputs(x_TD, weights_TE, outside, operands or self.operands())[0]
        if x.dim() == 2:
            return ys
        lead = x.shape[:-1]
        return [y.view(*lead, y.shape[-1]) for y in ys]

    def _outside(self, x: Tensor) -> Sequence[Tensor | None]:
        """[T, O] that base layers make of x which are more than plain linears; None of others."""
        if self.is_plain:
            return self._no_outside
        pairs = zip(self.base_layers, self.bases, strict=True)
        return [layer(x).flatten(0, -2) if weight is None else None for layer, (weight, _) in pairs]

    @torch.no_grad()
    def operands(self) -> Operands:
        """What is multiplied; the factors are cast by one operation where they have to be."""
        bases = [(None if weight is None else weight.t(), bias) for weight, bias in self.bases]
        As, Bs, pools, dtype = self.As, self.Bs, self.num_pools, self.dtype
        if all(factor.dtype == dtype for factor in (*As, *Bs)):
            stacked = Bs if pools == 1 else [torch.cat(Bs[i : i + pools], dim=1) for i in range(0, len(Bs), pools)]
            return Operands(As[0] if len(As) == 1 else torch.cat(As), stacked, bases)
        A = As[0].new_empty((sum(factor.shape[0] for factor in As), As[0].shape[1]), dtype=dtype)
        stacked = [
            Bs[i].new_empty((Bs[i].shape[0], sum(B.shape[1] for B in Bs[i : i + pools])), dtype=dtype)
            for i in range(0, len(Bs), pools)
        ]
        parts = [A] if len(As) == 1 else list(A.split([factor.shape[0] for factor in As]))
        for i, B in enumerate(stacked):
            widths = [factor.shape[1] for factor in Bs[i * pools : (i + 1) * pools]]
            parts += [B] if pools == 1 else B.split(widths, dim=1)
        torch._foreach_copy_(parts, [*As, *Bs])
        return Operands(A, stacked, bases)

    def outputs(
        self, x: Tensor, weights: Tensor, outside: Sequence[Tensor | None], operands: Operands
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """y [T, O] of every reader; h [T, G * R]; what dropout kept of x [T, D], None where it rests."""
        read, kept = torch.native_dropout(x, self.drop_rate, True) if self.drop_rate > 0 else (x, None)
        h = F.linear(read, operands.A)
        if h.shape[0] <= FEW_TOKENS and launches_are_free(h):
            small, expand = h, partial(_expand_few, weights, self.rank)
        else:
            small, expand = weighted(h, weights, self.rank), _expand
        smalls = (small,) if self.num_readers == 1 else small.chunk(self.num_readers, dim=1)
        parts = zip(smalls, operands.Bs, operands.bases, outside, strict=True)
        return tuple([expand(x, *part) for part in parts]), h, kept


class _Mixture(torch.autograd.Function):
    """One y [T, O] for each reader of x [T, D], under weights [T, E].

    No y is a view made in here: autograd forbids to change those in place, as some models do with their projections.
    """

    @staticmethod
    def forward(ctx: Any, group: FusedGroup, x: Tensor, weights: Tensor, *tensors: Tensor | None):
        A, Bs, _ = operands = group.operands()
        ys, h, kept = group.outputs(x, weights, tensors[: group.num_readers], operands)
        ctx.save_for_backward(x, h, weights, kept, A, *Bs, *(weight for weight, _ in group.bases))
        ctx.group, ctx.device = group, x.device.type
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None):
        with without_autocast(ctx.device):  # backward may be called inside an autocast region, too
            return _Mixture._gradients(ctx, dys)

    @staticmethod
    def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        group: FusedGroup = ctx.group
        x, h, weights, kept, A, *saved = ctx.saved_tensors
        readers, pools, keep_rate = group.num_readers, group.num_pools, 1 - group.drop_rate
        Bs, Ws = saved[:readers], saved[readers:]
        _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        needs_A, needs_B = needs[readers : readers + len(group.As)], needs[readers + len(group.As) :]

        flat = [None if dy is None else dy.to(h.dtype) for dy in dys]
        hw, dh, dw = weighted_backward(_products(flat, Bs, h), h, weights, group.rank)
        hws = [hw] if readers == 1 else hw.chunk(readers, dim=1)
        dBs: list[Tensor | None] = [None] * len(group.Bs)
        for i, dy in enumerate(flat):
            mine = slice(i * pools, (i + 1) * pools)
            if dy is not None and any(needs_B[mine]):
                dBs[mine] = _unstacked(dy.t(), hws[i], group.Bs[mine], dim=1)
        dAs: list[Tensor | None] = [None] * len(group.As)
        if any(needs_A):
            dAs = _unstacked(dh.t(), x if kept is None else (x * kept).div_(keep_rate), group.As, dim=0)
            if None in flat:
                dAs = [None if flat[i // pools] is None else dA for i, dA in enumerate(dAs)]
        dx = None
        if needs_x:
            dx = torch.mm(dh, A)
            if kept is not None:
                dx.mul_(kept).div_(keep_rate)
            for dy, W in zip(flat, Ws, strict=True):
                if dy is not None and W is not None:
                    dx.addmm_(dy, W)
        d_outside = [dy if needed else None for dy, needed in zip(dys, needs, strict=False)]
        return None, dx, dw if needs_weights else None, *d_outside, *dAs, *dBs


def _expand(x: Tensor, hw: Tensor, B: Tensor, base: Base, outside: Tensor | None) -> Tensor:
    """hw [T, R] times B^T, plus what is frozen: [T, O]."""
    weight_t, bias = base
    if weight_t is not None:
        return F.linear(hw, B, bias).addmm_(x, weight_t)
    assert outside is not None
    return torch.addmm(outside, hw, B.t()) if outside.dtype == hw.dtype else (outside + hw @ B.t()).to(outside.dtype)


def _expand_few(
    weights: Tensor, rank: int, x: Tensor, h: Tensor, B: Tensor, base: Base, outside: Tensor | None
) -> Tensor:
    """What _expand makes of weighted(h), in one launch after the frozen product."""
    from .triton.expand import add_expanded

    weight_t, bias = base
    if weight_t is not None:
        y = F.linear(x, weight_t.t(), bias)
    else:
        assert outside is not None
        y = outside.clone(memory_format=torch.contiguous_format)
    add_expanded(y, h, weights, B, rank)
    return y


def _products(dys: Sequence[Tensor | None], Bs: Sequence[Tensor], like: Tensor) -> Tensor:
    """dy [T, O] B [O, R] for every reader, side by side: [T, G * R]; zero where there is no dy."""
    if len(dys) == 1 and dys[0] is not None:
        return torch.mm(dys[0], Bs[0])
    products = torch.empty_like(like)
    for dy, B, product in zip(dys, Bs, products.chunk(len(dys), dim=1), strict=True):
        if dy is None:
            product.zero_()
        else:
            torch.mm(dy, B, out=product)
    return products


def _unstacked(left: Tensor, right: Tensor, factors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """left @ right, the gradient of all factors together, for each of them in its dtype."""
    dtype = factors[0].dtype
    if left.is_cuda and dtype == torch.float32 != left.dtype:
        gradient = torch.mm(left, right, out_dtype=dtype)  # summed in float32 anyway: not rounded in between
    else:
        gradient = torch.mm(left, right)
    if len(factors) == 1:
        return [gradient.to(dtype)]
    pieces = gradient.split([factor.shape[dim] for factor in factors], dim=dim)
    return [piece.to(factor.dtype) for piece, factor in zip(pieces, factors, strict=True)]


def can_fuse(pools: Sequence[ExpertPool]) -> bool:
    """Whether the hand-written form serves these; else the caller uses a form that autograd differentiates."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the plain form, and does not trace in-place autograd functions
    return len({(pool.rank, pool.drop_rate) for pool in pools}) == 1 and pools[0].drop_rate < 1


def scaled_weights(weights: Tensor, scalings: Sequence[tuple[int, float]]) -> Tensor:
    """Routing weights [..., E] as [T, E], each pool's times its scaling."""
    weights_TE = weights.flatten(0, -2)
    scale = scalings[0][1]
    if any(other != scale for _, other in scalings):
        shares = weights_TE.split([count for count, _ in scalings], dim=-1)
        return torch.cat([share * own for share, (_, own) in zip(shares, scalings, strict=True)], dim=-1)
    return weights_TE if scale == 1.0 else weights_TE * scale


def mixture_fused(x: Tensor, readers: Sequence[Reader], weights: Tensor) -> Sequence[Tensor]:
    """base_layer(x) plus the mixture for every reader: x [..., D], weights [..., E] -> [..., O] each.

    Args:
        readers: as [`FusedGroup`] takes them.
    """
    group = FusedGroup(readers, compute_dtype(x))
    return group(x, scaled_weights(weights, group.scalings))


def _base(base_layer: nn.Module, dtype: torch.dtype) -> Base:
    return (base_layer.weight, base_layer.bias) if is_plain(base_layer, dtype) else (None, None)  # type: ignore[return-value]


def is_plain(base_layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling it does nothing but x W^T + b in dtype with frozen W and b.

    It does more where somebody hooked or replaced its forward, trains it, or changed the type of its weight.
    """
    # Through the dictionary, which takes a tenth of what attributes of modules take: it is asked at every call.
    state = base_layer.__dict__
    if type(base_layer) is not nn.Linear or "forward" in state:
        return False
    # Hooks first: where ZeRO-3 has some, looking at the weight gathers it.
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return False
    weight, bias = state["_parameters"].get("weight"), state["_parameters"].get("bias")
    return weight is not None and _is_frozen(weight, dtype) and (bias is None or _is_frozen(bias, dtype))


def _is_frozen(parameter: Tensor, dtype: torch.dtype) -> bool:
    kind = type(parameter)
    return (kind is nn.Parameter or kind is Tensor) and not parameter.requires_grad and parameter.dtype == dtype
