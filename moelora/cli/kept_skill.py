"""Whether what was learned before is still there once a mixture has grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from ..data.preparation import DomainBlocks
from ..recipe import DomainOptions
from ..training.evaluate import evaluate


@dataclass
class KeptSkill:
    """The loss on held-out texts of what was learned before, without the new experts and with them.

    Attributes:
        losses: by domain, `held_out_tokens`, `loss_before` and `loss_after` in nats per token, as far as measured.
    """

    domains: Sequence[DomainOptions]
    blocks: Sequence[DomainBlocks]
    collator: DataCollatorForSeq2Seq
    arguments: TrainingArguments
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measure(self, model: PeftModel, when: str) -> None:
        """Measure the model as it stands; when: "before" or "after"."""
        found = evaluate(model, self.blocks, self.collator, self.arguments.eval_batch_size, when.capitalize())
        for name, result in found.items():
            self.losses.setdefault(name, {"held_out_tokens": result.tokens})[f"loss_{when}"] = result.loss
