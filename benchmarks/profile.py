"""Where a step's time goes: the GPU kernels of each arm, and how long the host takes to issue them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .arms import Mixture
from .layer import block_shape, make_step
from .options import add_options, make_parser

MODULE = "benchmarks.profile"
ARM_NAMES = (
    *("frozen", "lora", "lora-default", "lora-equal", "ours", "ours-default", "ours-fixed", "ours-e1"),
    *("dense", "sparse"),
)
EXAMPLES = ("--arms frozen ours", "--arms ours --tokens 2048 --rows 40", "--arms lora dense sparse --experts 256")


def kernel_table(call: Callable[[], object], steps: int, rows: int) -> str:
    """Microseconds of one step: all kernels, how long the GPU waited between them, and those that take longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.time_range.elapsed_us())
    busy = sum(map(sum, totals.values()))
    span = max(k.time_range.end for k in kernels) - min(k.time_range.start for k in kernels)
    lines = [f"{busy / steps:9.1f} {len(kernels) // steps:5d}  all kernels; idle {(span - busy) / steps:.1f}"]
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:rows]:
        lines.append(f"{sum(times) / steps:9.1f} {len(times) // steps:5d}  {name[:110]}")
    return "\n".join(lines)


def issue_microseconds(call: Callable[[], object], steps: int) -> float:
    """Host time to issue one step, the GPU running behind."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    return (time.perf_counter() - start) / steps * 1e6


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES, optional=ARM_NAMES[2:4] + ARM_NAMES[5:])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=25, help="kernels to list (default: 25)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table per arm."""
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.profile needs a GPU: it reads GPU kernels")
    dtype = getattr(torch, args.dtype)
    shape = block_shape(args.hidden, args.intermediate, args.kv)
    base = shape.build("cuda", dtype)
    inputs, upstream = shape.tensors(args.tokens, "cuda", dtype)
    for arm in args.arms:
        _, call = make_step(base, arm, Mixture(args.experts, args.rank, args.top_k), inputs, upstream)
        for _ in range(3):
            call()
        print(f"\n{arm}: {issue_microseconds(call, 2):.0f} us to issue; us, launches, kernel of one step:")
        print(kernel_table(call, args.steps, args.rows), flush=True)


if __name__ == "__main__":
    main()
