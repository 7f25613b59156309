"""What routing adds to the LoRA of a Llama block in serving: our kernels beside vLLM's own, replayed as CUDA graphs.

Needs a GPU. Where vLLM cannot be imported, our kernels are timed alone. Tokens are of one slot, of all slots in turn
and at random (decoding), or of all slots one after the other (prompts).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moelora.ops.slot_tables import SlotTables, route_slots_reference

from .correctness import CorrectnessError
from .decode import capture
from .options import add_output_options, make_parser, recorder_of, row_of
from .record import Recorder, Row, read
from .table import comparisons
from .timing import Arms, attempt, take_turns

MODULE = "benchmarks.serving_kernels"
EXAMPLES = (
    "",
    "--tokens 1 8 32 --cases mixed --repeats 7",
    "--experts 16 --rank 4 --top-k 4 --slots 4",
)
CASES = {
    "one": lambda T, S: torch.zeros(T, dtype=torch.int64),
    "mixed": lambda T, S: torch.arange(T)[torch.randperm(T)] % S,
    "runs": lambda T, S: torch.arange(T) * S // T,
}
ARMS_OF_OURS = ("route", "weight")
ARMS_WITH_VLLM = ("lora", "mixture")


@dataclass(frozen=True)
class Group:
    """Linears that vLLM runs as one: one input, several outputs."""

    width_in: int
    outs: list[int]


def groups_of(args: argparse.Namespace) -> list[Group]:
    """The seven linears of a Llama block."""
    hidden, kv, wide = args.hidden, args.kv, args.intermediate
    return [
        Group(hidden, [hidden, kv, kv]),
        Group(hidden, [hidden]),
        Group(hidden, [wide, wide]),
        Group(wide, [hidden]),
    ]


class Ours:
    """Tables full of random mixtures, and one batch of tokens."""

    def __init__(self, tables: SlotTables, slot_T: Tensor, dtype: torch.dtype, groups: Sequence[Group]) -> None:
        T = len(slot_T)
        self.tables, self.slot_T = tables, slot_T
        self.hidden, self.residual = torch.randn(2, T, tables.hidden_size).to(dtype)
        self.gate_TR = torch.empty(T, tables.max_rank)
        self.shrunk = [torch.zeros(len(group.outs), T, tables.max_rank) for group in groups]

    def route(self, block: int) -> None:
        """Routing of one block."""
        from moelora.ops.triton.slot_router import route_slots  # imports triton

        route_slots(self.hidden, self.tables, block, self.slot_T, self.gate_TR, self.residual)

    def weight(self, block: int) -> None:
        """The multiplications of one block."""
        for shrunk in self.shrunk:
            shrunk.mul_(self.gate_TR)

    def check(self, block: int = 0) -> None:
        """Raise a CorrectnessError unless the kernels' gate is the reference's."""
        self.route(block)
        expected = torch.empty_like(self.gate_TR)
        route_slots_reference(self.hidden, self.tables, block, self.slot_T, expected, self.residual)
        wrong = int(((self.gate_TR - expected).abs().amax(dim=1) > 1e-4).sum())
        if wrong > len(expected) // 1000:  # where two experts are nearly equal, either may be taken
            raise CorrectnessError(f"route_slots: the gates of {wrong} of {len(expected)} tokens differ")


def make_tables(args: argparse.Namespace) -> SlotTables:
    """Every slot of every block holds a mixture with one-layer routers."""
    L, E, H = args.blocks, args.experts, args.hidden
    tables = SlotTables.empty(L, args.slots, max(args.rows, E), H, E * args.rank, torch.get_default_device())
    for slot in range(args.slots):
        first = torch.randn(L, E, H) / H**0.5
        tables.set(slot, first_LNH=first, rank=args.rank, top_k=args.top_k, scale=1.5)
    return tables


class VllmKernels:
    """vLLM's shrink and expand, with random LoRAs in all slots of all blocks.

    Its functions are called, not the torch operators made of them: those are registered for vLLM's platform alone,
    which is the CPU in a copy built for it.

    Raises:
        Exception: whatever importing vLLM raises.
    """

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        ops = "vllm.lora.ops.triton_ops"
        if not importlib.import_module("vllm.triton_utils").HAS_TRITON:
            raise ImportError("vLLM found no use for Triton here")
        self.shrink = importlib.import_module(f"{ops}.lora_shrink_op")._lora_shrink
        self.expand = importlib.import_module(f"{ops}.lora_expand_op")._lora_expand
        self.meta = importlib.import_module(f"{ops}.lora_kernel_metadata").LoRAKernelMeta
        self.slots, self.rank, self.dtype, self.groups = args.slots, args.experts * args.rank, dtype, groups_of(args)
        self.blocks = [[self._factors(group) for group in self.groups] for _ in range(args.blocks)]

    def _factors(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        def random(*shape: int) -> Tensor:
            return torch.randn(self.slots, 1, *shape, dtype=self.dtype) / shape[-1] ** 0.5

        return [random(self.rank, group.width_in) for _ in group.outs], [random(out, self.rank) for out in group.outs]

    def batch(self, slot_T: Tensor) -> VllmBatch:
        """What it takes to run these tokens."""
        T, kind = len(slot_T), {"dtype": self.dtype}
        meta = self.meta.make(self.slots, T, slot_T.device)
        meta.prepare_tensors(slot_T)
        inputs = [torch.randn(T, group.width_in, **kind) for group in self.groups]
        outputs = [torch.zeros(T, sum(group.outs), **kind) for group in self.groups]
        return VllmBatch(self, meta.meta_args(T, False), inputs, outputs)


@dataclass(frozen=True)
class VllmBatch:
    """Tokens for vLLM's kernels."""

    kernels: VllmKernels
    meta: tuple[Any, ...]
    inputs: list[Tensor]
    outputs: list[Tensor]

    def lora(self, block: int, gate_TR: Tensor | None = None) -> None:
        """Add the LoRAs of one block to the outputs, their shrunk activations weighted by the gate."""
        for (a, b), x, y in zip(self.kernels.blocks[block], self.inputs, self.outputs, strict=True):
            shrunk = torch.empty(len(a), len(x), self.kernels.rank, dtype=torch.float32)
            self.kernels.shrink(x, a, shrunk, *self.meta, 1.0)
            if gate_TR is not None:
                shrunk.mul_(gate_TR)
            self.kernels.expand(shrunk, b, y, *self.meta, offset_start=0, add_inputs=True)

    def mixture(self, ours: Ours, block: int) -> None:
        """Route, then the same with weights."""
        ours.route(block)
        self.lora(block, ours.gate_TR)

    def check(self, ours: Ours, tokens: int = 16) -> None:
        """Raise a CorrectnessError unless the first tokens' output of the last linear is the mixture's."""
        ours.route(0)
        self.outputs[-1].zero_()
        self.lora(0, ours.gate_TR)
        ((a,), (b,)), slots = self.kernels.blocks[0][-1], ours.slot_T[:tokens]
        shrunk = torch.einsum("ti,tri->tr", self.inputs[-1][:tokens].float(), a[slots, 0].float())
        expected = torch.einsum("tr,tor->to", shrunk * ours.gate_TR[:tokens], b[slots, 0].float())
        error = (self.outputs[-1][:tokens].float() - expected).norm() / expected.norm()
        if not error < 3e-2:
            raise CorrectnessError(f"vLLM's kernels with our gate: {error:.1e} of the output differ")


def over_blocks(step: Callable[[int], None], blocks: int) -> Callable[[], None]:
    """A graph that runs the step of every block, each with weights of its own."""

    def run() -> None:
        for block in range(blocks):
            step(block)

    return capture(run)


def measure(
    tables: SlotTables, kernels: VllmKernels | None, row: Row, slot_T: Tensor, args: argparse.Namespace, out: Recorder
) -> None:
    """Check, then record the seconds that one block takes in every arm."""
    dtype = getattr(torch, row.dtype)
    ours = Ours(tables, slot_T, dtype, groups_of(args))
    ours.check()
    steps: dict[str, Callable[[int], None]] = {"route": ours.route, "weight": ours.weight}
    if kernels is not None:
        batch = kernels.batch(slot_T)
        batch.check(ours)
        steps |= {"lora": batch.lora, "mixture": partial(batch.mixture, ours)}
    arms: Arms = {arm: over_blocks(step, args.blocks) for arm, step in steps.items()}
    take_turns(arms, out, row, "cuda", args.repeats, args.min_time, calls=args.blocks)


def summary(rows: Sequence[Row]) -> list[str]:
    """One line a batch."""
    lines = []
    for comparison in comparisons(rows):
        setting = comparison.setting
        medians = {
            arm: statistics.median(times.values()) * 1e6
            for arm in (*ARMS_OF_OURS, *ARMS_WITH_VLLM)
            if (times := comparison.values(arm, "seconds"))
        }
        if not medians.keys() >= set(ARMS_OF_OURS):
            continue
        text = f"{setting.tokens} tokens, {setting.case}: a block's"
        if medians.keys() >= set(ARMS_WITH_VLLM):
            lora, added = medians["lora"], medians["mixture"] - medians["lora"]
            text += f" plain LoRA of rank {setting.experts * setting.rank} costs {lora:.1f} us,"
            text += f" routing and weighting add {added:.1f} us = {added / lora:.1%}; alone,"
        lines.append(f"{text} routing takes {medians['route']:.1f} us, weighting {medians['weight']:.1f} us")
    return lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_output_options(parser)
    parser.set_defaults(repeats=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 256, 2048, 8192])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8, help="that one graph runs through, each with its own weights")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of one expert (default: 8)")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="room for experts in a block of the tables (default: 64)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--min-time", type=float, default=0.02, help="seconds that one measurement lasts at least")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every number of tokens in every case."""
    args = parse(argv)
    if args.device != "cuda":
        raise SystemExit("these kernels are for a GPU, which torch does not see here")
    torch.set_default_device("cuda")
    recorder = recorder_of(args, MODULE, argv)
    make_row = partial(row_of, args, "serving_kernels")
    tables = make_tables(args)
    make_kernels = partial(VllmKernels, args, getattr(torch, args.dtype))
    kernels = attempt(make_kernels, recorder, make_row("vLLM", 0), "lora", errors=Exception)
    rows = [make_row(case, tokens) for tokens in args.tokens for case in args.cases if tokens > 1 or case == "one"]
    for row in rows:
        slot_T = CASES[row.case](row.tokens, args.slots).to(torch.int32)
        measure(tables, kernels, row, slot_T, args, recorder)
    measured = [row for row in read([recorder.path])[1] if row.benchmark == "serving_kernels"]
    print(*summary(measured), sep="\n")


if __name__ == "__main__":
    main()
