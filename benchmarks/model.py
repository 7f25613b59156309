"""Training steps of a whole model: forward, backward and AdamW, all seven linears of every block adapted.

Every arm reads token ids under an attention mask that hides nothing, and passes gradients down to what the embeddings
give out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import with_unsloth, worker
from .arms import adapt, as_arm
from .kits import benches, measure
from .models import add_model_options, build_base, case_name, parse_with_preset, shape_of
from .options import add_options, make_parser, mixture_of, recorder_of, row_of
from .record import Recorder, Row
from .timing import peak_bytes, record_clock, seconds

MODULE = "benchmarks.model"
OPTIONAL_ARMS = (
    *("ours-fixed", "ours-fixed-default", "ours-e1", "loop", "frozen-liger", "lora-liger", "ours-liger", "unsloth"),
    *("dense", "sparse"),
)
ARM_NAMES = (
    *("frozen", "lora", "lora-default", "lora-equal", "ours", "ours-default"),
    *OPTIONAL_ARMS,
    *("mixlora", "loramoe", "hydralora"),
)
AS_A_USER_TRAINS = (
    "--autocast --repeats 9 --arms frozen lora-default ours-default ours-fixed-default unsloth "
    "frozen-liger lora-liger ours-liger --sizes 1x512 1x1024 2x1024 1x4096 2x4096 --recompute 2x4096"
)
EXAMPLES = (
    "--device cuda",
    "--device cuda --layers 8 --checkpointing off --arms frozen lora ours mixlora loramoe",
    "--device cuda --batch 1 --length 32768 --answer 1024 --checkpointing on --arms lora ours",
    "--device cuda --layers 8 --experts 256 --arms frozen lora dense sparse",
    f"--device cuda --layers 8 {AS_A_USER_TRAINS}",
    f"--device cuda --preset qwen-0.5b {AS_A_USER_TRAINS}",
    "--preset quickstart --device cpu",
    "--preset tiny-deep --device cpu --checkpointing off --repeats 9 --arms frozen lora-equal ours ours-fixed",
    "--preset tiny --device cpu --repeats 2",
)


class TrainingStep:
    """One optimizer step of one arm; `frozen` has nothing to optimise.

    Args:
        ids: [B, S], the tokens to learn.
        answer: only so many last tokens have labels; 0: all.
        is_autocast: whether the forward runs in bfloat16, whatever the adapters are in.
    """

    def __init__(self, model: nn.Module, ids: Tensor, answer: int = 0, is_autocast: bool = False) -> None:
        self.model = model
        self.answer = answer
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=ids.is_cuda) if self.trainable else None
        self.autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=is_autocast)
        self.read(ids)

    def read(self, ids: Tensor) -> None:
        """Learn these tokens from now on: [B, S]."""
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, -self.answer :]}
        if self.answer:  # not without need: libraries that never write the logits down take it for a wish to see them
            self.inputs["logits_to_keep"] = self.answer

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in self.trainable:
            tensor.grad = None

    def __call__(self) -> None:
        self.clear()
        with self.autocast:
            loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        if self.optimizer:
            self.optimizer.step()

    def resident(self) -> dict[int, Tensor]:
        """What lies in memory between steps, by id: weights and optimizer state of this arm alone."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer:
            tensors += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return {id(tensor): tensor for tensor in tensors}

    def peak_bytes(self, call: Callable[[], None], others: Iterable[TrainingStep] = ()) -> int:
        """Peak memory of a step, as if the other arms were not there."""
        call()  # optimizer states appear in the first step
        for step in (self, *others):
            step.clear()
        mine = self.resident()
        foreign = {key: t for step in others for key, t in step.resident().items() if key not in mine}
        present = torch.cuda.memory_allocated() - sum(map(bytes_here, foreign.values()))
        return present + peak_bytes(call)


def bytes_here(tensor: Tensor) -> int:
    """Of a tensor, or of this process's part of one that FSDP2 cut up."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def checkpoint(model: nn.Module) -> None:
    """Switch the model's own gradient checkpointing on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Bench:
    """The training steps of the arms of one process, which share one set of base weights (see worker.Bench)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.arms = args.arms
        self.is_unsloth = args.arms == ["unsloth"]  # alone in its process
        self.steps: dict[str, TrainingStep] = {}
        torch.manual_seed(0)
        models = self._models()
        ids = self._ids(*args.sizes[0])
        for arm, model in models.items():
            model.enable_input_require_grads()
            self.steps[arm] = TrainingStep(model, ids, args.answer, args.autocast)

    def _models(self) -> dict[str, nn.Module]:
        if self.is_unsloth:
            model = with_unsloth.adapted_model(self.args, max(length for _, length in self.args.sizes))
            with_unsloth.train(model, is_checkpointed=False)
            return {"unsloth": model}
        base, models = build_base(self.args), {}
        for arm in self.arms:
            print(f"adapting: {arm}", flush=True)
            models[arm] = adapt(base, "ours" if arm == "loop" else arm, mixture_of(self.args)).train()
        return models

    def _ids(self, batch: int, length: int) -> Tensor:
        return torch.randint(shape_of(self.args)["vocab_size"], (batch, length), device=self.args.device)

    def use(self, batch: int, length: int, is_checkpointed: bool) -> None:
        """Sizes of the batch from now on. Gradient checkpointing once switched on stays on."""
        ids = self._ids(batch, length)
        for step in self.steps.values():
            step.read(ids)
            if is_checkpointed and self.is_unsloth:
                with_unsloth.train(step.model, is_checkpointed)
            elif is_checkpointed:
                checkpoint(step.model)

    def call(self, arm: str) -> Callable[[], None]:
        """The step of an arm."""
        return as_arm(arm, self.steps[arm])

    def seconds(self, arm: str) -> float:
        """See worker.Bench."""
        return seconds(self.call(arm), self.args.device, self.args.min_time)

    def peak_bytes(self, arm: str) -> int:
        """See worker.Bench."""
        if self.args.device != "cuda":
            return 0
        others = [step for name, step in self.steps.items() if name != arm]
        try:
            return self.steps[arm].peak_bytes(self.call(arm), others)
        finally:
            self.steps[arm].clear()
            torch.cuda.empty_cache()  # an arm that fills the memory leaves the next one fragments


def size(text: str) -> tuple[int, int]:
    """Sequences and tokens of each, from a text such as 2x4096."""
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise argparse.ArgumentTypeError(f"{text!r}: give sequences and tokens of each, such as 2x4096")
    return int(batch), int(length)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: more labels than tokens.
    """
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, ARM_NAMES, optional=OPTIONAL_ARMS)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the preset's)")
    several = "several of BATCHxLENGTH, in place of --batch and --length"
    parser.add_argument("--sizes", type=size, nargs="+", metavar="BxS", help=several)
    parser.add_argument("--answer", type=int, default=0, help="only so many last tokens have labels (default: all)")
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    recomputed = "those of --sizes that are measured with gradient checkpointing (default: all)"
    parser.add_argument("--recompute", type=size, nargs="+", metavar="BxS", help=recomputed)
    as_the_trainer = "the forward under torch.autocast in bfloat16, as Trainer(bf16=True) has it"
    parser.add_argument("--autocast", action="store_true", help=as_the_trainer)
    args = parse_with_preset(parser, argv, "training")
    args.sizes = args.sizes or [(args.batch, args.length)]
    args.recompute = args.recompute or args.sizes
    shortest = min(length for _, length in args.sizes)
    if args.answer and not 2 <= args.answer <= shortest:
        parser.error(f"--answer {args.answer}: give 2 to {shortest}, the length; 0 for labels on all tokens")
    return args


def settings(args: argparse.Namespace) -> list[tuple[int, int, bool]]:
    """Batch, length and whether activations are recomputed: without first, because models start without."""
    plain = [(*size, False) for size in args.sizes if "off" in args.checkpointing]
    return plain + [(*size, True) for size in args.recompute if "on" in args.checkpointing]


def row_for(args: argparse.Namespace, batch: int, length: int, is_checkpointed: bool) -> Row:
    """What the rows of one setting have in common."""
    tokens = f"{batch} x {length}" + (f", labels on the last {args.answer}" if args.answer else "")
    details = [tokens, f"gradient checkpointing {'on' if is_checkpointed else 'off'}"]
    if args.autocast:
        details.append("autocast")
    return row_of(args, "model", case_name(args, *details), batch * length)


def record(group: Sequence[worker.Bench], args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure every setting."""
    for setting in settings(args):
        row = row_for(args, *setting)
        latest = measure(group, setting, recorder, row, args.repeats)
        own = [(bench, arm) for bench in group if isinstance(bench, Bench) for arm in bench.arms if arm in latest]
        if args.device == "cuda" and own:
            bench, arm = own[0]
            record_clock(bench.call(arm), latest[arm], recorder, row)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with and without gradient checkpointing."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    with benches(args, MODULE, argv, Bench) as group:
        record(group, args, recorder)


if __name__ == "__main__":
    main()
