"""InfLoRA: each task's change is orthogonal to the inputs of old tasks.

Letters: D in, O out, r rank of a task's LoRA, m directions in the memory, s LoRA's scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quality.methods import LINEARS
from ..quality.trainer import now
from .learner import Setting, lora_factors
from .once import input_covariances, reader, some_rows
from .subspace import extended, leading, outside
from .summed import NEW, Summed

ROW_NORM = 3**-0.5  # of a row of A as PEFT draws it, which the authors keep


class InfLora(Summed):
    """``W x + s B A x`` of which only B is trained: the rows of A are the leading directions of the new task's inputs
    outside of the memory, which spans those of old tasks' inputs, so that ``B A x = 0`` for an x in it.

    Liang and Li 2024, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning" (arXiv:2404.00228). The
    memory is that of gradient projection (Saha et al. 2021, arXiv:2103.09762), a projector P: after a task, the leading
    left singular vectors of ``(1 - P) C`` join it, as few as leave less than 1 - epsilon of ``|C|_F^2`` outside. C, the
    sum of x x^T over the task's tokens, stands for the inputs as in the authors' code: by the energy of the inputs
    themselves, tr C, some tasks would fill the memory of a language model and leave later ones nothing to learn in.

    Linears that read the same input share a memory. Once it holds more than half of the D directions, the authors keep
    the others in its place (DualGPM): the same space, which only `stored` heeds here. Theirs adapts keys and values of
    a vision model, ours all seven linears; r is what makes B nearest to the plan's LoRA in trained numbers.

    Args:
        epsilon: share that is protected after the first task; it rises evenly towards 1. 0.995 is what the authors'
            scripts for SuperNI say (github.com/liangyanshuo/gainlora).
    """

    def __init__(self, setting: Setting, epsilon: float = 0.995) -> None:
        super().__init__(setting, _rank(setting))
        self.epsilon = epsilon
        self.memory: dict[str, Tensor] = {}  # [D, m], orthonormal columns, by `reader`

    def learn_new(self, stage: int) -> float:
        """See Summed. The passes over the task's rows before and after are counted in the seconds."""
        device = self.setting.plan.device
        rows = some_rows(self.setting, stage)
        started = now(device)
        self._design(input_covariances(self.model, rows, device))
        before = now(device) - started
        learning = self.setting.train(self.model, self.setting.batches([stage]))
        started = now(device)
        self._remember(input_covariances(self.model, rows, device), self._protected(stage))
        return before + learning + now(device) - started

    def _protected(self, stage: int) -> float:
        """epsilon after this task."""
        return self.epsilon + (1 - self.epsilon) * stage / len(self.setting.tasks)

    @torch.no_grad()
    def _design(self, covariances: dict[str, Tensor]) -> None:
        rank = self.model.peft_config[NEW].r
        found = leading(covariances, self.memory)
        for name, (A, _) in lora_factors(self.model, NEW).items():
            directions = found[reader(name)].directions[:, :rank]
            # Once more, as the memory may leave fewer than r: rows are then shorter, and none reaches into it.
            A.copy_(ROW_NORM * outside(directions, self.memory.get(reader(name))).T)
            A.requires_grad_(False)

    def _remember(self, covariances: dict[str, Tensor], epsilon: float) -> None:
        for name, found in leading(covariances, self.memory).items():
            self.memory[name] = extended(self.memory.get(name), found, epsilon)

    def stored(self) -> int:
        """See Learner; of a memory, its directions or those outside of it, whichever are fewer."""
        bases = sum(len(each) * min(each.shape[1], len(each) - each.shape[1]) for each in self.memory.values())
        return super().stored() + bases


def _rank(setting: Setting) -> int:
    """r with which B, O r numbers a linear, is nearest to a LoRA of the plan's rank."""
    linears = [
        module
        for name, module in setting.base.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS
    ]
    outs = sum(linear.out_features for linear in linears)
    ins = sum(linear.in_features for linear in linears)
    return round(setting.plan.rank * (ins + outs) / outs)
