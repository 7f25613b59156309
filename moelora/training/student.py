"""Train a student: towards a teacher's predictions, or on the data alone."""

from __future__ import annotations

from typing import Any

import datasets
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments


def kl_divergence(logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats (Hinton et al., arXiv:1503.02531, at temperature 1).

    Args:
        logits, teacher_logits: [B, S, V]; mask: [B, S], False where nothing is predicted.

    Example:
        >>> logits, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0986123, 0.0]]])  # 1/2, 1/2; 3/4, 1/4
        >>> round(float(kl_divergence(logits, teacher, torch.tensor([[True]]))), 4)
        0.1308
    """
    student, teacher = F.log_softmax(logits[mask].float(), dim=-1), F.log_softmax(teacher_logits[mask].float(), dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


class Distiller(Trainer):
    """A Trainer whose loss is the distance from a teacher's predictions in place of the data's labels.

    Args:
        teacher: on the device of the student; in evaluation mode.
    """

    def __init__(self, *args: Any, teacher: PeftModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See Trainer."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        predicts = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
        loss = kl_divergence(outputs.logits, teacher_logits, predicts)
        return (loss, outputs) if return_outputs else loss


def train_student(
    student: PeftModel,
    arguments: TrainingArguments,
    blocks: datasets.Dataset,
    collator: Any,
    teacher: PeftModel | None = None,
) -> None:
    """Train a student on blocks, towards a teacher where one is given."""
    common = {"model": student, "args": arguments, "train_dataset": blocks, "data_collator": collator}
    trainer = Trainer(**common) if teacher is None else Distiller(**common, teacher=teacher)
    trainer.train()
