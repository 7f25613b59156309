"""The Trainer's arguments: with one GPU for a process, and checked further than the arguments check themselves."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..console import console
from ..schema import Problem
from .engines import uses_fsdp
from .liger import liger_functions


def training_arguments(**fields: Any) -> TrainingArguments:
    """TrainingArguments with these fields; of several visible GPUs a process that was not launched takes the first.

    The Trainer would copy the model to all of them in threads (nn.DataParallel), which a mixture refuses.
    """
    arguments = TrainingArguments(**fields)
    if arguments.n_gpu > 1:
        console.print(f"Training on one of {arguments.n_gpu} GPUs; `accelerate launch -m moelora …` uses them all")
        arguments._n_gpu = 1
    if arguments.gradient_accumulation_steps > 1 and uses_fsdp(arguments):
        _reduce_each_batch(arguments)
    return arguments


def _reduce_each_batch(arguments: TrainingArguments) -> None:
    """Let FSDP reduce gradients in every micro-batch: otherwise FSDP2 computes other numbers at times.

    It is no fault of the mixture's: PEFT's LoRA has it too (`benchmarks.fsdp_accumulation`, docs/support.md).
    """
    config: Any = arguments.accelerator_config
    given = dict(config.gradient_accumulation_kwargs or {})
    if "sync_each_batch" not in given:
        config.gradient_accumulation_kwargs = given | {"sync_each_batch": True}
        console.print("FSDP: gradients are reduced in every micro-batch (accelerate's `sync_each_batch`)")


def check_parts(fields: Mapping[str, Any]) -> list[Problem]:
    """What the Trainer cannot make of valid arguments: it tries only once the model is loaded, so it is tried before.

    Args:
        fields: of `TrainingArguments`, which takes them.
    """
    arguments, problems = TrainingArguments(**fields), []
    for names, make in _PARTS.items():
        try:
            make(arguments)
        except Exception as error:  # parts of others', which may take a value for what it should be
            name = next((name for name in names if fields.get(name)), names[-1])
            value = fields.get(name, getattr(arguments, name))
            problems.append(Problem(f"training.{name}", value, str(error) or repr(error)))
    return problems


def _make_reports(arguments: TrainingArguments) -> None:
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        # Imports its package; nothing is sent before training. The `__del__` of some fails where that failed.
        type(callback.__name__, (callback,), {"__del__": lambda self: None})()


def _find_optimizer(arguments: TrainingArguments) -> None:
    wants_model = arguments.optim_target_modules or "lomo" in arguments.optim  # there is none yet
    with contextlib.suppress(ValueError) if wants_model else contextlib.nullcontext():
        Trainer.get_optimizer_cls_and_kwargs(arguments)


def _make_scheduler(arguments: TrainingArguments) -> None:
    steps = arguments.max_steps if arguments.max_steps > 0 else 1000
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


def _try_checkpointing(arguments: TrainingArguments) -> None:
    options = dict(arguments.gradient_checkpointing_kwargs or {})
    if arguments.gradient_checkpointing and options:
        # Releases of transformers keep options of their own to themselves; torch takes the rest.
        enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
        own = inspect.signature(enable or PreTrainedModel.gradient_checkpointing_enable).parameters
        passed_on = {name: value for name, value in options.items() if name not in own}
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), **{"use_reentrant": False} | passed_on)


def _find_liger(arguments: TrainingArguments) -> None:
    if arguments.use_liger_kernel:
        liger_functions(arguments.device)


_PARTS: dict[tuple[str, ...], Callable[[TrainingArguments], None]] = {
    ("report_to",): _make_reports,
    ("optim_args", "optim"): _find_optimizer,
    ("lr_scheduler_kwargs", "lr_scheduler_type"): _make_scheduler,
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"): _try_checkpointing,
    ("use_liger_kernel",): _find_liger,
}
"""What makes each part, by the fields that say how: of these an error is told of the first that is given."""
