"""What a block's seven linears cost as the pool grows, every expert computed or each token's own alone."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

from moelora.ops import chooses_sparse

from .layer import block_shape, measure
from .options import add_options, make_parser, recorder_of, row_of

MODULE = "benchmarks.pool"
ARM_NAMES = ("frozen", "lora", "dense", "sparse")
EXAMPLES = (
    "--device cuda",
    "--device cuda --num-experts 256 --num-tokens 8192 --repeats 9",
    "--device cuda --num-experts 48 64 96 --num-tokens 128 256 512 1024 --arms dense sparse",
    "--device cpu --dtype float32 --hidden 64 --intermediate 160 --kv 32 --num-tokens 64 --num-experts 8 64",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512])
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[512, 2048, 8192])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size of the pool for every number of tokens."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    shape = block_shape(args.hidden, args.intermediate, args.kv)
    for tokens, experts in itertools.product(args.num_tokens, args.num_experts):
        form = "sparse" if chooses_sparse(tokens, experts, args.top_k, args.rank, args.device == "cuda") else "dense"
        print(f"T={tokens} E={experts} r={args.rank} top-{args.top_k}: {form} is chosen by itself", flush=True)
        row = dataclasses.replace(row_of(args, "pool", "block of seven linears", tokens), experts=experts)
        measure(shape, row, args.arms, args, recorder)


if __name__ == "__main__":
    main()
