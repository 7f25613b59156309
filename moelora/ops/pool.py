"""The factors of one adapter's experts, as every backend reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertPool:
    """One adapter: E experts of rank r stored side by side along the rank."""

    lora_A: Tensor  # [E * r, D]
    lora_B: Tensor  # [O, E * r]
    num_experts: int
    scaling: float
    dropout: nn.Module  # lora_dropout, on x

    def computed_in(self, dtype: torch.dtype) -> ExpertPool:
        """The same with factors of another dtype."""
        return replace(self, lora_A=self.lora_A.to(dtype), lora_B=self.lora_B.to(dtype))

    @property
    def rank(self) -> int:
        """r, the rank of one expert."""
        return self.lora_A.shape[0] // self.num_experts

    @property
    def drop_rate(self) -> float:
        """Probability of lora_dropout at work; 0 when it rests."""
        return drop_rate(self.dropout)


def drop_rate(dropout: nn.Module) -> float:
    """Probability of a lora_dropout at work; 0 when it rests."""
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
