"""The hand-written form: experts concatenated along the rank, products accumulated in place, x read once per group.

Linears that read the same x under the same routing weights (q, k and v; gate and up) are computed together:

Forward:    h = dropout(x) A^T for all of them;  y = (h * w) B^T + b;  y += x W^T, in place.
Backward:   g = dy B;  dB = dy^T (h * w);  dw_e = <g_e, h_e>;  dh = g * w;  dA = dh^T dropout(x);
            dx = dh A;  dx += dy W for each of them, in place.

The small product comes first and the frozen one accumulates onto it: y is then read inside a product that is bound by
arithmetic, not in a pass of its own, and the sum is rounded once. Saved are x (once, or what it is made of: remade.py),
h and w, and of dropout one byte per element of x; h * w is made again. The factors are saved as they are multiplied:
cast and stacked once a step.
The reference is reference.py.
Letters: T tokens, D in, O out, E experts, r rank, R = E * r, G linears of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import compute_dtype, without_autocast
from .operands import FactorStack, Operands, operands_of
from .pool import ExpertPool
from .remade import source_of
from .transforms import is_transformed
from .triton import launches_are_free
from .weighted import weighted, weighted_, weighted_backward

FEW_TOKENS = 64  # up to which a launch costs more than the arithmetic in it


@dataclass(frozen=True)
class Reader:
    """A linear that reads x: its base layer, or what calls it, and the factors of its adapters in expert order."""

    base_layer: nn.Module | Callable[[Tensor], Tensor]
    pools: Sequence[ExpertPool]

    def goes_with(self, other: Reader) -> bool:
        """Whether one product with x can serve both."""
        mine, its = ([(p.num_experts, p.rank, p.scaling, p.drop_rate) for p in r.pools] for r in (self, other))
        return mine == its


Base = tuple[Tensor | None, Tensor | None]


class FusedGroup:
    """Linears that read one x under one set of weights, ready to be called: what every call would find out again.

    x and the factors are cast to the dtype that a linear would compute in (x's own, or autocast's), and the frozen
    product joins the function where nobody watches it.

    Args:
        readers: all go with each other ([`Reader.goes_with`]), and their pools can be fused.
        dtype: as `compute_dtype` says of x.

    Attributes:
        scale: the pools' scaling, where all have the same power of two: no product of it is rounded, wherever it comes.
        scalings: else (number of experts, scaling) of each pool, as `scaled_weights` takes them.
        bases: what is frozen of each reader: weight [O, D] and bias [O] of a plain linear, which are constants; of
            others both are None.
    """

    def __init__(self, readers: Sequence[Reader], dtype: torch.dtype) -> None:
        pools = readers[0].pools
        self.dtype = dtype
        self.base_layers = [reader.base_layer for reader in readers]
        self.bases = [_base(reader.base_layer, dtype) for reader in readers]
        self.is_plain = all(weight is not None for weight, _ in self.bases)
        self.num_readers = len(readers)
        self._no_outside = (None,) * self.num_readers
        self.num_pools = len(pools)  # of each reader
        self.rank = pools[0].rank  # of one expert
        self.drop_rate = pools[0].drop_rate
        scale = pools[0].scaling
        is_exact = abs(math.frexp(scale)[0]) == 0.5 and all(pool.scaling == scale for pool in pools)
        self.scale = scale if is_exact else 1.0
        self.scalings = () if is_exact else tuple((pool.num_experts, pool.scaling) for pool in pools)
        As = [pool.lora_A for reader in readers for pool in reader.pools]
        Bs = [pool.lora_B for reader in readers for pool in reader.pools]
        self.stack = FactorStack(As, Bs, self.num_pools, dtype)

    def kept_operands(self, weights_E: Tensor | None) -> Operands:
        """Operands for many calls without gradient: with the scale in them, and routing weights that are constant."""
        (operands,) = operands_of([self.stack])
        Bs = operands.Bs if self.scale == 1.0 else [B * self.scale for B in operands.Bs]
        if weights_E is None:
            return Operands(operands.A, Bs, is_scaled=True)
        per_rank = weights_E.repeat_interleave(self.rank).repeat(self.num_readers)
        return Operands((operands.A * per_rank[:, None]).to(self.dtype), Bs, is_scaled=True, is_weighted=True)

    def __call__(self, x: Tensor, weights: Tensor, operands: Operands | None = None) -> Sequence[Tensor]:
        """base_layer(x) plus the mixture for every reader: x [..., D] -> [..., O] each.

        Args:
            weights: [T, E], as `scaled_weights` makes them.
            operands: what `operands_of` makes of its `stack`, if somebody has.
        """
        outside = self.outside_of(x)
        with without_autocast(x.device.type):
            if x.dtype is not self.dtype:
                x = x.to(self.dtype)
            if operands is None:
                (operands,) = operands_of([self.stack])
            if torch.is_grad_enabled():
                return _Mixture.apply(self, operands, x, weights, *outside, *self.stack.factors)
            return self.outputs(x, weights, outside, operands, keeps_h=False)[0]

    def outside_of(self, x: Tensor) -> Sequence[Tensor | None]:
        """[..., O] that base layers make of x which are more than plain linears; None of others."""
        if self.is_plain:
            return self._no_outside
        pairs = zip(self.base_layers, self.bases, strict=True)
        return [layer(x) if weight is None else None for layer, (weight, _) in pairs]

    def dropped(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the factors read of x, and which of its elements dropout kept: None where it rests."""
        return torch.native_dropout(x, self.drop_rate, True) if self.drop_rate > 0 else (x, None)

    def dropped_again(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """What the factors read of x, made again."""
        return x if kept is None else (x * kept).div_(1 - self.drop_rate)

    def add_frozen(
        self, dx: Tensor, kept: Tensor | None, dys: Sequence[Tensor | None], Ws: Sequence[Tensor | None]
    ) -> None:
        """From the gradient of what the factors read, dx [T, D], to that of x, in place."""
        if kept is not None:
            dx.mul_(kept).div_(1 - self.drop_rate)
        for dy, W in zip(dys, Ws, strict=True):
            if dy is not None and W is not None:
                dx.addmm_(dy, W)

    def outputs(
        self, x: Tensor, weights: Tensor, outside: Sequence[Tensor | None], operands: Operands, keeps_h: bool
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """y [..., O] of every reader; h [T, G * R], where it is kept; what dropout kept of x [T, D], None where it
        rests."""
        x_TD, scale = flat(x), 1.0 if operands.is_scaled else self.scale
        read, kept = self.dropped(x_TD)
        h = hw = F.linear(read, operands.A)
        if not operands.is_weighted and h.shape[0] <= FEW_TOKENS and launches_are_free(h):
            expand: Callable[..., Tensor] = partial(_expand_few, weights, self.rank)
        else:
            expand = _expand
            if not operands.is_weighted:
                hw = (weighted if keeps_h else weighted_)(h, weights, self.rank)
        hws = (hw,) if self.num_readers == 1 else hw.chunk(self.num_readers, dim=1)
        parts = zip(hws, operands.Bs, self.bases, outside, strict=True)
        ys = tuple([expand(x_TD, scale, *part) for part in parts])
        if x.dim() != 2:
            for y in ys:
                y.resize_((*x.shape[:-1], y.shape[-1]))  # no view
        return ys, h, kept


class _Mixture(torch.autograd.Function):
    """One y [..., O] for each reader of x [..., D], under weights [T, E].

    Tensors come and go in the shape that the model gives them: a view outside costs the host two more steps of
    autograd. No y is a view made in here: autograd forbids to change those in place, as some models do with their
    projections.
    """

    @staticmethod
    def forward(ctx: Any, group: FusedGroup, operands: Operands, x: Tensor, weights: Tensor, *tensors: Tensor | None):
        ys, h, kept = group.outputs(x, weights, tensors[: group.num_readers], operands, keeps_h=True)
        source = source_of(x)
        frozen = (weight for weight, _ in group.bases)
        ctx.save_for_backward(h, weights, kept, operands.A, *operands.Bs, *frozen, *source.tensors)
        ctx.group, ctx.device, ctx.make, ctx.shape = group, x.device.type, source.make, x.shape
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
        h, weights, kept, A, *saved = ctx.saved_tensors
        readers, stack = group.num_readers, group.stack
        Bs, Ws, source = saved[:readers], saved[readers : 2 * readers], saved[2 * readers :]
        _, _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        needs_outside, needs_factors = needs[:readers], needs[readers:]
        needs_A, needs_B = any(needs_factors[: len(stack.As)]), any(needs_factors[len(stack.As) :])

        dys_TO = [None if dy is None else flat(dy if dy.dtype is h.dtype else dy.to(h.dtype)) for dy in dys]
        hw, dh, dw = weighted_backward(_products(dys_TO, Bs, h), h, weights, group.rank, group.scale)
        dBs: list[Tensor | None] = [None] * readers
        if needs_B:
            pairs = zip(dys_TO, (hw,) if readers == 1 else hw.chunk(readers, dim=1), strict=True)
            dBs = [None if dy is None else _product_in(stack.factor_dtype, dy.t(), part) for dy, part in pairs]
        dA = None
        if needs_A:
            read = group.dropped_again(flat(ctx.make(*source)), kept)
            dA = _product_in(stack.factor_dtype, dh.t(), read)
            del read  # made again, it is as large as dx
        dx = None
        if needs_x:
            dx = torch.mm(dh, A)
            group.add_frozen(dx, kept, dys_TO, Ws)
            dx = dx.view(ctx.shape)
        d_outside = [dy if needed else None for dy, needed in zip(dys, needs_outside, strict=True)]
        d_factors = stack.split_gradients(dys, dA, *dBs)
        return None, None, dx, dw if needs_weights else None, *d_outside, *d_factors


def flat(values: Tensor) -> Tensor:
    """[..., N] as [T, N]."""
    return values if values.dim() == 2 else values.reshape(-1, values.shape[-1])


def _product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N] in dtype; where that is wider, and the device can, the sums are never rounded."""
    if left.dtype is dtype:
        return torch.mm(left, right)
    if left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _expand(x: Tensor, scale: float, hw: Tensor, B: Tensor, base: Base, outside: Tensor | None) -> Tensor:
    """scale times hw [T, R] times B^T, plus what is frozen: [T, O]."""
    weight, bias = base
    if outside is not None:
        if outside.dtype == hw.dtype:
            return torch.addmm(flat(outside), hw, B.t(), alpha=scale)
        return torch.add(flat(outside), hw @ B.t(), alpha=scale).to(outside.dtype).contiguous()
    if bias is not None:
        y = torch.addmm(bias, hw, B.t(), alpha=scale)
    elif scale == 1.0:
        y = F.linear(hw, B)
    else:  # by a product that would read y, were it not times 0
        y = hw.new_empty((hw.shape[0], B.shape[0]))
        torch.addmm(y, hw, B.t(), beta=0, alpha=scale, out=y)
    return y.addmm_(x, weight.t())  # type: ignore[union-attr]


def _expand_few(
    weights: Tensor, rank: int, x: Tensor, scale: float, h: Tensor, B: Tensor, base: Base, outside: Tensor | None
) -> Tensor:
    """What _expand makes of weighted(h), in one launch after the frozen product."""
    from .triton.expand import add_expanded

    y = F.linear(x, *base) if outside is None else flat(outside).clone(memory_format=torch.contiguous_format)  # type: ignore[arg-type]
    add_expanded(y, h, weights, B, rank, scale)
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


def can_fuse(pools: Sequence[ExpertPool]) -> bool:
    """Whether the hand-written form serves these; else the caller uses a form that autograd differentiates."""
    if torch.compiler.is_compiling() or is_transformed():
        return False  # inductor fuses the plain form, and does not trace in-place autograd functions
    return len({(pool.rank, pool.drop_rate) for pool in pools}) == 1 and pools[0].drop_rate < 1


def scaled_weights(weights: Tensor, scalings: Sequence[tuple[int, float]]) -> Tensor:
    """Routing weights [..., E] as [T, E]; times each pool's scaling, where they differ."""
    weights_TE = flat(weights)
    if not scalings:
        return weights_TE
    shares = weights_TE.split([count for count, _ in scalings], dim=-1)
    return torch.cat([share * scale for share, (_, scale) in zip(shares, scalings, strict=True)], dim=-1)


def mixture_fused(x: Tensor, readers: Sequence[Reader], weights: Tensor) -> Sequence[Tensor]:
    """base_layer(x) plus the mixture for every reader: x [..., D], weights [..., E] -> [..., O] each.

    Args:
        readers: as [`FusedGroup`] takes them.
    """
    group = FusedGroup(readers, compute_dtype(x))
    return group(x, scaled_weights(weights, group.scalings))


def launches_cost_most(x: Tensor) -> bool:
    """Whether x [..., D] holds so few tokens, and is on a GPU, that launches cost more than the arithmetic in them."""
    return x.is_cuda and x.shape[:-1].numel() <= FEW_TOKENS


def _base(base_layer: Any, dtype: torch.dtype) -> Base:
    return (base_layer.weight, base_layer.bias) if is_plain(base_layer, dtype) else (None, None)


def is_plain(base_layer: Any, dtype: torch.dtype) -> bool:
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
