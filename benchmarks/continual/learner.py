"""What every method gets, and what it has to give.

Stages are numbered from 0; a stage is a task that is learned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..arms import shared_copy
from ..peers import SCALING
from ..quality.batches import Batches, make_batches
from ..quality.data import IGNORED, Examples
from ..quality.methods import LINEARS, num_trainable
from ..quality.trainer import Group, Training
from .encoding import encode, length_for, widened
from .tasks import SPLITS, Question, Task


@dataclass(frozen=True)
class Plan:
    """What is alike for all methods.

    Args:
        steps: of a task, for each method.
        rows: of a batch.
        rank: of a LoRA on all seven linears of each block, whose parameters every method may train on one task.
    """

    steps: int
    rows: int
    rank: int
    device: str
    capture: bool = True


@dataclass(frozen=True)
class EncodedTask:
    """A task's rows as tokens, all splits [N, S] of one length S."""

    name: str
    length: int
    examples: dict[str, Examples]
    questions: dict[str, tuple[Question, ...]]
    is_generated: bool

    @classmethod
    def of(cls, task: Task, tokenizer: Any) -> EncodedTask:
        """S is chosen by the training rows."""
        length = length_for(task.rows["train"], tokenizer)
        examples = {split: encode(task.rows[split], tokenizer, length) for split in SPLITS}
        return cls(task.name, length, examples, task.rows, task.is_generated)


@dataclass
class Setting:
    """One run: frozen base model, tokenizer, tasks in order, plan, seed, learning rate."""

    base: nn.Module
    tokenizer: Any
    tasks: Sequence[EncodedTask]
    plan: Plan
    seed: int
    rate: float

    def lora(self, rank: int | None = None, **options: Any) -> Any:
        """A fresh LoRA of PEFT's around the base's own weights, of the plan's rank by default."""
        rank = rank or self.plan.rank
        config = LoraConfig(
            r=rank, lora_alpha=SCALING * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM", **options
        )
        with torch.device(self.plan.device):
            model = get_peft_model(shared_copy(self.base), config)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and self.plan.device == "cuda":
                module.cast_input_dtype_enabled = False  # to float32, which autocast would cast back at once
        return model

    def batches(self, stages: Sequence[int], steps: int | None = None, rows: int | None = None) -> Batches:
        """Training batches of one or several tasks in equal shares; the same for every method, given the seed."""
        return self._draw([self.tasks[stage].examples["train"] for stage in stages], stages[-1], steps, rows)

    def with_kept(self, new: Batches, stage: int, share: float, rows: int) -> Batches:
        """Batches to which so many rows of earlier tasks are added, drawn from the share of each that is kept."""
        kept = [self.tasks[earlier].examples["train"] for earlier in range(stage)]
        kept = [each.first(max(1, round(share * len(each)))) for each in kept]
        old = self._draw(kept, 50 + stage, len(new), rows)
        fills = {"ids": self.pad, "labels": IGNORED, "mask": False}

        def both(name: str) -> Tensor:
            pair = getattr(new, name), getattr(old, name)
            width = max(each.shape[-1] for each in pair)
            return torch.cat([_filled(each, width, fills[name]) for each in pair], dim=1)

        return Batches(both("ids"), both("labels"), both("mask"))

    def _draw(self, pieces: Sequence[Examples], salt: int, steps: int | None, rows: int | None) -> Batches:
        length, kept = (max(getattr(each, name).shape[1] for each in pieces) for name in ("ids", "labels"))
        pieces = [widened(each, length, kept, self.pad) for each in pieces]
        return make_batches(
            pieces, steps or self.plan.steps, rows or self.plan.rows, 1_000 * self.seed + salt, self.plan.device
        )

    @property
    def lora_size(self) -> int:
        """Parameters of the plan's LoRA."""
        return num_trainable(self.lora())

    @property
    def pad(self) -> int:
        """The id that fills rows up."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def train(
        self,
        model: nn.Module,
        batches: Batches,
        groups: Sequence[Group] | None = None,
        penalty: Callable[[], Tensor] | None = None,
        after_backward: Callable[[], None] | None = None,
    ) -> float:
        """Train what requires gradients on all batches, with a new optimizer; seconds of the steps."""
        plan = self.plan
        training = Training(model, batches, plan.device, groups, plan.capture, penalty, after_backward)
        return training.run(batches, self.rate).seconds


class Learner(ABC):
    """A method in the middle of a run.

    `model` is asked for answers as it is after `learn`; it has to take what a causal language model's forward and
    `generate` take.
    """

    is_joint = False  # learns all tasks at once, in the last stage
    model: Any

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def learn(self, stage: int) -> float:
        """Learn a task; the seconds it took, without building and capturing."""

    def for_task(self, stage: int) -> AbstractContextManager[object]:
        """Entered to answer questions of a task. Only a method that is told the task does something here."""
        return nullcontext()

    @property
    def trainable(self) -> int:
        """Parameters that the last task trained."""
        return num_trainable(self.model)

    @abstractmethod
    def stored(self) -> int:
        """Numbers that have to be kept after the last task, beside the base model: to answer, and to learn on.
        Texts that are kept are not counted here."""


def _filled(tensor: Tensor, width: int, value: int | bool) -> Tensor:
    """[..., width], filled up on the left."""
    return F.pad(tensor, (width - tensor.shape[-1], 0), value=value)


def numbers(tensors: Sequence[Tensor]) -> int:
    """How many numbers some tensors hold."""
    return sum(tensor.numel() for tensor in tensors)


def lora_factors(model: nn.Module, adapter: str = "default") -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A [r, in] and B [out, r] of every adapted linear of a PEFT LoRA, by the linear's name."""
    return {
        name: (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and adapter in module.lora_A
    }
