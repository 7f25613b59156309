"""Decoding: one token a sequence and step from a static cache; on a GPU by default as the replay of a CUDA graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import StaticCache

from .arms import adapt
from .models import add_model_options, build_base, case_name, parse_with_preset
from .options import add_options, make_parser, mixture_of, recorder_of, row_of
from .record import Recorder, Row
from .timing import Arms, attempt, take_turns

MODULE = "benchmarks.decode"
ARM_NAMES = ("frozen", "lora", "lora-equal", "ours", "ours-default", "ours-fixed")
EXAMPLES = (
    "--device cuda",
    "--device cuda --eager --batches 1 8 --arms frozen lora ours",
    "--preset tiny --device cpu",
)


class Prompt:
    """A cache that holds a prompt, shared by all arms: its content does not matter for speed.

    Args:
        base: the frozen model, which reads the prompt.
        length: tokens of the prompt.
        size: tokens that the cache has room for.
    """

    def __init__(self, base: nn.Module, batch: int, length: int, size: int) -> None:
        self.length = length
        self.cache = StaticCache(config=base.config, max_cache_len=size)
        ids = torch.randint(base.config.vocab_size, (batch, length), device=base.device)
        with torch.no_grad():
            logits = base(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.ids = logits.argmax(dim=-1)  # [batch, 1]: the token that the next step reads

    def rewind(self) -> None:
        """Forget what was decoded after the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def step(self, model: nn.Module) -> None:
        """Decode one token greedily. No mask: nothing is padded, and the cache knows where it ends."""
        logits = model(input_ids=self.ids, past_key_values=self.cache, use_cache=True).logits
        self.ids.copy_(logits.argmax(dim=-1))


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def make_call(model: nn.Module, prompt: Prompt, steps: int, is_graph: bool) -> Callable[[], None]:
    """A call that decodes `steps` tokens of every sequence after the prompt."""
    step: Callable[[], None] = torch.no_grad()(partial(prompt.step, model))
    if is_graph:
        prompt.rewind()
        step = torch.no_grad()(capture)(step)

    def decode() -> None:
        prompt.rewind()
        for _ in range(steps):
            step()

    return decode


def measure(
    models: dict[str, nn.Module], prompt: Prompt, row: Row, args: argparse.Namespace, recorder: Recorder
) -> None:
    """Record the seconds of one step of each arm; a step that has to be captured and cannot is left out."""
    arms: Arms = {}
    for arm, model in models.items():
        build = partial(make_call, model, prompt, args.steps, not args.eager)
        call = attempt(build, recorder, row, arm, RuntimeError)
        if call is not None:
            arms[arm] = call
    take_turns(arms, recorder, row, args.device, args.repeats, args.min_time, calls=args.steps)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: the cache is too short.
    """
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES)
    add_model_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", help="sequences at a time (default: the preset's)")
    parser.add_argument("--prompt", type=int, help="tokens before decoding (default: the preset's)")
    parser.add_argument("--cache", type=int, help="tokens that the cache has room for (default: the preset's)")
    parser.add_argument("--steps", type=int, help="tokens decoded in one call (default: the preset's)")
    launched = "launch every step from the host, as `generate` does, instead of replaying a CUDA graph (CPU: always)"
    parser.add_argument("--eager", action="store_true", help=launched)
    args = parse_with_preset(parser, argv, "decoding")
    args.eager |= args.device == "cpu"
    if args.prompt + max(args.steps, 3) > args.cache:
        parser.error(f"--cache ({args.cache}) has no room for --prompt ({args.prompt}) and --steps ({args.steps})")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every batch size."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    torch.manual_seed(0)
    base = build_base(args).eval()
    models = {arm: adapt(base, arm, mixture_of(args)).eval() for arm in args.arms}
    how = "eager" if args.eager else "CUDA graph"
    for batch in args.batches:
        prompt = Prompt(base, batch, args.prompt, args.cache)
        case = case_name(args, f"batch {batch}", f"{args.prompt} tokens before", how)
        measure(models, prompt, row_of(args, "decode", case, batch), args, recorder)


if __name__ == "__main__":
    main()
