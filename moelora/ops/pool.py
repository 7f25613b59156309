"""The factors of one adapter's experts, as every backend reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertPool:
    """One adapter: E experts of rank r stored side by side along the rank."""

    lora_A: Tensor  # [E * r, D]
    lora_B: Tensor  # [O, E * r]
    num_experts: int
    scaling: float
    dropout: Callable[[Tensor], Tensor]  # lora_dropout, on x

    @property
    def rank(self) -> int:
        """r, the rank of one expert."""
        return self.lora_A.shape[0] // self.num_experts
