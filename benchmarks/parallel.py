"""Training steps on several processes, under DDP or FSDP2: what the mixture adds to plain LoRA, and how both scale.

Started once with one process and once with all, it records the same steps: scaling efficiency is the quotient of the
two, and the mixture's cost that of the arms. Every process trains on its own batch of --batch x --length tokens.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .arms import adapt
from .model import TrainingStep, checkpoint
from .models import add_model_options, build_base, parse_with_preset
from .options import add_options, make_parser, mixture_of, recorder_of, row_of
from .timing import seconds

MODULE = "benchmarks.parallel"
ENGINES = ("ddp", "fsdp2")
STEPS = 4  # in one measurement
EXAMPLES = ("--engine ddp", "--engine fsdp2 --checkpointing", "--engine fsdp2 --preset tiny --device cpu --repeats 2")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    parser.epilog = (parser.epilog or "").replace("python -m", "torchrun --nproc-per-node 2 -m")
    add_options(parser, ("lora", "lora-equal", "ours", "ours-dropless"), optional=["ours-dropless"])
    add_model_options(parser)
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--batch", type=int, help="sequences of one process (default: the preset's)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the preset's)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    args = parse_with_preset(parser, argv, "training")
    args.arms = [arm for arm in args.arms if arm != "frozen"]  # a preset's; it has nothing to reduce
    args.checkpointing = args.checkpointing is True  # a preset's is a list of settings
    return args


def wrap(model: nn.Module, engine: str) -> nn.Module:
    """The model under an engine; for FSDP2 each block by itself, as accelerate wraps it."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    return fully_shard(model)


def make_step(arm: str, args: argparse.Namespace) -> TrainingStep:
    """The training step of one arm around base weights of its own, which an engine may cut up."""
    torch.manual_seed(0)  # the same weights on every process
    base = build_base(args)
    torch.manual_seed(1 + dist.get_rank())
    ids = torch.randint(base.config.vocab_size, (args.batch, args.length), device=args.device)
    base.enable_input_require_grads()
    torch.manual_seed(2)
    model = adapt(base, arm, mixture_of(args)).train()
    if args.checkpointing:
        checkpoint(model)
    return TrainingStep(wrap(model, args.engine), ids)


def main(argv: Sequence[str] | None = None) -> None:
    """Time the arms in turn; the first process records."""
    args = parse(argv)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    recorder = recorder_of(args, MODULE, argv) if dist.get_rank() == 0 else None
    tokens = args.batch * args.length
    steps = {arm: make_step(arm, args) for arm in args.arms}
    recomputed = ["gradient checkpointing"] if args.checkpointing else []
    case = [args.preset, f"{args.engine} x {dist.get_world_size()}", f"{args.batch} x {args.length} each", *recomputed]
    row = row_of(args, "parallel", ", ".join(case), tokens)
    for arm, step in steps.items():
        if args.device == "cuda":
            peak = step.peak_bytes(step, [other for other in steps.values() if other is not step])
            if recorder:
                recorder.add(row, arm=arm, metric="peak_bytes", value=peak)
    for repeat in range(args.repeats):
        for arm, step in steps.items():
            dist.barrier()
            # min_time=0: one measured call after a warm-up, because every process must make the same number of steps.
            value = seconds(partial(repeated, step), args.device, min_time=0.0) / STEPS
            if recorder:
                recorder.add(row, arm=arm, repeat=repeat, value=value)
    dist.destroy_process_group()


def repeated(step: TrainingStep) -> None:
    """STEPS steps in a row."""
    for _ in range(STEPS):
        step()


if __name__ == "__main__":
    main()
