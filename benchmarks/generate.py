"""`model.generate` as a user calls it: greedy, a token at a time, launched from the host.

Nothing is under autocast. The time of one call is divided by the tokens that it decodes, so it holds the reading of a
short prompt, which costs about as much as one of them. With a static cache, transformers compiles the model itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from . import with_unsloth
from .arms import adapt
from .kits import benches, kit_of, measure
from .models import add_model_options, build_base, case_name, parse_with_preset, shape_of
from .options import add_options, make_parser, mixture_of, recorder_of, row_of
from .timing import seconds

MODULE = "benchmarks.generate"
OPTIONAL_ARMS = ("lora", "lora-equal", "ours", "ours-fixed", "unsloth")
ARM_NAMES = ("frozen", "lora-default", "ours-default", "ours-fixed-default", *OPTIONAL_ARMS)
AS_IN_THE_DOCS = "--cache dynamic --repeats 9 --arms frozen lora-default ours-default ours-fixed-default unsloth"
EXAMPLES = (
    f"--device cuda --layers 8 {AS_IN_THE_DOCS}",
    "--device cuda --layers 8 --cache static --batches 1 --repeats 5 --arms frozen lora-default ours-default",
    "--preset tiny-deep --device cpu --repeats 9 --arms frozen lora-equal ours ours-fixed",
)


class Bench:
    """The models of the arms of one process, which share one set of base weights (see worker.Bench)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.arms = args.arms
        self.options = {"min_new_tokens": args.steps, "max_new_tokens": args.steps, "do_sample": False}
        torch.manual_seed(0)
        if self.arms == ["unsloth"]:
            model = with_unsloth.adapted_model(args, args.prompt + args.steps)
            with_unsloth.generate(model)
            self.models: dict[str, nn.Module] = {"unsloth": model}
        else:
            base = build_base(args)
            self.models = {arm: adapt(base, arm, mixture_of(args)).eval() for arm in self.arms}

    def use(self, batch: int, cache: str) -> None:
        """Decode so many sequences from now on, with this kind of cache."""
        if cache == "static":
            torch.compiler.reset()  # what was compiled for another batch would make this one's shapes dynamic
        ids = torch.randint(shape_of(self.args)["vocab_size"], (batch, self.args.prompt), device=self.args.device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        self.options["cache_implementation"] = cache

    def call(self, arm: str) -> Callable[[], torch.Tensor]:
        """What decodes `--steps` tokens of every sequence."""
        return partial(self.models[arm].generate, **self.inputs, **self.options)

    def seconds(self, arm: str) -> float:
        """See worker.Bench."""
        return seconds(self.call(arm), self.args.device, self.args.min_time)

    def peak_bytes(self, arm: str) -> int:
        """Not measured: a token allocates next to nothing."""
        return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES, optional=OPTIONAL_ARMS)
    add_model_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at a time (default: 1 8)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens before decoding (default: 16)")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in one call (default: 64)")
    parser.add_argument("--cache", nargs="+", default=["dynamic"], choices=["dynamic", "static"])
    return parse_with_preset(parser, argv)


def arms_for(arms: Sequence[str], cache: str) -> list[str]:
    """The arms that decode from such a cache."""
    return [arm for arm in arms if cache == "dynamic" or kit_of(arm) != "unsloth"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every batch size from every kind of cache."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    with benches(args, MODULE, argv, Bench) as group:
        for cache in args.cache:
            able = [bench for bench in group if arms_for(bench.arms, cache)]
            if left := [arm for bench in group if bench not in able for arm in bench.arms]:
                print(f"left out with a {cache} cache: {' '.join(left)}, which always decodes from its own", flush=True)
            for batch in args.batches:
                details = [f"batch {batch}", f"{args.steps} tokens after {args.prompt}", f"{cache} cache"]
                row = row_of(args, "generate", case_name(args, *details), batch)
                measure(able, (batch, cache), recorder, row, args.repeats, calls=args.steps)


if __name__ == "__main__":
    main()
