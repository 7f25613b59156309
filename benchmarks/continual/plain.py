"""LoRA of PEFT's: in sequence, with replay, all tasks jointly, and one for each task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..quality.batches import Batches
from .learner import Learner, Setting, lora_factors, numbers


class Lora(Learner):
    """One LoRA, trained on one task after the other.

    Args:
        replayed: share of an earlier task's rows that is kept; a like share of each batch is drawn from them.
        rank: the plan's by default.
    """

    def __init__(self, setting: Setting, replayed: float = 0.0, rank: int | None = None) -> None:
        super().__init__(setting)
        self.replayed = replayed
        self.model = setting.lora(rank)

    def learn(self, stage: int) -> float:
        """See Learner."""
        return self.setting.train(self.model, self.batches(stage))

    def batches(self, stage: int) -> Batches:
        """Of a task, and of what is kept of earlier ones."""
        old = max(1, round(self.replayed * self.setting.plan.rows)) if self.replayed and stage else 0
        new = self.setting.batches([stage], rows=self.setting.plan.rows - old)
        return self.setting.with_kept(new, stage, self.replayed, old) if old else new

    def stored(self) -> int:
        """See Learner."""
        return numbers([factor for pair in lora_factors(self.model).values() for factor in pair])


class Joint(Lora):
    """One LoRA, trained on all tasks at once, for as many steps as all stages together."""

    is_joint = True

    def batches(self, stage: int) -> Batches:
        """Of all tasks, mixed."""
        stages = range(stage + 1)
        return self.setting.batches(stages, self.setting.plan.steps * len(stages))


class PerTask(Learner):
    """A LoRA for each task, learned alone; the right one is chosen for each question."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model = setting.lora()

    def learn(self, stage: int) -> float:
        """See Learner."""
        if stage:
            with torch.device(self.setting.plan.device):
                self.model.add_adapter(str(stage), self.model.peft_config["default"])
        self.model.set_adapter(self._name(stage))
        return self.setting.train(self.model, self.setting.batches([stage]))

    @staticmethod
    def _name(stage: int) -> str:
        return str(stage) if stage else "default"

    @contextmanager
    def for_task(self, stage: int) -> Iterator[None]:
        """Under the task's own LoRA; what is not learned yet is answered by the base model."""
        if self._name(stage) not in self.model.peft_config:
            with self.model.disable_adapter():
                yield
            return
        before = self.model.active_adapter
        self.model.set_adapter(self._name(stage))
        yield
        self.model.set_adapter(before)

    def stored(self) -> int:
        """See Learner."""
        return numbers(
            [
                each
                for name in self.model.peft_config
                for pair in lora_factors(self.model, name).values()
                for each in pair
            ]
        )
