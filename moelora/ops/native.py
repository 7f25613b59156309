"""A base's own experts, fused in three-dimensional parameters, with one low-rank pair for each of them.

The base's router has decided: a token goes to K of the N native experts. Its K rows are sorted by expert, so that each
product, of frozen weights and of factors, is one grouped product over all experts. W + BA is never made: beside the
frozen products there are h = x A^T and h B^T, and the gradient of W is not computed.

Letters: T tokens, K native experts of a token, S = T * K rows, N native experts, D in, O out, r rank of one pair, R of
all pairs of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transforms import is_transformed

RANKS = 8  # a rank that is no multiple is padded: rows of grouped products have to begin at multiples of 16 bytes
_ALIGNED = 16


@dataclass(frozen=True)
class NativePairs:
    """One adapter's low-rank pairs for one parameter, in PEFT's layout; of a factor that all experts share, that one.

    Attributes:
        lora_A: [N * r, D], the ranks of one expert beside each other; [r, D] if shared.
        lora_B: [O, r * N], the experts of one rank beside each other; [O, r] if shared.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    shares_A: bool = False
    shares_B: bool = False

    def down(self, num_experts: int) -> Tensor:
        """A of each expert [N, r, D], or of all [1, r, D]."""
        return self.lora_A.view(1 if self.shares_A else num_experts, -1, self.lora_A.shape[1])

    def up(self, num_experts: int) -> Tensor:
        """Scaled B of each expert [N, r, O], or of all [1, r, O]."""
        experts = 1 if self.shares_B else num_experts
        return self.lora_B.view(self.lora_B.shape[0], -1, experts).permute(2, 1, 0) * self.scaling


Pairs = Mapping[str, Sequence[NativePairs]]
"""By the parameter's name, those of every active adapter."""


@dataclass(frozen=True)
class _Rows:
    """The rows of all tokens, sorted by native expert."""

    order: Tensor  # [S]: the row's place in [T, K], flattened
    inverse: Tensor  # [S]: where each place of [T, K] has its row
    experts: Tensor  # [S]
    ends: Tensor  # [N] int32: where each expert's rows end
    top_k: int

    @classmethod
    def of(cls, experts_TK: Tensor, num_experts: int) -> _Rows:
        experts, order = experts_TK.flatten().sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        every = torch.arange(num_experts, device=order.device, dtype=experts.dtype)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        return cls(order, inverse, experts, ends, experts_TK.shape[-1])


def native_experts(experts: Any, pairs: Pairs, hidden: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What a base's experts make of hidden [T, D] -> [T, D], with low-rank pairs on their parameters.

    Args:
        experts: the base's module, as transformers' `use_experts_implementation` describes it.
        experts_TK: the native experts of each token; one beyond the last is nobody.
        weights_TK: what multiplies their outputs.
    """
    last = experts.num_experts - 1
    weights_TK = weights_TK.masked_fill(experts_TK > last, 0.0)
    rows = _Rows.of(experts_TK.clamp(max=last), experts.num_experts)
    first = first_parameter(experts)
    x = _spread(hidden, rows)
    y = _product(experts, first, pairs.get(first, ()), x, rows)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _product(experts, "down_proj", pairs.get("down_proj", ()), y, rows)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y_TKO = _collect(y, rows).view(*experts_TK.shape, -1)
    return (y_TKO * weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def native_experts_reference(
    experts: Any, pairs: Pairs, hidden: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The same as a loop over experts, whose weights are W + BA: what [`native_experts`] is tested against."""

    def linear(name: str, e: int, x: Tensor) -> Tensor:
        weight = getattr(experts, name)[e]  # [D, O] where is_transposed
        weight = weight.t() if experts.is_transposed else weight
        for pair in pairs.get(name, ()):
            A, B = (each[e % len(each)] for each in (pair.down(experts.num_experts), pair.up(experts.num_experts)))
            weight = weight + (B.t() @ A).to(weight.dtype)
        return F.linear(x, weight, getattr(experts, f"{name}_bias")[e] if experts.has_bias else None)

    total = torch.zeros_like(hidden)
    for e in range(experts.num_experts):
        token, place = torch.where(experts_TK == e)
        y = linear(first_parameter(experts), e, hidden[token])
        y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
        y = linear("down_proj", e, y)
        y = experts.post_expert_norm(y) if experts.has_post_expert_norm else y
        total = total.index_add(0, token, (y * weights_TK[token, place, None]).to(total.dtype))
    return total


_DESCRIBED_BY = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def is_native(module: nn.Module) -> bool:
    """Whether it holds native experts, described as transformers' `use_experts_implementation` does."""
    if any(name not in module.__dict__ for name in _DESCRIBED_BY):
        return False
    weights = [module._parameters.get(name) for name in (first_parameter(module), "down_proj")]
    return all(weight is not None and weight.dim() == 3 for weight in weights)


def first_parameter(experts: Any) -> str:
    """The parameter that reads the hidden states."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def native_width(experts: Any) -> int:
    """D, of what enters the experts and leaves them."""
    weight = getattr(experts, first_parameter(experts))
    return weight.shape[1 if experts.is_transposed else 2]


def _product(experts: Any, name: str, pairs: Sequence[NativePairs], x: Tensor, rows: _Rows) -> Tensor:
    """[S, O]: each row of x [S, D] times its expert's weight, bias and pairs."""
    weight = getattr(experts, name)
    x = x.to(weight.dtype)  # as transformers does: autocast knows no grouped products
    y = _grouped(x, weight if experts.is_transposed else weight.transpose(1, 2), rows)
    if pairs:
        A, B = _side_by_side(pairs, len(weight), weight.dtype)
        y.add_(_of_all_or_each(_of_all_or_each(x, A.transpose(1, 2), rows), B, rows))
    if experts.has_bias:
        y.add_(getattr(experts, f"{name}_bias").index_select(0, rows.experts))
    return y


def _side_by_side(pairs: Sequence[NativePairs], num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [N, R, D] and scaled B [N, R, O] of all adapters, of a factor that all share [1, ...]; ranks that pad R are
    zero."""
    A = _joined([pair.down(num_experts) for pair in pairs]).to(dtype)
    B = _joined([pair.up(num_experts) for pair in pairs]).to(dtype)
    missing = -A.shape[1] % RANKS
    if missing:
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, 0, 0, missing))
    return A, B.contiguous()


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """[N or 1, r, ...] of several adapters as [N or 1, R, ...]."""
    if len(factors) == 1:
        return factors[0]
    experts = max(map(len, factors))
    return torch.cat([factor.expand(experts, -1, -1) for factor in factors], dim=1)


def _of_all_or_each(x: Tensor, factor: Tensor, rows: _Rows) -> Tensor:
    """Each row of x [S, D] times the factor [1, D, O] of all native experts, or its expert's of [N, D, O]."""
    return x @ factor[0] if len(factor) == 1 else _grouped(x, factor, rows)


def _spread(x: Tensor, rows: _Rows) -> Tensor:
    """x [T, D] as rows [S, D]; transformed, in a form that autograd differentiates."""
    return x.index_select(0, rows.order // rows.top_k) if is_transformed() else _Spread.apply(x, rows)


def _collect(y: Tensor, rows: _Rows) -> Tensor:
    """Rows [S, O] in the order of [T, K], flattened."""
    return y.index_select(0, rows.inverse) if is_transformed() else _Collect.apply(y, rows)


class _Spread(torch.autograd.Function):
    """See [`_spread`]. By the inverse order its gradient is a sum of K, where that of an index adds up rows one
    by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.order // rows.top_k)

    @staticmethod
    def backward(ctx: Any, d_SD: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        return d_SD.index_select(0, rows.inverse).view(-1, rows.top_k, d_SD.shape[-1]).sum(dim=1), None


class _Collect(torch.autograd.Function):
    """See [`_collect`]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return y.index_select(0, rows.inverse)

    @staticmethod
    def backward(ctx: Any, d_SO: Tensor) -> tuple[Tensor, None]:
        return d_SO.index_select(0, ctx.rows.order), None


def _grouped(x: Tensor, weight: Tensor, rows: _Rows) -> Tensor:
    """[S, O]: each row of x [S, D] times its expert's part of weight [N, D, O]."""
    if _serves_grouped(x, weight):
        return F.grouped_mm(x, weight, offs=rows.ends)
    return _padded(x, weight, rows)


def _serves_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a grouped product of these: by dtype, by what begins at multiples of 16 bytes, by device."""
    widths = (weight.shape[1] * x.itemsize, weight.shape[2] * x.itemsize)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or any(width % _ALIGNED for width in widths):
        return False
    if torch.compiler.is_compiling() and x.dtype is not torch.bfloat16:
        return False  # inductor has none of others
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _padded(x: Tensor, weight: Tensor, rows: _Rows) -> Tensor:
    """The same by one batched product, every expert given as many rows as the busiest has; the host waits for that.

    What is traced is to hold for other tokens too, so there every expert is given as many rows as there are.
    """
    num_experts = len(weight)
    starts = F.pad(rows.ends, (1, 0))[:-1]
    most = len(x) if is_transformed() else max(int((rows.ends - starts).max()), 1)
    places = rows.experts * most + torch.arange(len(x), device=x.device) - starts.index_select(0, rows.experts)
    padded = x.new_zeros(num_experts * most, x.shape[1]).index_copy(0, places, x)
    y = torch.bmm(padded.view(num_experts, most, -1), weight)
    return y.flatten(0, 1).index_select(0, places)
