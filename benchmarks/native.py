"""What LoRA costs on a block that is a mixture itself, of Qwen3-30B-A3B's shape: router and experts, no attention.

`--rank` is that of a native expert's pair (`native` and `native-lora`), and that of one of our `--experts` (`beside`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from .layer import Shape, measure
from .options import add_options, make_parser, recorder_of, row_of

MODULE = "benchmarks.native"
ARM_NAMES = (
    "frozen",
    "native-lora",
    "native-lora-default",
    "native",
    "native-default",
    "native-outer",
    "beside",
    "beside-default",
)
EXAMPLES = (
    "--device cuda",
    "--device cuda --tokens 1024 8192 --repeats 9",
    "--device cuda --tokens 4096 --arms frozen native-lora native beside",
    "--device cpu --quick",
)
QUICK = {
    "dtype": "float32", "hidden": 64, "intermediate": 32, "native_experts": 8, "native_top_k": 2, "tokens": [64],
    "rank": 4, "min_time": 0.01,
}  # fmt: skip


class NativeBlock(GradientCheckpointingLayer):
    """The native mixture of a block, with weights of a fresh model's size."""

    def __init__(self, hidden: int, intermediate: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=num_experts, num_experts_per_tok=top_k
        )
        config._experts_implementation = "grouped_mm"  # what a whole model has by itself
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.parameters():  # made empty
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden_states: Tensor) -> list[Tensor]:
        return [self.mlp(hidden_states)]


def native_shape(hidden: int, intermediate: int, num_experts: int, top_k: int) -> Shape:
    """A block of native experts."""
    name = f"{num_experts} native experts {hidden} -> {intermediate}, top-{top_k}"
    return Shape(name, lambda: NativeBlock(hidden, intermediate, num_experts, top_k), [hidden], [hidden])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768, help="of one native expert")
    parser.add_argument("--native-experts", type=int, default=128)
    parser.add_argument("--native-top-k", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a block that a CPU measures in seconds")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every arm for every number of tokens."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    shape = native_shape(args.hidden, args.intermediate, args.native_experts, args.native_top_k)
    for tokens in args.tokens:
        measure(shape, row_of(args, "native", shape.name, tokens), args.arms, args, recorder)


if __name__ == "__main__":
    main()
