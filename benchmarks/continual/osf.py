"""OSF: PEFT's own orthogonal subspace fine-tuning, in sequence.

Nayak et al. 2025, arXiv:2504.07097. Each weight is split by its singular values, ``W = U_high S_high V_high + U_low
S_low V_low``. The high part is kept; the low part is trained, its gradients projected to be orthogonal to the high
part. Before the next task the weight, with what it learned, is split anew.

Letters: O out, I in of a linear, r singular directions that are trained.

The paper chooses by each layer's importance how many directions are trained, and PEFT trains half of them by default.
Here it is the r smallest of each linear, r being the plan's rank: r (O + I + 1) numbers, as many as a LoRA's and r
more. PEFT projects gradients and not AdamW's steps, so that the high part changes a little. Weights are copied, in
float32: in bfloat16 small changes would be lost where they are added.
"""

from __future__ import annotations

import re

import torch
from peft import OSFConfig, get_peft_model
from torch import nn

from ..arms import shared_copy
from ..quality.methods import LINEARS
from .learner import Learner, Setting, numbers


class Osf(Learner):
    """Dense weights that change from task to task."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        base = shared_copy(setting.base)
        self.linears = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in LINEARS]
        self._stored, preserved = 0, {}
        for name in self.linears:
            linear = base.get_submodule(name)
            linear.weight = nn.Parameter(linear.weight.detach().to(torch.float32, copy=True), requires_grad=False)
            self._stored += numbers([linear.weight])
            preserved[f"^{re.escape(name)}$"] = min(linear.weight.shape) - setting.plan.rank
        self.config = OSFConfig(target_modules=self.linears, rank_pattern=preserved, task_type="CAUSAL_LM")
        self.model = self._split(base)

    def _split(self, base: nn.Module) -> nn.Module:
        with torch.device(self.setting.plan.device):
            return get_peft_model(base, self.config)

    def learn(self, stage: int) -> float:
        """See Learner."""
        if stage:
            self.model = self._split(self.model.merge_and_unload())
        return self.setting.train(self.model, self.setting.batches([stage]))

    def stored(self) -> int:
        """See Learner: the changed weights, which no few factors give back."""
        return self._stored
