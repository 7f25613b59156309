"""SLAO: one LoRA, begun orthogonally for each task and merged with what was.

Letters: i task from 1, r rank, D in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .learner import Setting, lora_factors, numbers
from .plain import Lora


class Slao(Lora):
    """Task i is learned from ``A = Q^T`` of ``A_{i-1}^T = Q R`` and ``B = B_{i-1}``, the factors that the task before
    ended training with; answers are given with its A and with ``M_i = M_{i-1} + (B_i - M_{i-1}) / sqrt(i)``.

    Qiao and Mahdavi 2025, "Merge before Forget: A Single LoRA Continual Learning via Continual Merging"
    (arXiv:2512.23017, ICLR 2026). We could read its abstract (an orthogonal basis of the last LoRA to begin with; A and
    B merged unlike each other; a scale by time) and its reviews (the newest A replaces the old one, B is averaged,
    lambda(i) = 1 / sqrt(i)), not its body, and found no code of the authors'. That B begins from the last trained one,
    not from the merged one, and that Q takes the signs of R's diagonal, is what re-implementations by others say of its
    Algorithm 1; without the signs, rows of A would turn against the columns of B. How long A's rows were is lost.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.learned = 0  # i
        self.tuned: dict[str, Tensor] = {}  # B_i [O, r]; the model holds M_i in its place

    def learn(self, stage: int) -> float:
        """See Learner."""
        merged = {name: B.detach().clone() for name, (_, B) in lora_factors(self.model).items()}
        if self.learned:
            self._begin()
        seconds = super().learn(stage)
        self.learned += 1
        self._merge(merged)
        return seconds

    @torch.no_grad()
    def _begin(self) -> None:
        for name, (A, B) in lora_factors(self.model).items():
            A.copy_(orthonormal_rows(A))
            B.copy_(self.tuned[name])

    @torch.no_grad()
    def _merge(self, merged: dict[str, Tensor]) -> None:
        for name, (_, B) in lora_factors(self.model).items():
            self.tuned[name] = B.clone()
            B.copy_(merged[name] + (B - merged[name]) / self.learned**0.5)

    def stored(self) -> int:
        """See Learner; B twice, merged to answer with, and as it was trained to learn on."""
        return super().stored() + numbers(list(self.tuned.values()))


def orthonormal_rows(A: Tensor) -> Tensor:
    """Q^T [r, D] of ``A^T = Q R`` with a diagonal of R that is not negative: rows keep their sides."""
    Q, R = torch.linalg.qr(A.T)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T
