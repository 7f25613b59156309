"""moelora: experts for every task, old ones frozen, and a classifier that tells whose task a prompt is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor

from moelora import MoELoraConfig
from moelora.experts import consolidate, grow, learn_domain

from ..arms import shared_copy
from ..peers import SCALING
from ..quality.batches import Batches
from ..quality.data import IGNORED
from ..quality.methods import LINEARS
from ..quality.trainer import autocast, now
from .learner import Learner, Setting, numbers

LAST = "last"
PROBED = 4  # batches on which the nearest old task is found


@dataclass(frozen=True)
class Recipe:
    """What is tried.

    Args:
        experts: of a task; they share the plan's rank.
        top_k: experts that a token uses.
        loudness: lora_alpha / r, times routing_scale / experts.
        scope: see `MoELoraConfig.router_scope`.
        window: see `MoELoraConfig.domain_window`.
        start: where a new task's experts begin, see `moelora.experts.grow`; "last": where the ones before ended.
        budget: share of all tasks' experts that the mixture may have; before a new task, old ones are merged to it.
    """

    experts: int = 1
    top_k: int = 1
    loudness: float = SCALING
    scope: str = "model"
    window: int | None = None
    start: str = "nearest"
    budget: float = 1.0

    def config(self, rank: int) -> MoELoraConfig:
        """Of one task's experts, which have this rank together."""
        each = max(1, rank // self.experts)
        return MoELoraConfig(
            r=each,
            lora_alpha=self.loudness * each,
            num_experts=max(2, self.experts),
            single_expert=self.experts == 1,
            top_k_experts=self.top_k,
            routing_scale=float(self.experts),
            router_scope=self.scope,
            domain_window=self.window,
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
        )


class Grown(Learner):
    """A mixture that grows by experts for each task, is never told the task, and keeps no text."""

    def __init__(self, setting: Setting, recipe: Recipe = Recipe()) -> None:
        super().__init__(setting)
        self.recipe = recipe
        self.names: list[str] = []  # of the adapter that answers for each task
        self.max_experts = int(recipe.budget * recipe.experts * len(setting.tasks))
        self._trainable = 0
        with torch.device(setting.plan.device):
            self.model = get_peft_model(shared_copy(setting.base), recipe.config(setting.plan.rank))

    def learn(self, stage: int) -> float:
        """See Learner; passes that find where to start, and tell the domain, are counted in the seconds."""
        device, batches = self.setting.plan.device, self.setting.batches([stage])
        started = now(device)
        self._make_room()
        name = self._grow(batches) if stage else "default"
        seconds = now(device) - started
        self.names.append(name)
        self.model.set_adapter([name])
        self._trainable = super().trainable
        seconds += self.setting.train(self.model, batches)
        started = now(device)
        with autocast(device):
            learn_domain(self.model, name, prompts(batches))
        self._activate_all()
        return seconds + now(device) - started

    def _activate_all(self) -> None:
        self.model.set_adapter(list(dict.fromkeys(self.names)))

    def _make_room(self) -> None:
        """Merge old experts until a task's new ones are within the budget."""
        room = self.max_experts - self.recipe.experts
        if len(self.names) * self.recipe.experts <= room:
            return
        result = consolidate(self.model, room)
        self.model = result.model
        for merge in result.merges:
            self.names = [merge.adapters[0] if name in merge.adapters else name for name in self.names]

    def _grow(self, batches: Batches) -> str:
        start = self.names[-1] if self.recipe.start == LAST else self.recipe.start
        with autocast(self.setting.plan.device):
            return grow(self.model, self.recipe.experts, start_from=start, batches=_questions(batches))

    @contextmanager
    def told(self, stage: int) -> Iterator[None]:
        """Within, only this task's experts are active: what the classifier costs can be told from it."""
        self.model.set_adapter([self.names[stage]])
        yield
        self._activate_all()

    @property
    def trainable(self) -> int:
        """See Learner."""
        return self._trainable

    def stored(self) -> int:
        """See Learner; the statistics of domains are counted."""
        return numbers([tensor for name, tensor in self.model.state_dict().items() if _is_ours(name)])


def _is_ours(name: str) -> bool:
    return "lora_" in name


def _questions(batches: Batches) -> list[Mapping[str, Tensor]]:
    """A few batches as one, with logits where there are labels [B, K] and nowhere else."""
    ids, labels = (each[:PROBED].flatten(0, 1) for each in (batches.ids, batches.labels))
    assert batches.mask is not None
    last = torch.arange(ids.shape[1] - labels.shape[1], ids.shape[1], device=ids.device)
    mask = batches.mask[:PROBED].flatten(0, 1)
    return [{"input_ids": ids, "labels": labels, "attention_mask": mask, "logits_to_keep": last}]


def prompts(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
    """Without the answers, which are not there when the task has to be told."""
    for step in range(len(batches)):
        ids, labels, mask = batches.batch(step)
        assert mask is not None
        yield {"input_ids": ids, "attention_mask": prompt_mask(mask, labels)}


def prompt_mask(mask: Tensor, labels: Tensor) -> Tensor:
    """bool [N, S]: the mask without answers, of which labels [N, K] tell, those of the last K tokens."""
    return mask & (F.pad(labels, (mask.shape[1] - labels.shape[1], 0), value=IGNORED) == IGNORED)
