"""The hand-written form: experts concatenated along the rank, products accumulated in place.

Forward:    h = x A^T (project.py);  y = (h * w) B^T + b;  y += x W^T, in place.
Backward:   g = dy B;  dB = dy^T (h * w);  dw_e = <g_e, h_e>;  dh = g * w;  dx += dy W, in place (project.py).

The small product comes first and the frozen one accumulates onto it: reading y again costs nothing where arithmetic
takes all the time, and the sum is rounded once. Saved are h and w, and x for A's gradient; h * w is made again.
The reference is reference.py. Letters: T tokens, D in, O out, E experts, r rank, R = E * r.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gate import weighted, weighted_backward
from .pool import ExpertPool
from .project import Projection, project, stacked


class _Expand(torch.autograd.Function):
    """y [T, O] for a projection, weights [T, E], factors B [O, R] and either the frozen weight [O, D] and bias [O], or
    `out` [T, O], what the base layer made of x, which is overwritten. `out` comes first: autograd passes the gradient
    of an overwritten view on as that of the first input."""

    @staticmethod
    def forward(ctx: Any, out, projection, h, weights, scale, weight, bias, *factors):
        lora_B = stacked(factors, h.dtype, dim=1)
        hw = weighted(h, weights, scale)
        if out is None:
            out = hw @ lora_B.t() if bias is None else torch.addmm(bias, hw, lora_B.t())
            out.addmm_(projection.x, weight.t())
        else:
            ctx.mark_dirty(out)
            out.addmm_(hw, lora_B.t())
        ctx.save_for_backward(h, weights, lora_B, weight)
        ctx.gradient, ctx.scale = projection.gradient, scale
        ctx.factors = [(factor.shape[1], factor.dtype) for factor in factors]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        h, weights, lora_B, weight = ctx.saved_tensors
        hw, dh, dw = weighted_backward(dy @ lora_B, h, weights, ctx.scale)
        dB: list[Tensor | None] = [None] * len(ctx.factors)
        if any(ctx.needs_input_grad[7:]):
            pieces = (dy.t() @ hw).split([columns for columns, _ in ctx.factors], dim=1)
            dB = [piece.to(dtype) for piece, (_, dtype) in zip(pieces, ctx.factors, strict=True)]
        if weight is not None and ctx.gradient.wanted:
            ctx.gradient.add(dy, weight)
        return dy if ctx.needs_input_grad[0] else None, None, dh, dw, None, None, None, *dB


def can_fuse(base_layer: nn.Module, pools: list[ExpertPool]) -> TypeGuard[nn.Linear]:
    """Whether the hand-written form serves this layer; else the caller uses a form that autograd differentiates."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the plain form, and does not trace in-place autograd functions
    uniform = len({pool.rank for pool in pools}) == len({pool.drop_rate for pool in pools}) == 1
    return type(base_layer) is nn.Linear and uniform


def mixture_fused(
    base_layer: nn.Linear, x: Tensor, pools: list[ExpertPool], weights: Tensor, projection: Projection | None = None
) -> Tensor:
    """base_layer(x) plus the mixture: x [..., D], weights [..., E] -> [..., O] in the dtype of the base layer's output.

    The factors are cast to that dtype, as autocast does; the frozen product joins the function where nobody watches it.

    Args:
        projection: of x for these pools, if it was made together with other linears'.
    """
    if projection is None:
        (projection,) = project(x, [pools])
    h = projection.h
    is_inside = _is_plain(base_layer) and h.dtype == base_layer.weight.dtype
    out = None if is_inside else base_layer(x)
    scale = pools[0].scaling
    if any(pool.scaling != scale for pool in pools):
        shares = weights.split([pool.num_experts for pool in pools], dim=-1)
        scale, weights = 1.0, torch.cat([share * p.scaling for share, p in zip(shares, pools, strict=True)], dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        y = _Expand.apply(
            None if out is None else out.to(h.dtype).flatten(0, -2),
            projection,
            h,
            weights.flatten(0, -2),
            scale,
            base_layer.weight if is_inside else None,
            base_layer.bias if is_inside else None,
            *[pool.lora_B for pool in pools],
        )
    return y.view(*x.shape[:-1], -1)


def _is_plain(base_layer: nn.Linear) -> bool:
    """Whether calling the base layer does nothing but x W^T + b with frozen W and b."""
    if base_layer._forward_hooks or base_layer._forward_pre_hooks or base_layer._backward_hooks:
        return False  # asked first: where ZeRO-3 has hooks, looking at the weight gathers it
    is_frozen = not any(parameter.requires_grad for parameter in base_layer.parameters())
    is_untouched = "forward" not in vars(base_layer) and not torch.is_autocast_enabled(base_layer.weight.device.type)
    return is_frozen and is_untouched and type(base_layer.weight.data) is Tensor
