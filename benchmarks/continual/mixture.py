"""moelora: experts for every task, old ones frozen, and a classifier that tells whose task a prompt is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoELoraConfig
from moelora.experts import grow, learn_domain

from ..arms import shared_copy
from ..peers import SCALING
from ..quality.batches import Batches
from ..quality.methods import LINEARS
from ..quality.trainer import autocast
from .learner import Learner, Setting, numbers


@dataclass(frozen=True)
class Recipe:
    """What is tried; the defaults are what `preset("continual")` says.

    Args:
        experts: of a task; they share the plan's rank.
        top_k: experts that a token uses.
        start: where a new task's experts begin, see `moelora.experts.grow`.
    """

    experts: int = 1
    top_k: int = 1


class Grown(Learner):
    """A mixture that grows by experts for each task, is never told the task, and keeps no text."""

    def __init__(self, setting: Setting, recipe: Recipe = Recipe()) -> None:
        super().__init__(setting)
        self.recipe = recipe
        self.names: list[str] = []
        self._trainable = 0
        rank = setting.plan.rank // recipe.experts
        config = MoELoraConfig(
            r=rank,
            lora_alpha=SCALING * rank,
            num_experts=max(2, recipe.experts),
            single_expert=recipe.experts == 1,
            top_k_experts=recipe.top_k,
            routing_scale=float(recipe.experts),
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
        )
        with torch.device(setting.plan.device):
            self.model = get_peft_model(shared_copy(setting.base), config)

    def learn(self, stage: int) -> float:
        """See Learner."""
        name = grow(self.model, num_experts=self.recipe.experts) if stage else "default"
        self.names.append(name)
        self.model.set_adapter([name])
        self._trainable = super().trainable
        batches = self.setting.batches([stage])
        seconds = self.setting.train(self.model, batches)
        with autocast(self.setting.plan.device):
            learn_domain(self.model, name, _prompts(batches))
        self.model.set_adapter(self.names)
        return seconds

    @contextmanager
    def told(self, stage: int) -> Iterator[None]:
        """Within, only this task's experts are active: what the classifier costs can be told from it."""
        self.model.set_adapter([self.names[stage]])
        yield
        self.model.set_adapter(self.names)

    @property
    def trainable(self) -> int:
        """See Learner."""
        return self._trainable

    def stored(self) -> int:
        """See Learner; the statistics of domains are counted."""
        return numbers([tensor for name, tensor in self.model.state_dict().items() if _is_ours(name)])


def _is_ours(name: str) -> bool:
    return "lora_" in name


def _prompts(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
    """Without the answers, which are not there when the task has to be told."""
    for step in range(len(batches)):
        ids, labels, mask = batches.batch(step)
        assert mask is not None
        answered = torch.zeros_like(mask)
        answered[:, -labels.shape[1] :] = labels >= 0
        yield {"input_ids": ids, "attention_mask": mask & ~answered}
