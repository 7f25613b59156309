"""Training steps of a whole model: forward, backward and AdamW, all seven linears of every block adapted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .arms import adapt, as_arm
from .models import add_model_options, build_base, case_name, parse_with_preset
from .options import add_options, make_parser, mixture_of, recorder_of, row_of
from .record import Recorder, Row
from .timing import attempt, peak_bytes, take_turns

MODULE = "benchmarks.model"
ARM_NAMES = (
    *("frozen", "lora", "lora-default", "lora-equal", "ours", "ours-default", "ours-e1"),
    *("loop", "mixlora", "loramoe", "hydralora", "dense", "sparse"),
)
EXAMPLES = (
    "--device cuda",
    "--device cuda --layers 8 --checkpointing off --arms frozen lora ours mixlora loramoe",
    "--device cuda --batch 1 --length 32768 --answer 1024 --checkpointing on --arms lora ours",
    "--device cuda --layers 8 --experts 256 --arms frozen lora dense sparse",
    "--preset quickstart --device cpu",
    "--preset tiny --device cpu --repeats 2",
)


class TrainingStep:
    """One optimizer step of one arm; `frozen` has nothing to optimise.

    Args:
        embeddings: [B, S, H], of all tokens.
        labels: [B, at most S], of the last tokens.
    """

    def __init__(self, model: nn.Module, embeddings: Tensor, labels: Tensor) -> None:
        self.model = model
        self.embeddings = embeddings
        self.labels = labels
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        is_fused = embeddings.is_cuda
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=is_fused) if self.trainable else None

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in (self.embeddings, *self.trainable):
            tensor.grad = None

    def __call__(self) -> None:
        self.clear()
        inputs = {"inputs_embeds": self.embeddings, "labels": self.labels, "logits_to_keep": self.labels.shape[1]}
        self.model(**inputs, use_cache=False).loss.backward()
        if self.optimizer:
            self.optimizer.step()

    def resident_bytes(self) -> int:
        """What lies in memory between steps: weights and optimizer state of this arm alone."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer:
            tensors += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def peak_bytes(self, call: Callable[[], None]) -> int:
        """Peak memory of a step, as if the other arms were not there."""
        call()  # optimizer states appear in the first step
        self.clear()
        return self.resident_bytes() + peak_bytes(call)


def checkpoint(model: nn.Module) -> None:
    """Switch the model's own gradient checkpointing on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_steps(base: nn.Module, args: argparse.Namespace) -> dict[str, tuple[TrainingStep, Callable[[], None]]]:
    """The step of every arm, around one set of base weights, and how to call it."""
    ids = torch.randint(base.config.vocab_size, (args.batch, args.length), device=args.device)
    embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
    steps = {}
    for arm in args.arms:
        print(f"adapting: {arm}", flush=True)
        model = adapt(base, "ours" if arm == "loop" else arm, mixture_of(args)).train()
        step = TrainingStep(model, embeddings, ids[:, -args.answer :])
        steps[arm] = (step, as_arm(arm, step))
    return steps


def measure(
    steps: dict[str, tuple[TrainingStep, Callable[[], None]]], row: Row, args: argparse.Namespace, recorder: Recorder
) -> None:
    """Record peak memory and times of the arms that fit into memory."""
    calls = {arm: call for arm, (_, call) in steps.items()}
    if args.device == "cuda":
        for arm, (step, call) in steps.items():
            peak = attempt(partial(step.peak_bytes, call), recorder, row, arm)
            step.clear()
            if peak is None:
                del calls[arm]
            else:
                recorder.add(row, arm=arm, metric="peak_bytes", value=peak)
            torch.cuda.empty_cache()  # an arm that fills the memory leaves the next one fragments
    take_turns(calls, recorder, row, args.device, args.repeats, args.min_time)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES, optional=["ours-e1", "loop", "dense", "sparse"])
    add_model_options(parser)
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the preset's)")
    parser.add_argument("--answer", type=int, default=0, help="only so many last tokens have labels (default: all)")
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    args = parse_with_preset(parser, argv, "training")
    if args.answer and not 2 <= args.answer <= args.length:
        parser.error(f"--answer {args.answer}: give 2 to {args.length}, the length; 0 for labels on all tokens")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with and without gradient checkpointing."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    torch.manual_seed(0)
    base = build_base(args)
    steps = make_steps(base, args)
    for setting in sorted(args.checkpointing):  # "off" first: models start without
        if setting == "on":
            for step, _ in steps.values():
                checkpoint(step.model)
        tokens = f"{args.batch} x {args.length}" + (f", labels on the last {args.answer}" if args.answer else "")
        case = case_name(args, base, tokens, f"gradient checkpointing {setting}")
        measure(steps, row_of(args, "model", case, args.batch * args.length), args, recorder)


if __name__ == "__main__":
    main()
