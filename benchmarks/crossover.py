"""Where sorting tokens by expert would overtake the concatenated form: one linear, routing given, forward and backward.

Grouped products are measured in their favour: tokens are already sorted, as if one sort served a whole block.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moelora.ops import ExpertPool, Reader, mixture_linear

from .grouped import grouped_linear, make_plan
from .options import add_options, make_parser, recorder_of, row_of
from .record import Row
from .timing import Arms, take_turns

MODULE = "benchmarks.crossover"
ARM_NAMES = ("frozen", "concat", "grouped")
EXAMPLES = (
    "--device cuda",
    "--device cuda --top-k 4",
    "--device cpu --dtype float32 --tokens 64 --widths 64 64 64 160",
)


def concat(base: nn.Linear, x: Tensor, lora_A: Tensor, lora_B: Tensor, weights_TE: Tensor, scaling: float) -> Tensor:
    """moelora's form: lora_A [E * r, D], lora_B [O, E * r]."""
    pool = ExpertPool(lora_A, lora_B, weights_TE.shape[-1], scaling, nn.Identity())
    return mixture_linear(x, Reader(base, [pool]), weights_TE)


def make_calls(width_in: int, width_out: int, row: Row, device: str) -> dict[str, Callable[[], None]]:
    """The steps of all arms on the same sizes, with gradients for inputs, factors and routing weights."""
    E, r, k, T = row.experts, row.rank, row.top_k, row.tokens
    kind = {"device": device, "dtype": getattr(torch, row.dtype)}
    base = nn.Linear(width_in, width_out, bias=False, **kind).requires_grad_(False)
    x, upstream = torch.randn(T, width_in, **kind), torch.randn(T, width_out, **kind)
    weights_TK, ids = torch.rand(T, E, device=device).softmax(dim=-1).topk(k)
    weights_TE = torch.zeros(T, E, device=device).scatter(1, ids, weights_TK)
    plan = make_plan(ids, E)
    factors = torch.randn(E * r, width_in, **kind) * width_in**-0.5, torch.randn(width_out, E * r, **kind) * 0.01
    blocks = torch.randn(E, r, width_in, **kind) * width_in**-0.5, torch.randn(E, width_out, r, **kind) * 0.01
    return {
        "frozen": _step(base, upstream, x),
        "concat": _step(lambda *leaves: concat(base, *leaves, scaling=2.0), upstream, x, *factors, weights_TE.to(x)),
        "grouped": _step(
            lambda *leaves: grouped_linear(base, *leaves, plan, scaling=2.0), upstream, x, *blocks, weights_TK.to(x)
        ),
    }


def _step(forward: Callable[..., Tensor], upstream: Tensor, *tensors: Tensor) -> Callable[[], None]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(*leaves).backward(upstream)

    return run


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[8, 16, 32, 64])
    widths = [4096, 4096, 4096, 14336]
    parser.add_argument("--widths", type=int, nargs="+", default=widths, help="in out in out ...")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every E for every pair of widths."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    for width_in, width_out in zip(args.widths[::2], args.widths[1::2], strict=True):
        for num_experts in args.num_experts:
            row = row_of(args, "crossover", f"{width_in} -> {width_out}", args.tokens)
            row = dataclasses.replace(row, experts=num_experts)
            calls = make_calls(width_in, width_out, row, args.device)
            arms: Arms = {arm: calls[arm] for arm in args.arms}
            take_turns(arms, recorder, row, args.device, args.repeats, args.min_time)


if __name__ == "__main__":
    main()
