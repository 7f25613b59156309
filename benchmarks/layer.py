"""One adapted linear, and the seven linears of a Llama block with their router, forward and backward."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .arms import Mixture, adapt, as_arm
from .options import add_options, make_parser, recorder_of, row_of
from .record import Recorder, Row
from .timing import kept_bytes, peak_bytes, take_turns

MODULE = "benchmarks.layer"
ARM_NAMES = (
    *("frozen", "lora", "lora-default", "lora-equal", "ours", "ours-default", "ours-fixed", "ours-e1", "loop"),
    *("loramoe", "hydralora"),
)
EXAMPLES = (
    "--device cuda",
    "--device cuda --shapes block --arms frozen lora ours ours-e1 --repeats 9",
    "--device cpu --dtype float32 --tokens 256 --hidden 576 --intermediate 1536 --kv 192",
)


class Block(GradientCheckpointingLayer):
    """The linears of a Llama block, each fed with noise of its own input's shape: nothing else costs time."""

    def __init__(self, hidden: int, intermediate: int, kv: int) -> None:
        super().__init__()
        shapes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
        shapes |= {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}
        for name, (width_in, width_out) in shapes.items():
            self.add_module(f"{name}_proj", nn.Linear(width_in, width_out, bias=False))

    def forward(self, hidden_states: Tensor, attended: Tensor, normed: Tensor, activated: Tensor) -> list[Tensor]:
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        o = self.o_proj(attended)
        gate, up = self.gate_proj(normed), self.up_proj(normed)
        return [q, k, v, o, gate, up, self.down_proj(activated)]


class OneLinear(GradientCheckpointingLayer):
    """A single adapted linear; named as one that every arm adapts as a mixture."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width_in, width_out, bias=False)

    def forward(self, hidden_states: Tensor) -> list[Tensor]:
        return [self.up_proj(hidden_states)]


class Stack(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])
        self.config = type("Config", (), {"hidden_size": hidden, "model_type": "custom", "to_dict": lambda self: {}})()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.layers[0](*inputs)


@dataclass(frozen=True)
class Shape:
    """A block to measure, and the widths of its inputs and outputs."""

    name: str
    make: Callable[[], nn.Module]
    widths: list[int]
    outs: list[int]

    def build(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The frozen model of one such block."""
        with torch.device(device):
            return Stack(self.make(), self.widths[0]).to(dtype)

    def tensors(self, tokens: int, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs that want gradients, and the gradients of the outputs."""
        kind = {"device": device, "dtype": dtype}
        inputs = [torch.randn(1, tokens, width, **kind, requires_grad=True) for width in self.widths]
        return inputs, [torch.randn(1, tokens, out, **kind) for out in self.outs]


def block_shape(hidden: int, intermediate: int, kv: int) -> Shape:
    """The seven linears."""
    widths = [hidden, hidden, hidden, intermediate]
    outs = [hidden, kv, kv, hidden, intermediate, intermediate, hidden]
    return Shape("block of seven linears", lambda: Block(hidden, intermediate, kv), widths, outs)


def linear_shape(width_in: int, width_out: int) -> Shape:
    """One linear."""
    return Shape(f"{width_in} -> {width_out}", lambda: OneLinear(width_in, width_out), [width_in], [width_out])


class Step:
    """Forward and backward of one arm, with gradients for the inputs as inside a model."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], upstream: list[Tensor]) -> None:
        self.model = model
        self.inputs = inputs
        self.upstream = upstream

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.inputs, *self.model.parameters()):
            tensor.grad = None

    def forward(self) -> list[Tensor]:
        """The outputs."""
        return self.model(*self.inputs)

    def __call__(self) -> None:
        self.clear()
        torch.autograd.backward(self.forward(), self.upstream)


def make_step(
    base: nn.Module, arm: str, mixture: Mixture, inputs: list[Tensor], upstream: list[Tensor]
) -> tuple[Step, Callable[[], None]]:
    """The step of one arm, and how to call it."""
    step = Step(adapt(base, "ours" if arm == "loop" else arm, mixture).train(), inputs, upstream)
    return step, as_arm(arm, step)


def measure(shape: Shape, row: Row, arms: Sequence[str], args: argparse.Namespace, recorder: Recorder) -> None:
    """Record memory and times of every arm for one shape; row and arms may differ from the options."""
    dtype, mixture = getattr(torch, row.dtype), Mixture(row.experts, row.rank, row.top_k)
    base = shape.build(args.device, dtype)
    inputs, upstream = shape.tensors(row.tokens, args.device, dtype)
    calls: dict[str, Callable[[], None]] = {}
    for arm in arms:
        step, calls[arm] = make_step(base, arm, mixture, inputs, upstream)
        if args.device == "cuda":
            calls[arm]()  # what is made once, such as cuBLAS workspaces, is not the step's
            step.clear()
            recorder.add(row, arm=arm, metric="peak_bytes", value=peak_bytes(calls[arm]))
            step.clear()
            recorder.add(row, arm=arm, metric="kept_bytes", value=kept_bytes(as_arm(arm, step.forward)))
    take_turns(calls, recorder, row, args.device, args.repeats, args.min_time)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--shapes", nargs="+", default=["block", "linears"], choices=["block", "linears"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the block and its four shapes of linears."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    hidden, wide, kv = args.hidden, args.intermediate, args.kv
    shapes = [block_shape(hidden, wide, kv)] if "block" in args.shapes else []
    if "linears" in args.shapes:
        shapes += [linear_shape(*widths) for widths in ((hidden, hidden), (hidden, wide), (wide, hidden), (hidden, kv))]
    for shape in shapes:
        measure(shape, row_of(args, "layer", shape.name, args.tokens), args.arms, args, recorder)


if __name__ == "__main__":
    main()
