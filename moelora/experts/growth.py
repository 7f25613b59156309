"""Add experts to a trained mixture, before training or in the middle of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..config import SHARED_FIELDS, MoELoraConfig, count_experts
from ..ops.data_parallel import num_ranks
from ..tuner.layer import MoELoraLayer
from .warm_start import NEAREST, NEW, Batch, copy_experts, nearest_adapter


def grow(
    model: PeftModel,
    num_experts: int | None = None,
    *,
    name: str | None = None,
    freeze_experts: bool = True,
    freeze_scores: bool = True,
    start_from: str = NEW,
    batches: Iterable[Batch] | None = None,
    optimizer: Any = None,
    **changes: Any,
) -> str:
    """Add an adapter of new experts (maturity 0: they act on every token) to the active mixture.

    The adapters that are there keep their tensors, and stop learning as asked. Until the new experts have learned
    something they contribute nothing, but take their share of the routing weight; where the adapters have statistics of
    their domains ([`moelora.experts.learn_domain`]), give the new one its own and it takes from theirs no more.

    Args:
        num_experts: of the new adapter, 1 or more; as many as the first adapter holds by default.
        name: of the new adapter; `grown_1`, `grown_2`, ... by default. `expert_<i>` holds one expert.
        freeze_experts: the experts that are there stop learning.
        freeze_scores: their routers stop learning, and their maturity and counters stand still.
        start_from: "new": the experts contribute nothing yet. The name of an adapter: they begin as copies of its
            experts ([`moelora.experts.copy_experts`] says how, where numbers or ranks differ). "nearest": as copies of
            the adapter that [`moelora.experts.nearest_adapter`] finds, new where it finds none.
        batches: for "nearest": texts of the new domain, as arguments of the model's forward.
        optimizer: the one that training has begun with, bare or from accelerate. New parameters join the groups of
            their counterparts, so learning rates and schedules stay; nothing of its state for others is reset.
        changes: further fields of `MoELoraConfig` in which the new adapter differs from the first of several experts
            (else the first), such as `r`.

    Returns:
        The new adapter's name.

    Raises:
        ValueError: the name is taken or holds fewer experts than asked for, a change would split the mixture, the
            optimizer trains no part of it, or the experts cannot start from what was named; nothing has changed then.
    """
    first = model.base_model.routing.config
    old = list(model.active_adapters)
    name = name or free_name(model.peft_config)
    if name in model.peft_config:
        raise ValueError(f"`name` ({name!r}) is taken; the adapters are {', '.join(model.peft_config)}")
    if split := [field for field in changes if field in SHARED_FIELDS and changes[field] != getattr(first, field)]:
        raise ValueError(
            f"`{split[0]}` ({changes[split[0]]!r}) is {getattr(first, split[0])!r} in the mixture and holds for all "
            "its adapters; leave it out"
        )
    if optimizer is not None:
        _check_optimizer(optimizer, model)
    source = _source(model, start_from, batches)
    if num_experts is None:
        num_experts = min(count_experts(each, first) for each in (old[0], name))
    config = _grown_config(template({each: model.peft_config[each] for each in old}), name, num_experts, changes)
    if config.target_parameters and "target_parameters" not in changes:
        _leave_native_experts(config, model, old[0])
    model.add_to_mixture(name, config)
    if source is not None:
        _copy_or_take_back(model, source, name)
    _freeze(model, old, freeze_experts, freeze_scores)
    if optimizer is not None:
        _tell(optimizer, model, name, old)
    return name


def _source(model: PeftModel, start_from: str, batches: Iterable[Batch] | None) -> str | None:
    """The adapter that new experts are copies of; None for new ones."""
    if start_from == NEAREST:
        if batches is None:
            raise ValueError("`start_from='nearest'` needs `batches`: a few texts of the new domain")
        start_from = nearest_adapter(model, batches).start_from
    if start_from == NEW:
        return None
    if start_from not in model.peft_config:
        known = ", ".join((NEW, NEAREST, *model.peft_config))
        raise ValueError(f"`start_from` ({start_from!r}) is not known; pass one of {known}")
    return start_from


def _copy_or_take_back(model: PeftModel, source: str, name: str) -> None:
    try:
        copy_experts(model, source, name)
    except ValueError:
        model.delete_adapter(name)
        raise


def template(configs: Mapping[str, MoELoraConfig]) -> MoELoraConfig:
    """Of the adapters of a mixture, the one whose settings new experts start from: the first that holds several, for
    what an imported LoRA is says little of them, nor does its alpha beside a `routing_scale`; else the first."""
    several = [config for name, config in configs.items() if count_experts(name, config) > 1]
    return next(iter([*several, *configs.values()]))


def _grown_config(like: MoELoraConfig, name: str, num_experts: int, changes: Mapping[str, Any]) -> MoELoraConfig:
    """An adapter's configuration for another of so many new experts."""
    config = deepcopy(like)
    config.inference_mode, config.adapters, config.router_memory, config.own_routers = False, None, 0, None
    # What the other adapter is, an imported LoRA, says nothing of the new one; and `num_experts` starts at 2.
    size = {"single_expert": True} if num_experts == 1 else {"single_expert": False, "num_experts": num_experts}
    for field, value in {**size, **changes}.items():
        setattr(config, field, value)
    config.__post_init__()
    if num_experts > 1 and not config.single_expert and count_experts(name, config) == 1:
        raise ValueError(
            f"`name` ({name!r}) holds one expert, and `num_experts` is {num_experts}; pass another name, or 1"
        )
    return config


def _leave_native_experts(config: MoELoraConfig, model: PeftModel, first: str) -> None:
    """Let new experts be on what the first adapter's are on: no router would keep pairs of native experts, which the
    base's own router weighs, away from what the old adapters know."""
    linears = [
        layer.link.name for layer in model.modules() if isinstance(layer, MoELoraLayer) and first in layer.lora_A
    ]
    config.target_parameters, config.target_modules, config.exclude_modules = None, set(linears), None
    config.share_native_outer = False
    config.layers_to_transform = config.layers_pattern = None
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        used = {key for key in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in linears)}
        setattr(config, field, {key: value for key, value in patterns.items() if key in used})


def free_name(taken: Collection[str]) -> str:
    """The first of `grown_1`, `grown_2`, ... that is not taken."""
    return next(name for i in count(1) if (name := f"grown_{i}") not in taken)


def _freeze(model: PeftModel, adapters: list[str], experts: bool, scores: bool) -> None:
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        if not any(adapter in parts for adapter in adapters) or "lora_" not in key:
            continue
        if scores if "lora_router" in parts else experts:
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer passes over it from here on


# ---- in the middle of training ---------------------------------------------------------------------------------------


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    while hasattr(optimizer, "optimizer"):  # accelerate wraps it
        optimizer = optimizer.optimizer
    return optimizer.param_groups


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if num_ranks() > 1:
        raise ValueError(
            "several processes train this model, wrapped as it was; grow it before training, not during it"
        )
    trained = {id(parameter) for group in _groups(optimizer) for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in model.parameters()):
        raise ValueError("`optimizer` trains no parameter of this model; pass the one that training began with")


def _tell(optimizer: Any, model: nn.Module, name: str, old: list[str]) -> None:
    """Put the new adapter's parameters into the groups of the old ones' parameters of the same kind."""
    groups = _groups(optimizer)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if name not in key.split(".") or "lora_" not in key or id(parameter) in group_of:
            continue
        counterparts = (parameters.get(key.replace(f".{name}.", f".{other}.")) for other in old)
        found = (group_of[id(other)] for other in counterparts if other is not None and id(other) in group_of)
        next(found, groups[0])["params"].append(parameter)


class GrowthCallback(TrainerCallback):
    """Grows the mixture of a Trainer's model after a step: ``GrowthCallback(trainer, step=500, num_experts=4)``.

    Give it to every run alike: one that resumes from a checkpoint before the step grows then, one that resumes from a
    later checkpoint finds the new experts and the optimizer's state for them restored.

    Args:
        trainer: a transformers Trainer, before `train` is called; the callback adds itself.
        step: the optimizer step after which to grow.
        name, options: see [`grow`].
    """

    def __init__(self, trainer: Any, step: int, name: str = "grown_1", **options: Any) -> None:
        if step < 1:
            raise ValueError(f"`step` ({step!r}) is not valid; pass 1 or more, or call `grow` before training")
        self.step, self.name, self.options = step, name, options
        self._create_optimizer = trainer.create_optimizer
        trainer.create_optimizer = self._restore  # the one moment between a checkpoint's weights and its optimizer
        trainer.add_callback(self)
        self._trainer = trainer

    def _restore(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model = self._trainer.model
        if self.name not in model.peft_config:
            return self._create_optimizer(*args, **kwargs)
        if self.name in model.active_adapters:
            raise ValueError(f"adapter {self.name!r} is part of the mixture already; give the callback another `name`")
        old = list(model.active_adapters)
        optimizer = self._create_optimizer(*args, **kwargs)
        model.base_model.activate_adapter(self.name)
        _freeze(model, old, self.options.get("freeze_experts", True), self.options.get("freeze_scores", True))
        _tell(optimizer, model, self.name, old)
        return optimizer

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """See TrainerCallback."""
        if state.global_step == self.step and self.name not in model.peft_config:
            grow(model, name=self.name, optimizer=optimizer, **self.options)
