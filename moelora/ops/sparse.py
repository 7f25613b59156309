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

from .autocast import without_autocast
from .expert_pairs import ExpertPairs
from .fused import Base, FusedGroup, flat
from .gathered import expand, factor_gradients, shrink


@dataclass(frozen=True)
class _Call:
    """What is constant in one call, and in what order its tensors come."""

    group: FusedGroup
    pairs: ExpertPairs
    scale: float

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], list[Sequence[Any]], list[Sequence[Any]]]:
        """One of every reader (what is outside of it, or frozen); the factors A of each; the factors B of each."""
        readers, pools = self.group.num_readers, self.group.num_pools
        factors = [tensors[i : i + pools] for i in range(readers, len(tensors), pools)]
        return tensors[:readers], factors[:readers], factors[readers:]

    def weighted(self, values_GPr: Tensor, weights_P: Tensor) -> Tensor:
        """[G, P, r] in the dtype of values: each pair's times its weight times scale."""
        return (values_GPr * (weights_P * self.scale)[:, None]).to(values_GPr.dtype)

    def by_input(self, As: Sequence[Tensor]) -> Tensor:
        """[E * r, D], of a reader's pools, as [E, r, D]."""
        return _whole(As, 0).unflatten(0, (-1, self.group.rank))

    def by_output(self, Bs: Sequence[Tensor]) -> Tensor:
        """[O, E * r], of a reader's pools, as [E, r, O]."""
        return _whole(Bs, 1).unflatten(1, (-1, self.group.rank)).permute(1, 2, 0)


class _SparseMixture(torch.autograd.Function):
    """One y [..., O] for each reader of x [..., D], as [`moelora.ops.fused._Mixture`] has them."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weights: Tensor, *tensors: Tensor | None):
        ys, h, kept = _outputs(call, x, weights, tensors)
        factors, Ws = tensors[call.group.num_readers :], [weight for weight, _ in call.group.bases]
        ctx.save_for_backward(x, weights, kept, h, *Ws, *factors)
        ctx.call, ctx.device = call, x.device.type
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None):
        with without_autocast(ctx.device):  # backward may be called inside an autocast region, too
            return _gradients(ctx, dys)


def _outputs(
    call: _Call, x: Tensor, weights: Tensor, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """y [..., O] of every reader; h [G, P, r]; what dropout kept of x [T, D], None where it rests."""
    outside, As, Bs = call.split(tensors)
    x_TD, lead = flat(x), x.shape[:-1]
    read, kept = call.group.dropped(x_TD)
    h = x.new_empty(call.group.num_readers, len(weights), call.group.rank)
    shrink(read, [call.by_input(A) for A in As], call.pairs, h)
    parts = zip(call.weighted(h, weights).split(1), Bs, call.group.bases, outside, strict=True)
    return tuple([_expand(call, x_TD, lead, *part) for part in parts]), h, kept


def _expand(
    call: _Call, x: Tensor, lead: torch.Size, hw: Tensor, Bs: Sequence[Tensor], base: Base, outside: Tensor | None
) -> Tensor:
    """The pairs' hw [1, P, r] times their blocks of B, plus what is frozen: [*lead, O]."""
    if outside is not None and outside.dtype != hw.dtype:
        return (outside + _expand(call, x, lead, hw, Bs, base, None)).to(outside.dtype)
    weight, bias = base
    y = hw.new_empty((*lead, Bs[0].shape[0]))
    y_TO = flat(y)
    onto = bias if outside is None else outside
    if onto is not None:
        y.copy_(onto)
    expand(hw, [call.by_output(Bs)], call.pairs, y_TO, adds=onto is not None)
    if weight is not None:
        y_TO.addmm_(x, weight.t())
    return y


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    call: _Call = ctx.call
    group, pairs = call.group, call.pairs
    x, weights, kept, h, *saved = ctx.saved_tensors
    Ws, As, Bs = call.split(saved)
    _, needs_x, needs_weights, *needs = ctx.needs_input_grad
    needs_outside, needs_A, needs_B = call.split(needs)

    dys_TO = [None if dy is None else flat(dy.to(h.dtype)) for dy in dys]
    g = torch.zeros_like(h)
    for dy, B, g_i in zip(dys_TO, Bs, g.split(1), strict=True):
        if dy is not None:
            shrink(dy, [call.by_output(B)], pairs, g_i)
    hw, dh = call.weighted(h, weights), call.weighted(g, weights)
    dw = (g.to(weights.dtype) * h).sum(dim=(0, 2)).mul_(call.scale) if needs_weights else None
    dBs: list[Tensor | None] = [None] * group.num_readers
    for i, (dy, needed) in enumerate(zip(dys_TO, needs_B, strict=True)):
        if dy is not None and any(needed):
            dBs[i] = dB = Bs[i][0].new_empty(group.stack.shapes[1 + i])
            factor_gradients(hw[i : i + 1], dy, pairs, [call.by_output([dB])])
    dA = None
    if any(map(any, needs_A)):
        dA = As[0][0].new_empty(group.stack.shapes[0])
        blocks = dA.view(group.num_readers, pairs.num_experts, group.rank, -1)
        factor_gradients(dh, group.dropped_again(flat(x), kept), pairs, list(blocks))
    dx = None
    if needs_x:
        dx = dh.new_empty(x.shape)
        expand(dh, [call.by_input(A) for A in As], pairs, flat(dx))
        group.add_frozen(flat(dx), kept, dys_TO, Ws)
    d_outside = [dy if needed else None for dy, needed in zip(dys, needs_outside, strict=True)]
    return None, dx, dw, *d_outside, *group.stack.split_gradients(dys, dA, *dBs)


def mixture_sparse(x: Tensor, group: FusedGroup, pairs: ExpertPairs) -> Sequence[Tensor]:
    """What group makes of x [..., D] under the weights that pairs were made of: [..., O] for each reader.

    Factors are read as they are, and cast inside the products: hundreds of experts are not copied.
    """
    scale, weights = _scaled(group, pairs)
    call, tensors = _Call(group, pairs, scale), (*group.outside_of(x), *group.stack.factors)
    with without_autocast(x.device.type):
        x = x.to(group.dtype)
        if torch.is_grad_enabled():
            return _SparseMixture.apply(call, x, weights, *tensors)
        return _outputs(call, x, weights, tensors)[0]


def _scaled(group: FusedGroup, pairs: ExpertPairs) -> tuple[float, Tensor]:
    """The scale that all experts share, and the weights [P]; where adapters differ, in the weights."""
    if not group.scalings:
        return group.scale, pairs.weights
    by_adapter = [pairs.weights.new_full((count,), own) for count, own in group.scalings]
    scales = torch.cat([*by_adapter, pairs.weights.new_zeros(1)])  # the last one is of pairs of no expert
    return 1.0, pairs.weights * scales.index_select(0, pairs.experts)


def _whole(factors: Sequence[Tensor], dim: int) -> Tensor:
    """Those of all adapters side by side."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=dim)
