"""Elastic weight consolidation of a LoRA.

Letters: P parameters of the LoRA, B rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ..quality.batches import Batches
from ..quality.trainer import autocast, logits_kept, now
from .learner import Setting
from .once import some_rows
from .plain import Lora


class Ewc(Lora):
    """One LoRA in sequence, with ``lambda / 2 sum_p F_p (theta_p - theta*_p)^2`` in the loss: theta* is where the last
    task left the parameters, F the diagonal of the Fisher information, summed over all tasks so far.

    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks" (arXiv:1612.00796), in its online
    form of one anchor and one sum (Schwarz et al. 2018, arXiv:1805.06370, with gamma = 1). F is the empirical one (of
    the answers in the data, not of drawn ones), from gradients g of batches' mean losses: ``F = B mean_batches g^2``,
    which estimates the mean over rows where their gradients average out, as they do after learning. A and B are
    parameters like any others; EWC-LoRA (Zheng et al. 2026, arXiv:2602.17559), which weighs their product, is another
    method.

    Args:
        strength: lambda. With F as a mean over rows, 1 is what Bayes' rule says for as many old rows as new ones; what
            is used is far larger and goes with the scale of F: 400 (what others took over from Kirkpatrick et al.'s
            Atari games) to 1e7 (EWC-LoRA's configuration for ImageNet-A). 1e4 is an estimate of where the term's
            gradient reaches the loss's on a small language model, and not tuned.
    """

    def __init__(self, setting: Setting, strength: float = 1e4) -> None:
        super().__init__(setting)
        self.strength = strength
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.fisher = torch.zeros_like(self._values())  # [P]

    def _values(self) -> Tensor:
        """theta [P]."""
        return parameters_to_vector(self.parameters)

    def learn(self, stage: int) -> float:
        """See Learner. Finding F is counted in the seconds."""
        device = self.setting.plan.device
        anchor = self._values().detach()

        def penalty() -> Tensor:
            return self.strength / 2 * (self.fisher * (self._values() - anchor).square()).sum()

        seconds = self.setting.train(self.model, self.batches(stage), penalty=penalty if stage else None)
        started = now(device)
        self.fisher += fisher(self.model, self.parameters, some_rows(self.setting, stage), device)
        return seconds + now(device) - started

    def stored(self) -> int:
        """See Learner; the LoRA is theta*, so only F comes to it."""
        return super().stored() + self.fisher.numel()


def fisher(model: nn.Module, parameters: list[nn.Parameter], batches: Batches, device: str) -> Tensor:
    """F [P] of answers in batches, see Ewc."""
    model.eval()
    total = torch.zeros_like(parameters_to_vector(parameters))
    for step in range(len(batches)):
        ids, labels, mask = batches.batch(step)
        with autocast(device):
            output = model(
                input_ids=ids, labels=labels, attention_mask=mask, use_cache=False, **logits_kept(ids, labels)
            )
        total += parameters_to_vector(torch.autograd.grad(output.loss, parameters)).square()
    return total * batches.ids.shape[1] / len(batches)
