"""Who learns the domains, one stage after another. All have as many trainable parameters in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moelora import MoELoraConfig
from moelora.experts import grow, learn_domain

from ..arms import shared_copy
from ..peers import SCALING
from ..quality.batches import Batches, make_batches
from ..quality.data import Suite
from ..quality.methods import LINEARS, num_trainable
from ..quality.trainer import Training, autocast

REPLAYED = 0.25  # of a batch's rows


@dataclass(frozen=True)
class Plan:
    """What is alike for all: domains in order, steps of a stage, rows of a batch, size of a stage's experts."""

    domains: tuple[str, ...]
    steps: int
    rows: int
    device: str
    experts: int = 4
    rank: int = 4
    top_k: int = 2
    capture: bool = True


class _Stages(Training):
    """A training that goes on from one stage to the next with a new optimizer."""

    def renew(self) -> None:
        self.initial = []
        self.reset()


@dataclass
class Setting:
    """One run: base model, data, plan, seed, learning rate."""

    base: nn.Module
    data: Suite
    plan: Plan
    seed: int
    rate: float

    def batches(self, domains: Sequence[str], steps: int, rows: int, stage: int) -> Batches:
        """Training batches, equal shares of the domains."""
        sources = [self.data[domain]["train"] for domain in domains]
        return make_batches(sources, steps, rows, 100 * self.seed + stage, self.plan.device)

    def mixture_config(self, **options: object) -> MoELoraConfig:
        """Of one stage's experts."""
        plan = self.plan
        return MoELoraConfig(
            r=plan.rank,
            lora_alpha=SCALING * plan.rank,
            num_experts=plan.experts,
            top_k_experts=plan.top_k,
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
            **options,
        )

    def lora(self) -> nn.Module:
        """A LoRA of as many parameters as the experts of all stages together, routers included."""
        one = num_trainable(_lora(self.base, 1))
        grown = num_trainable(get_peft_model(shared_copy(self.base), self.mixture_config()))
        return _lora(self.base, max(1, round(len(self.plan.domains) * grown / one)))


def _lora(base: nn.Module, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    return get_peft_model(shared_copy(base), config)


class Lora:
    """One LoRA, trained on a domain after the other.

    Args:
        replayed: share of a batch's rows that come from all earlier domains.
    """

    stages = True

    def __init__(self, setting: Setting, replayed: float = 0.0) -> None:
        self.setting, self.replayed = setting, replayed
        with torch.device(setting.plan.device):
            self.model = setting.lora()
        self.parameters = num_trainable(self.model)
        self.training: _Stages | None = None

    def learn(self, stage: int) -> float:
        """Train on a stage's domain; seconds."""
        batches = self.batches(stage)
        if self.training is None:
            plan = self.setting.plan
            self.training = _Stages(self.model, batches, plan.device, capture=plan.capture)
        self.training.renew()
        return self.training.run(batches, self.setting.rate).seconds

    def batches(self, stage: int) -> Batches:
        """Of a stage's domain, and of earlier ones."""
        plan, draw = self.setting.plan, self.setting.batches
        old = round(self.replayed * plan.rows) if stage else 0
        new = draw([plan.domains[stage]], plan.steps, plan.rows - old, stage)
        if not old:
            return new
        earlier = draw(plan.domains[:stage], plan.steps, old, 50 + stage)
        return Batches(torch.cat([new.ids, earlier.ids], 1), torch.cat([new.labels, earlier.labels], 1), None)

    def only(self, stage: int) -> bool:
        """Whether the model was reduced to what learned this stage's domain."""
        return False


class Joint(Lora):
    """One LoRA, trained on all domains at once, for as many steps as all stages together."""

    stages = False

    def batches(self, stage: int) -> Batches:
        """Of all domains."""
        plan = self.setting.plan
        return self.setting.batches(plan.domains, plan.steps * len(plan.domains), plan.rows, 0)


@dataclass
class Grown:
    """A mixture that grows by experts for every domain, as `moelora train --grow` does.

    Args:
        by_domain: whether adapters have domain statistics; without, their scores compete.
        scale: the mixture's routing_scale.
    """

    setting: Setting
    by_domain: bool = True
    scale: float = 4.0
    stages: bool = field(default=True, init=False)
    names: list[str] = field(default_factory=list, init=False)
    parameters: int = field(default=0, init=False)

    def learn(self, stage: int) -> float:
        """Add experts, train them alone, learn the domain, join them with the others; seconds of training."""
        plan = self.setting.plan
        if stage == 0:
            self.names = ["default"]
            with torch.device(plan.device):
                config = self.setting.mixture_config(routing_scale=self.scale)
                self.model = get_peft_model(shared_copy(self.setting.base), config)
        else:
            self.names.append(grow(self.model))
        name = self.names[-1]
        self.model.set_adapter([name])
        self.parameters += num_trainable(self.model)
        batches = self.setting.batches([plan.domains[stage]], plan.steps, plan.rows, stage)
        run = Training(self.model, batches, plan.device, capture=plan.capture).run(batches, self.setting.rate)
        if self.by_domain:
            with autocast(plan.device):
                learn_domain(self.model, name, ({"input_ids": batches.batch(step)[0]} for step in range(len(batches))))
        self.model.set_adapter(self.names)
        return run.seconds

    def only(self, stage: int) -> bool:
        """Reduce the mixture to the experts of this stage's domain, as if a text's domain were known."""
        self.model.set_adapter([self.names[stage]])
        return True


LEARNERS = {
    "lora": ("one LoRA, trained on one domain after the other", lambda setting: Lora(setting)),
    "replay": (
        f"the same with {REPLAYED:.0%} of every batch from earlier domains, whose texts have to be kept",
        lambda setting: Lora(setting, REPLAYED),
    ),
    "joint": ("one LoRA, trained on all domains at once", lambda setting: Joint(setting)),
    "grown": ("a mixture that grows by experts for every domain: moelora train --grow", lambda setting: Grown(setting)),
    "grown-ungated": (
        "the same without memories: the routers' scores of all adapters compete",
        lambda setting: Grown(setting, by_domain=False),
    ),
    "grown-unscaled": ("as grown, with routing_scale 1", lambda setting: Grown(setting, scale=1.0)),
}
MAIN = ("lora", "replay", "joint", "grown", "grown-ungated")
