"""O-LoRA: each task's LoRA in directions of its own.

Letters: t tasks learned before, r rank of a task's LoRA, D in, L linears of one D.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from .learner import Setting, lora_factors
from .summed import NEW, OLD, Summed


class OLora(Summed):
    """``loss + lambda_1 sum_linears sum_i |A_i A^T|``: the new A's rows become orthogonal to those of old tasks.

    Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning" (arXiv:2310.14152). The term
    is a sum of absolute entries, as the authors' trainer has it (github.com/cmnfriend/O-LoRA, src/uie_trainer_lora.py).
    Its further one, lambda_2 times the norms of the new factors, is left out: lambda_2 is 0 in the scripts that we saw.
    Theirs adapts queries and values, ours all seven linears.

    Args:
        lambda_1: 0.5 in those scripts.
    """

    def __init__(self, setting: Setting, lambda_1: float = 0.5) -> None:
        super().__init__(setting)
        self.lambda_1 = lambda_1

    def learn_new(self, stage: int) -> float:
        """See Summed."""
        penalty = self._penalty() if self.has_old else None
        return self.setting.train(self.model, self.setting.batches([stage]), penalty=penalty)

    def _penalty(self) -> Callable[[], Tensor]:
        """The term for the factors as they are when it is called. Linears of one D are one product: [L, t r, D] with
        [L, D, r]."""
        new = lora_factors(self.model, NEW)
        by_width = defaultdict(list)
        for name, (A_old, _) in lora_factors(self.model, OLD).items():
            by_width[A_old.shape[1]].append((A_old, new[name][0]))
        stacks = [(torch.stack([old for old, _ in pairs]), [A for _, A in pairs]) for pairs in by_width.values()]

        def penalty() -> Tensor:
            overlaps = [torch.bmm(old, torch.stack(A).mT).abs().sum() for old, A in stacks]
            return self.lambda_1 * torch.stack(overlaps).sum()

        return penalty
