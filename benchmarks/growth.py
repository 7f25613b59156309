"""How the cost of a block's seven linears grows with the number of experts, their rank and the number of tokens."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

from .layer import block_shape, measure
from .options import add_options, make_parser, recorder_of, row_of
from .record import Row

MODULE = "benchmarks.growth"
ARM_NAMES = ("frozen", "lora", "lora-equal", "ours")
EXAMPLES = (
    "--device cuda",
    "--device cuda --num-experts 2 8 32 --ranks --num-tokens 1 64 8192",
    "--device cpu --dtype float32 --hidden 64 --intermediate 160 --kv 32 --tokens 64 --num-tokens 1 8 64",
)


def sweep(row: Row, args: argparse.Namespace) -> Iterator[Row]:
    """One row per point: each of E, r and T varies while the others stay."""
    axes = (("experts", args.num_experts), ("rank", args.ranks), ("tokens", args.num_tokens))
    for axis, values in axes:
        for value in values:
            yield dataclasses.replace(row, case=f"by {axis}", **{axis: value})


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES, optional=["lora-equal"])
    parser.add_argument("--tokens", type=int, default=8192, help="T while E or r varies")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--num-tokens", type=int, nargs="*", default=[1, 8, 64, 512, 2048, 8192, 32768])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sweep."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    shape = block_shape(args.hidden, args.intermediate, args.kv)
    for row in sweep(row_of(args, "growth", "", args.tokens), args):
        print(f"{row.case}: T={row.tokens} E={row.experts} r={row.rank}", flush=True)
        measure(shape, row, args.arms, args, recorder)


if __name__ == "__main__":
    main()
