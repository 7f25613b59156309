"""What MoELoraCallback costs: training steps with and without it, logs included."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from moelora import MoELoraCallback

from .arms import adapt
from .model import TrainingStep
from .models import add_model_options, build_base, case_name, parse_with_preset
from .options import add_options, make_parser, mixture_of, recorder_of, row_of
from .record import read
from .table import comparisons
from .timing import take_turns

MODULE = "benchmarks.monitor"
ARM_NAMES = ("unwatched", "watched")
EXAMPLES = ("--device cuda --layers 8", "--preset quickstart --device cpu", "--preset tiny --device cpu --repeats 2")


class Logged:
    """Some steps and the log that ends them, as the Trainer does both; it reads the loss in any case."""

    def __init__(self, step: TrainingStep, steps: int, watched: bool) -> None:
        self.step = step
        self.steps = steps
        callbacks = [DefaultFlowCallback, *([MoELoraCallback] if watched else [])]
        self.handler = CallbackHandler(callbacks, step.model, None, None, None)
        self.arguments = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True)
        self.state, self.control = TrainerState(), TrainerControl()

    def __call__(self) -> None:
        routing: Any = self.step.model.base_model.routing
        self.handler.on_train_begin(self.arguments, self.state, self.control)
        for _ in range(self.steps):
            self.step()
        logs = {"loss": float(routing.balancing_loss.detach())}
        self.handler.on_log(self.arguments, self.state, self.control, logs)
        self.handler.on_train_end(self.arguments, self.state, self.control)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the preset's)")
    parser.add_argument("--logging-steps", type=int, default=10, help="steps from log to log (default: 10)")
    args = parse_with_preset(parser, argv, "training")
    args.arms = list(ARM_NAMES)  # the presets' arms are those of another benchmark
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both, taking turns, and print their ratio."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    torch.manual_seed(0)
    base = build_base(args)
    ids = torch.randint(base.config.vocab_size, (args.batch, args.length), device=args.device)
    base.enable_input_require_grads()
    step = TrainingStep(adapt(base, "ours", mixture_of(args)).train(), ids)
    arms: dict[str, Callable[[], object]] = {
        "unwatched": Logged(step, args.logging_steps, watched=False),
        "watched": Logged(step, args.logging_steps, watched=True),
    }
    case = case_name(args, f"{args.batch} x {args.length}", f"a log every {args.logging_steps} steps")
    row = row_of(args, "monitor", case, args.batch * args.length)
    take_turns(arms, recorder, row, args.device, args.repeats, args.min_time, calls=args.logging_steps)
    ratio = comparisons(read([recorder.path])[1])[-1].ratio("watched", "unwatched")
    if ratio is not None:
        print(f"watched / unwatched: {ratio[0]:.4f} ± {ratio[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
