"""Router scores: ``rms_norm(h) W^T`` in float32 without a normalised or float32 copy of h.

With n = h / rms(h) and z = W n:  dh = (W^T dz - n <z, dz> / H) / rms(h)  and  dW = dz^T n, both from h itself.

On a GPU a bfloat16 h meets W as three bfloat16 terms (8 + 8 + 8 bits of float32's 24), multiplied exactly and summed in
float32 by one tensor-core product that reads h once. Letters: T tokens, H width, N rows of W.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transforms import is_transformed

EPS = 1e-6


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_NH: Tensor) -> Tensor:
        z, rstd = _scores(hidden_TH, weight_NH)
        ctx.save_for_backward(hidden_TH, weight_NH, rstd, z)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight, rstd, z = ctx.saved_tensors
        scaled = dz * rstd
        dh = dw = None
        if ctx.needs_input_grad[0]:
            along = (dz * z).sum(-1, keepdim=True) * rstd.square() / hidden.shape[-1]
            dh = _product_like(scaled, weight.to(z.dtype), hidden).addcmul_(hidden, along.to(hidden.dtype), value=-1)
        if ctx.needs_input_grad[1]:
            dw = _exact_product(hidden.t(), scaled).t().to(weight.dtype)
        return dh, dw


def norm_linear(hidden: Tensor, weight_NH: Tensor) -> Tensor:
    """``F.linear(rms_norm(hidden), weight)``: hidden [..., H] of any floating dtype -> [..., N], float32 or wider."""
    hidden_TH = hidden.flatten(0, -2)
    if is_transformed():
        exact = torch.promote_types(weight_NH.dtype, torch.float32)
        return F.linear(F.rms_norm(hidden.to(exact), hidden.shape[-1:], eps=EPS), weight_NH.to(exact))
    z = _NormLinear.apply(hidden_TH, weight_NH) if torch.is_grad_enabled() else _scores(hidden_TH, weight_NH)[0]
    return z.view(*hidden.shape[:-1], weight_NH.shape[0])


def norm_linear_few(hidden_TH: Tensor, weight_NH: Tensor) -> Tensor:
    """[T, N] of `norm_linear` in fewer operations, without gradient: for decoded tokens on a CPU."""
    hidden_TH, weight_NH = hidden_TH.float(), weight_NH.float()
    norm_T1 = torch.linalg.vector_norm(hidden_TH, dim=-1, keepdim=True)
    rstd_T1 = torch.addcmul(_eps(hidden_TH.device), norm_T1, norm_T1, value=1 / hidden_TH.shape[-1]).rsqrt_()
    return F.linear(hidden_TH, weight_NH).mul_(rstd_T1)


@cache
def _eps(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(EPS, device=device)


def _scores(hidden_TH: Tensor, weight_NH: Tensor) -> tuple[Tensor, Tensor]:
    """z [T, N] and 1 / rms(h) [T, 1], float32 or wider."""
    exact = torch.promote_types(weight_NH.dtype, torch.float32)
    squares = torch.linalg.vector_norm(hidden_TH, dim=-1, keepdim=True, dtype=exact).square()
    rstd = (squares / hidden_TH.shape[-1] + EPS).rsqrt()
    return _exact_product(hidden_TH, weight_NH.to(exact).t()) * rstd, rstd


def _uses_tensor_cores(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == torch.bfloat16


def _terms(exact: Tensor, count: int) -> list[Tensor]:
    """bfloat16 tensors that sum to `exact` to count * 8 bits."""
    terms = []
    for _ in range(count):
        terms.append(exact.to(torch.bfloat16))
        exact = exact - terms[-1].float()
    return terms


def _exact_product(half: Tensor, exact: Tensor) -> Tensor:
    """half [A, B] @ exact [B, N] in the precision of exact."""
    if not _uses_tensor_cores(half):
        return half.to(exact.dtype) @ exact
    product = torch.mm(half, torch.cat(_terms(exact, 3), dim=1), out_dtype=torch.float32)
    return product.unflatten(1, (3, -1)).sum(1)


def _product_like(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """left [T, N] @ right [N, H] in the dtype of `like`, rounded once."""
    if not _uses_tensor_cores(like):
        return (left @ right).to(like.dtype)
    (a, b), (c, d) = _terms(left, 2), _terms(right, 2)
    return torch.cat([a, b, a], dim=1) @ torch.cat([c, c, d], dim=0)  # ac + bc + ad: 16 bits, then bfloat16's 8
