"""A new LoRA for each task, beside those of the tasks before: what O-LoRA and InfLoRA share.

Letters: t tasks learned before, r rank of a task's LoRA, D in, O out, s LoRA's scaling.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy

import torch
from torch import Tensor

from ..peers import SCALING
from .learner import Learner, Setting, lora_factors, numbers

NEW, OLD = "default", "old"


class Summed(Learner):
    """``y = W x + s (B_1 A_1 + ... + B_t A_t) x + s B A x``: only the last LoRA is trained.

    The old ones are one PEFT LoRA of rank t r, ``[B_1 ... B_t] [A_1; ...; A_t]``, which the new one joins when it is
    learned: a step costs two LoRAs and a token at decoding one, however many tasks there are. The base's weights, which
    the papers add them to, stay as they are: in bfloat16 they would lose what a small change says.
    """

    def __init__(self, setting: Setting, rank: int | None = None) -> None:
        super().__init__(setting)
        self.model = setting.lora(rank)
        self._trainable = 0

    @abstractmethod
    def learn_new(self, stage: int) -> float:
        """Train the new LoRA, which is as PEFT makes one; seconds."""

    def learn(self, stage: int) -> float:
        """See Learner."""
        if self.has_old:
            self._begin()
        seconds = self.learn_new(stage)
        self._trainable = super().trainable
        self._join()
        return seconds

    @property
    def has_old(self) -> bool:
        """Whether a task was learned before."""
        return OLD in self.model.peft_config

    def _begin(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters(NEW, init_lora_weights=True)
        self.model.base_model.set_adapter([OLD, NEW])
        for factor in self._old():
            factor.requires_grad_(False)

    @torch.no_grad()
    def _join(self) -> None:
        """[t r, D] and [O, t r] of the old tasks and the new one, as the only adapter that is active."""
        old = lora_factors(self.model, OLD)
        joined = {}
        for name, (A, B) in lora_factors(self.model, NEW).items():
            before = old.get(name, (A[:0], B[:, :0]))
            joined[name] = torch.cat([before[0], A]), torch.cat([before[1], B], dim=1)
        if self.has_old:
            self.model.delete_adapter(OLD)
        config = deepcopy(self.model.peft_config[NEW])
        config.r = next(iter(joined.values()))[0].shape[0]
        config.lora_alpha = SCALING * config.r
        with torch.device(self.setting.plan.device):
            self.model.add_adapter(OLD, config)
        for name, pair in lora_factors(self.model, OLD).items():
            for factor, value in zip(pair, joined[name], strict=True):
                factor.copy_(value)
        self.model.set_adapter(OLD, inference_mode=True)

    def _old(self) -> list[Tensor]:
        return [factor for pair in lora_factors(self.model, OLD).values() for factor in pair]

    @property
    def trainable(self) -> int:
        """See Learner."""
        return self._trainable

    def stored(self) -> int:
        """See Learner."""
        return numbers(self._old())
