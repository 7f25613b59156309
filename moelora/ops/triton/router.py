"""Triton form of a one-layer router: norm_linear, `routing.decision.route` and `routing.sums.RoutingSums.of` at once.

Forward:  one program scores and routes a block of tokens, and leaves its share of every sum. With a capacity, a second
          kernel, one program per expert, finds the least priority that still fits and takes the excess back. Where
          ranks share the capacity, it is found between three sums over ranks: six launches besides them.
Backward: one program routes its tokens again from the saved logits, gets dz, and walks over the columns of h and W.
Letters: T tokens, H width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import sums_layout
from ..data_parallel import ROUNDS, count_rows, num_ranks, sum_over_ranks
from ..norm_linear import EPS, _exact_product
from .capacity_kernels import capacity_kernel, capacity_over_ranks_kernel, count_kernel
from .launch import launch
from .router_kernels import backward_kernel, forward_kernel

MAX_EXPERTS = 512  # a block holds all experts
MAX_PARTIAL_BYTES = 32 * 2**20  # of dW, above which one product of all tokens is made instead
MAX_CAPACITY_TOKENS = 32768  # one program holds an expert's column in registers
COUNTED_TOKENS = 1024  # whose assignments to one expert a program counts
MAX_SINGLE_TOKENS = 64  # up to which each token gets a program of its own, without tensor cores: decoding
DTYPES = {torch.bfloat16, torch.float16, torch.float32}
_PLAIN = {Tensor, nn.Parameter}


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up. splits: programs that share one block of tokens, each with its span of columns."""

    tokens: int
    columns: int
    warps: int
    stages: int
    splits: int = 1

    def options(self, H: int, E: int) -> dict[str, int]:
        """The launch's keyword arguments."""
        return {
            "BT": self.tokens,
            "BE": _padded(E),
            "BH": min(self.columns, max(16, triton.next_power_of_2(H))),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _padded(E: int) -> int:
    return max(16, triton.next_power_of_2(E))  # what tl.dot takes


def forward_blocks(T: int, E: int, dtype: torch.dtype) -> Tiling:
    """Few tokens: small blocks of tokens, so that no program waits for many; else blocks that reuse W.

    Several [tokens, E] are held in registers, and several [columns, E] in shared memory: many experts, fewer of both.
    """
    if dtype != torch.bfloat16:
        return Tiling(16, 32 if E <= 256 else 16, 4 if E <= 128 else 8, 2)
    widest, warps = max(32 if E <= 256 else 16, 4096 // _padded(E)), 4 if E <= 32 else 8
    if T <= MAX_SINGLE_TOKENS:
        return Tiling(1, 16384 // _padded(E), 8, 2)
    if T <= 256:
        return Tiling(16, min(256, widest), warps, 3)
    return Tiling(min(64, 8192 // _padded(E)), min(128, widest), warps, 4)


def backward_blocks(T: int, E: int, dtype: torch.dtype) -> Tiling:
    """Larger blocks of tokens than forward: there is one partial dW for each."""
    if dtype != torch.bfloat16:
        return Tiling(32, 32 if E <= 256 else 16, 4 if E <= 32 else 8, 2, splits=8)
    widest, warps = max(32 if E <= 128 else 16, 1024 // _padded(E)), 4 if E <= 32 else 8
    tokens = 16 if T <= 256 else min(128, 16384 // _padded(E))
    return Tiling(tokens, min(64, widest), warps, 3 if E <= 256 else 2, splits=4)


@lru_cache(1024)
def forward_constants(T: int, H: int, E: int, dtype: torch.dtype) -> dict[str, int]:
    """What is constant in the forward kernel for such tokens, but for K."""
    blocks = forward_blocks(T, E, dtype).options(H, E)
    return {"H": H, "E": E, "SUMS": sums_layout.size(E), **sums_layout.starts(E), **blocks}


@lru_cache(1024)
def backward_constants(T: int, H: int, E: int, dtype: torch.dtype) -> dict[str, int]:
    """The same of the backward kernel."""
    blocks = backward_blocks(T, E, dtype)
    options = blocks.options(H, E)
    span = triton.cdiv(H, blocks.splits * options["BH"]) * options["BH"]
    return {"H": H, "E": E, "SPAN": span, **options}


@dataclass(frozen=True)
class Decision:
    """How one call routes."""

    top_k: int
    temperature: float
    scale: float
    capacity_factor: float | None
    maturity_E: Tensor | None
    mask: Tensor | None  # uint8, one for each token
    over_ranks: bool = False


@dataclass(frozen=True)
class Result:
    """What the forward kernels write."""

    weights: Tensor  # [..., E]
    sums: Tensor  # [F], in the order of sums_layout
    z: Tensor | None  # [T, E], where a backward may follow
    rstd: Tensor | None  # [T]
    dropped: Tensor | None  # [T, E] uint8, where there is a capacity


def _forward(hidden: Tensor, weight: Tensor, decision: Decision, keep: bool) -> Result:
    (*lead, H), E = hidden.shape, weight.shape[0]
    T = hidden.numel() // H
    constants = forward_constants(T, H, E, hidden.dtype)
    programs = -(-T // constants["BT"])
    weights = hidden.new_empty((*lead, E), dtype=torch.float32)
    partial = weights.new_empty((programs, sums_layout.size(E)))
    z, rstd = (torch.empty_like(weights), weights.new_empty(T)) if keep else (None, None)
    is_limited = decision.capacity_factor is not None and decision.top_k < E
    priority = weights.new_empty(E, T) if is_limited else None
    launch(
        forward_kernel, (programs,), hidden, hidden, weight, decision.maturity_E, decision.mask, weights, partial, z,
        rstd, priority, T, hidden.stride(-2), decision.temperature, decision.scale, EPS, K=decision.top_k, **constants,
    )  # fmt: skip
    sums = partial[0] if programs == 1 else partial.sum(0)
    dropped = None if priority is None else _limit(priority, weights, sums, decision)
    return Result(weights, sums, z, rstd, dropped)


def _limit(priority: Tensor, weights: Tensor, sums: Tensor, decision: Decision) -> Tensor:
    """Which assignments [T, E] are beyond capacity; their weights, and the sums that change, are set right in place."""
    assert decision.capacity_factor is not None
    E, T = priority.shape
    dropped, counts = torch.empty_like(weights, dtype=torch.uint8), sums.new_empty(E)
    block, share = max(16, triton.next_power_of_2(T)), decision.capacity_factor / E
    at = sums_layout.starts(E)
    mass = sums[at["AT_MASS"] :]
    written = (decision.maturity_E, decision.mask, weights, dropped, counts, mass, T, decision.scale)
    options = {"E": E, "BT": block, "num_warps": min(32, max(4, block // 512))}
    if decision.over_ranks:
        of_digits = _counts_over_ranks(priority, share)
        ranks = {"SHARE": share, "N": num_ranks()}
        rank = dist.get_rank()
        launch(capacity_over_ranks_kernel, (E,), weights, priority, *of_digits, *written, rank, **ranks, **options)
    else:
        launch(capacity_kernel, (E,), weights, priority, *written, share * decision.top_k, **options)
    torch.sum(counts, dim=0, out=sums[at["AT_DROPPED"]])
    return dropped


def _counts_over_ranks(priority: Tensor, share: float) -> list[Tensor]:
    """The counts of each digit, as ranks.fits_over_ranks sums them over ranks; one launch a digit."""
    E, T = priority.shape
    sizes = [count_rows(low) * ((E << bits) + 1) for low, bits in ROUNDS]
    counts = priority.new_zeros(sum(sizes), dtype=torch.int32).split(sizes)
    for index, (low, bits) in enumerate(ROUNDS):
        first, second = (*counts[:index], None, None)[:2]
        by_rank = counts[index].view(count_rows(low), -1)
        here = by_rank[dist.get_rank() % len(by_rank)]
        constants = {"SHARE": share, "E": E, "LOW": low, "BITS": bits, "BT": COUNTED_TOKENS}
        launch(count_kernel, (E, -(-T // COUNTED_TOKENS)), priority, priority, first, second, here, T, **constants)
        sum_over_ranks(counts[index])
    return list(counts)


def _differentiable(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sums [F], those that carry a gradient: of the probabilities [E] and of the squared logsumexp []."""
    at = sums_layout.starts(sums_layout.num_experts_of(sums.numel()))
    return sums[at["AT_PROBS"] : at["AT_SQUARED_LSE"]], sums[at["AT_SQUARED_LSE"]]


class _RouteFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, decision):
        result = _forward(hidden, weight, decision, keep=True)
        kept = (result.z, result.rstd, result.dropped)
        ctx.save_for_backward(hidden, weight, decision.maturity_E, decision.mask, *kept)
        ctx.decision = (decision.top_k, decision.temperature, decision.scale)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(result.sums)
        return result.weights, result.sums, *_differentiable(result.sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights, _, dprobs, dlse):
        hidden, weight, maturity, mask, z, rstd, dropped = ctx.saved_tensors
        top_k, temperature, scale = ctx.decision
        wants_dh, wants_dw, _ = ctx.needs_input_grad
        if all(gradient is None for gradient in (dweights, dprobs, dlse)):
            return None, None, None
        H, E = weight.shape[1], weight.shape[0]
        T = hidden.numel() // H
        constants = backward_constants(T, H, E, hidden.dtype)
        programs = -(-T // constants["BT"])
        dh = torch.empty_like(hidden) if wants_dh else None
        fits = programs * E * H * 4 <= MAX_PARTIAL_BYTES
        partial = rstd.new_empty(programs, E, H) if wants_dw and fits else None
        scaled = rstd.new_empty(T, E) if wants_dw and not fits else None
        gradients = [None if g is None else g.contiguous() for g in (dweights, dprobs, dlse)]
        launch(
            backward_kernel, (programs, -(-H // constants["SPAN"])), hidden, hidden, weight, maturity, mask, z, rstd,
            dropped, *gradients, dh, partial, scaled, T, hidden.stride(-2), temperature, scale, K=top_k, **constants,
        )  # fmt: skip
        dw = None if partial is None else partial[0] if programs == 1 else partial.sum(0)
        if scaled is not None:
            dw = _exact_product(hidden.view(T, H).t(), scaled).t()
        return dh, None if dw is None else dw.to(weight.dtype), None


def serves(hidden: Tensor, weight_EH: Tensor, capacity_factor: float | None) -> bool:
    """Whether the kernels can take these: no float64, which is the references' business, and no shard of a DTensor."""
    is_small = capacity_factor is None or hidden.numel() <= MAX_CAPACITY_TOKENS * hidden.shape[-1]
    is_plain = type(hidden) in _PLAIN and type(weight_EH) in _PLAIN
    has_dtypes = hidden.dtype in DTYPES and weight_EH.dtype in DTYPES
    return is_small and is_plain and has_dtypes and weight_EH.shape[0] <= MAX_EXPERTS


def route_fused(
    hidden: Tensor,
    weight_EH: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    maturity_E: Tensor | None = None,
    mask_T: Tensor | None = None,
    capacity_factor: float | None = None,
    scale: float = 1.0,
    over_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`moelora.routing.decision.route` on ``norm_linear(hidden, weight_EH)``, and sums over the tokens of mask_T.

    Args:
        hidden: [..., H].
        mask_T: bool, one for each token, in any shape.

    Returns:
        weights [..., E] float32 times scale; the sums [F] float32 in the order of sums_layout, without gradient; of
        them, with gradient, that of the probabilities [E] and that of the squared logsumexp [].
    """
    hidden, weight = hidden.contiguous(), weight_EH.contiguous()
    mask = None if mask_T is None else mask_T.contiguous().view(torch.uint8)
    decision = Decision(top_k, temperature, scale, capacity_factor, maturity_E, mask, over_ranks)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _RouteFused.apply(hidden, weight, decision)
    result = _forward(hidden, weight, decision, keep=False)
    return result.weights, result.sums, *_differentiable(result.sums)


def weights_fused(
    weight_EH: Tensor, top_k: int, temperature: float, scale: float, maturity_E: Tensor | None
) -> Callable[[Tensor, Any], Tensor]:
    """What makes weights [..., E] of hidden states [..., H], as `route_fused`, without gradient, capacity and sums."""
    weight, decision = weight_EH.contiguous(), Decision(top_k, temperature, scale, None, maturity_E, None)
    return lambda hidden, _: _forward(hidden.contiguous(), weight, decision, keep=False).weights
