"""The hand-written form: experts concatenated along the rank, products accumulated in place.

Forward:    h = x A^T;  y = x W^T + b;  y += (h * w) B^T, in place.
Backward:   g = dy B;  dB = dy^T (h * w);  dw_e = <g_e, h_e>;  dA = (g * w)^T x;  dx = dy W;  dx += (g * w) A, in place.

Saved are x, h and w; h * w is made again. Nothing of the size of y is allocated beside y, and nothing of the size of x
beside dx. The reference is reference.py. Letters: T tokens, D in, O out, E experts, r rank, R = E * r.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .pool import ExpertPool


class _Mixture(torch.autograd.Function):
    """y [T, O] for x [T, D], lora_A [R, D], lora_B [O, R], weights [T, E] and either the frozen weight [O, D] and bias
    [O], or `out` [T, O], what the base layer made of x, which is overwritten. `out` comes first: autograd passes the
    gradient of an overwritten view on as that of the first input."""

    @staticmethod
    def forward(ctx: Any, out, x, lora_A, lora_B, weights, weight, bias):
        h = x @ lora_A.t()
        if out is None:
            out = F.linear(x, weight, bias)
        else:
            ctx.mark_dirty(out)
        out.addmm_(_weighted(h, weights), lora_B.t())
        ctx.save_for_backward(x, h, weights, lora_A, lora_B, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, h, weights, lora_A, lora_B, weight = ctx.saved_tensors
        need_out, need_x, need_A, need_B, need_w, _, _ = ctx.needs_input_grad
        dx = dA = dB = dw = None
        if need_B:
            dB = dy.t() @ _weighted(h, weights)
        if need_x or need_A or need_w:
            g = dy @ lora_B
            if need_w:
                dw = (g * h).unflatten(-1, (weights.shape[-1], -1)).sum(-1)
            g = _weighted(g, weights)
            if need_A:
                dA = g.t() @ x
            if need_x:
                dx = g @ lora_A if weight is None else (dy @ weight).addmm_(g, lora_A)
        return dy if need_out else None, dx, dA, dB, dw, None, None


def _weighted(h: Tensor, weights: Tensor) -> Tensor:
    """h [T, E * r] with each expert's rank block multiplied by its weight, weights [T, E]."""
    return (h.unflatten(-1, (weights.shape[-1], -1)) * weights.unsqueeze(-1)).flatten(-2)


def can_fuse(base_layer: nn.Module, pools: list[ExpertPool]) -> TypeGuard[nn.Linear]:
    """Whether the hand-written form serves this layer; else the caller uses a form that autograd differentiates."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the plain form, and does not trace in-place autograd functions
    uniform = len({pool.rank for pool in pools}) == 1
    return type(base_layer) is nn.Linear and uniform and not any(pool.drops for pool in pools)


def mixture_fused(base_layer: nn.Linear, x: Tensor, pools: list[ExpertPool], weights: Tensor) -> Tensor:
    """base_layer(x) plus the mixture: x [..., D], weights [..., E] -> [..., O] in the dtype of the base layer's output.

    The factors are cast to that dtype, as autocast does; the frozen product joins the function where nobody watches it.
    """
    out = None if _is_plain(base_layer) and x.dtype == base_layer.weight.dtype else base_layer(x)
    dtype = x.dtype if out is None else out.dtype
    lora_A = _joined([pool.lora_A for pool in pools], dtype, dim=0)
    lora_B = _joined([pool.lora_B for pool in pools], dtype, dim=1)
    shares = weights.split([pool.num_experts for pool in pools], dim=-1)
    scaled = _joined([share * pool.scaling for share, pool in zip(shares, pools, strict=True)], dtype, dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        y = _Mixture.apply(
            None if out is None else out.flatten(0, -2),
            x.to(dtype).flatten(0, -2),
            lora_A,
            lora_B,
            scaled.flatten(0, -2),
            base_layer.weight if out is None else None,
            base_layer.bias if out is None else None,
        )
    return y.view(*x.shape[:-1], -1)


def _joined(tensors: list[Tensor], dtype: torch.dtype, dim: int) -> Tensor:
    tensors = [tensor.to(dtype) for tensor in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


def _is_plain(base_layer: nn.Linear) -> bool:
    """Whether calling the base layer does nothing but x W^T + b with frozen W and b."""
    hooks = base_layer._forward_hooks or base_layer._forward_pre_hooks or base_layer._backward_hooks
    is_frozen = not any(parameter.requires_grad for parameter in base_layer.parameters())
    is_untouched = "forward" not in vars(base_layer) and not torch.is_autocast_enabled(base_layer.weight.device.type)
    return not hooks and is_frozen and is_untouched and type(base_layer.weight.data) is Tensor
