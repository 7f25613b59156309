"""MoELoraModel: the PEFT tuner that injects experts and routers into a base model and manages them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import SHARED_FIELDS, MoELoraConfig, NotedNames, count_experts, storage_config
from ..forward.removal import remove_routing
from ..ops.native import is_native
from ..storage.patterns import check_patterns_end
from . import blocks
from ._peft import ExpertsLora, LoraLayer, TunerModel
from .controls import RoutingControls
from .layer import MoELoraLayer, make_routed
from .names import check_adapter_name
from .native import (
    NO_MERGE,
    check_layout,
    check_parameters,
    has_experts_beside,
    patterns_are_for_parameters,
    share_outer_factors,
)
from .native_names import reach_native_experts
from .peft_model import adopt_peft_model
from .placement import places
from .router import MoELoraRouter
from .saved_modules import check_saved_modules
from .undo import undone_if_refused
from .wiring import Wiring

_ROLL_OUT = (
    ". TRL's `use_vllm=True` merges before every roll-out: "
    "take `use_transformers_continuous_batching=True` in its place"
)


class MoELoraModel(RoutingControls, TunerModel):
    """Injects a mixture of LoRA experts into a model; made by [`peft.get_peft_model`].

    A PEFT adapter holds one expert when it is named ``expert_<i>`` or has `single_expert`, and `num_experts` otherwise,
    with the routers that score them. The active adapters form the mixture: their experts are pooled in the order of the
    adapters.

    Args:
        model: the base model; it is changed in place.
        config: the adapter's configuration.
        adapter_name: the adapter's name.

    Raises:
        ValueError: a target cannot be routed in the configured scope, or the adapter disagrees with the mixture.
    """

    tuner_layer_cls = (LoraLayer, MoELoraRouter)
    _frozen_by_disabling: frozenset[nn.Parameter] = frozenset()
    _is_disabled = False

    def __init__(
        self,
        model: nn.Module,
        config: MoELoraConfig | dict[str, MoELoraConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        first = config if isinstance(config, PeftConfig) else config[adapter_name]
        saved = _saved_adapters(first)
        if saved and isinstance(config, PeftConfig):
            raise ValueError(
                f"this checkpoint holds a mixture of {len(saved)} adapters; load it with PeftModel.from_pretrained, "
                "which restores them all"
            )
        if isinstance(config, PeftConfig) and "router" in (first.checkpoint or {}):
            raise ValueError(
                "this checkpoint was saved with an attached router, which only PeftModel.from_pretrained loads; "
                "without it the built-in routers would decide"
            )
        if saved:
            adapter_name = next(iter(saved))
            config = {adapter_name: saved[adapter_name]}
        with undone_if_refused(model):
            super().__init__(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
            for name in list(saved)[1:]:
                self.peft_config[name] = saved[name]
                self.inject_adapter(self.model, name, low_cpu_mem_usage=low_cpu_mem_usage)
        if saved:
            self.set_adapter(_active_order(first), inference_mode=first.inference_mode)
        if not isinstance(config, PeftConfig) and first.use_moe_routing:
            adopt_peft_model(self)

    # ---- building ----------------------------------------------------------------------------------------------------

    def check_adapter(self, adapter_name: str, config: MoELoraConfig) -> None:
        """Raise for a name that PEFT's tensors cannot be told apart by, and for patterns that never end."""
        check_adapter_name(adapter_name, self.model, [name for name in self.peft_config if name != adapter_name])
        check_patterns_end(config, (name for name, _ in self.model.named_modules()))

    def check_targets(self, adapter_name: str, config: MoELoraConfig, module_names: list[str]) -> None:
        """Raise for targets that cannot be routed and for an adapter that disagrees with the mixture it joins."""
        self._check_joins(adapter_name, config, bool(module_names))
        if not config.use_moe_routing:
            return
        blocks.check_forwards(self.model)
        blocks.check_targets(self.model, module_names)
        check_layout(self.model, adapter_name, config, module_names)
        check_saved_modules(self.model, adapter_name, config, module_names)
        places(self.model, module_names, config.router_scope, config.own_routers)
        check_parameters(self.model, adapter_name, config, module_names)

    def _check_joins(self, adapter_name: str, config: MoELoraConfig, is_routed: bool) -> None:
        """Raise for an adapter that cannot be beside those that there are; is_routed: our routers are to weigh it."""
        others = {name: other for name, other in self.peft_config.items() if other is not config}
        if not others:
            return
        first = next(iter(others.values()))
        if any(other.use_moe_routing != config.use_moe_routing for other in others.values()):
            raise ValueError(
                "an adapter with `use_moe_routing=False` is plain LoRA and cannot share a model with routed adapters; "
                "give all adapters the same `use_moe_routing`"
            )
        if not config.use_moe_routing:
            return
        adapts = is_routed or bool(config.target_parameters)
        if adapts and is_routed is (self.routing_or_none is None):
            raise ValueError(
                f"adapter {adapter_name!r} cannot join {', '.join(others)}: one has experts that a router weighs, "
                "the other adapts a base's native experts alone; give both the same `target_modules`"
            )
        if first.router_scope != config.router_scope:
            raise ValueError(
                f"`router_scope` ({config.router_scope!r}) differs from that of the model's other adapters "
                f"({first.router_scope!r}); use the same"
            )

    def stored(self, adapter_name: str, config: MoELoraConfig) -> MoELoraConfig:
        """The LoRA that stores the adapter's experts side by side along the rank."""
        return storage_config(config, count_experts(adapter_name, config)) if config.use_moe_routing else config

    @staticmethod
    def layer_class(target: nn.Module, config: MoELoraConfig) -> type[nn.Module] | None:
        """Native experts are adapted as a whole, from what enters them to what leaves them; by routed experts alone."""
        return ExpertsLora if config.use_moe_routing and is_native(target) else None

    @staticmethod
    def prepare_layer(layer: nn.Module, config: MoELoraConfig, adapter_name: str) -> nn.Module:
        """Turn the layer that PEFT chose into a routed one."""
        if config.use_moe_routing:
            make_routed(layer, adapter_name, config)
        return layer

    def inject_adapter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, **kwargs):
        """Create the adapter's experts and routers, or none of them; see PEFT for the arguments."""
        frozen = self._frozen_by_disabling
        with undone_if_refused(self.model):
            config = self._own_config(adapter_name)
            reach_native_experts(self.model, adapter_name, config, self.is_target)
            with _no_warning_of_patterns() if patterns_are_for_parameters(self.model, config) else nullcontext():
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)
            share_outer_factors(self.model, adapter_name, config)
            self._frozen_by_disabling = frozen  # PEFT activates what is active once more
            if any(isinstance(m, MoELoraLayer) and adapter_name in m.lora_A for m in self.model.modules()):
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    self._add_routers(adapter_name, config)
        if self._is_disabled:
            self._disable_new_layers()

    def _own_config(self, adapter_name: str) -> MoELoraConfig:
        """The very object that the caller passed, for PEFT's wrappers go on to write to it, unless another adapter is
        made from it already: that one keeps it, with the names that were noted there."""
        config = self.peft_config[adapter_name]
        if isinstance(config.own_routers, NotedNames):
            self.peft_config[adapter_name] = config = copy.copy(config)
            config.own_routers = None
        return config

    def _add_routers(self, adapter_name: str, config: MoELoraConfig) -> None:
        own = Wiring.of(self.model, self.peft_config).add(adapter_name, config)
        config.own_routers = NotedNames([] if config.router_scope == "module" else own)
        routers = self.routing.routers.values()
        is_trainable = adapter_name in self.active_adapters and not config.inference_mode
        with self.keep_trainability():
            for each in routers:
                each.set_adapter(self.active_adapters)
        for each in routers:
            if adapter_name in each.lora_router:
                each[adapter_name].requires_grad_(is_trainable)

    def _disable_new_layers(self) -> None:
        for module in self.model.modules():
            if isinstance(module, (*self.tuner_layer_cls, AuxiliaryTrainingWrapper)) and not module.disable_adapters:
                cast(Any, module).enable_adapters(False)

    # ---- the mixture -------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters the mixture, and trainable unless inference_mode.

        Raises:
            ValueError: an adapter does not exist, or the adapters disagree on a field that the mixture shares.
        """
        if self.routing_or_none is None:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            self._frozen_by_disabling = frozenset()
            return
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_agreement(names)
        self._frozen_by_disabling = frozenset()  # what is trainable is set anew
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                # Modules to save and trainable tokens can be one adapter's only: the mixture's first that has them.
                holders = [name for name in names if module.check_set_adapter([name]) is not None]
                module.set_adapter(holders[:1], inference_mode=inference_mode)
            elif isinstance(module, self.tuner_layer_cls):
                if module.merged:
                    module.unmerge()
                module.set_adapter(names, inference_mode=inference_mode)
        if names and self.routing.in_force.context is not None:  # a forward in progress, or one that was interrupted
            self.routing.in_force.context.look_up()
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else names

    def _check_agreement(self, names: list[str]) -> None:
        if missing := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"adapter {missing[0]!r} does not exist; there are {', '.join(self.peft_config)}")
        configs = [self.peft_config[name] for name in names]
        if len(names) < 2 or not configs[0].use_moe_routing:
            return
        for name, config in zip(names[1:], configs[1:], strict=True):
            for field in SHARED_FIELDS:
                ours, theirs = getattr(configs[0], field), getattr(config, field)
                if ours != theirs:
                    raise ValueError(
                        f"adapters {names[0]!r} and {name!r} cannot form one mixture: `{field}` is {ours!r} in one and "
                        f"{theirs!r} in the other; make them equal"
                    )

    def activate_adapter(self, adapter_name: str) -> None:
        """Let an adapter join the mixture, trainable unless its configuration is for inference; others stay as set."""
        if adapter_name in self.active_adapters:
            return
        with self.keep_trainability():
            self.set_adapter([*self.active_adapters, adapter_name])
        is_trainable = not self.peft_config[adapter_name].inference_mode
        for module in self.model.modules():
            # Of its modules to save, only those in use: another adapter's copy may be the active one.
            is_in_use = isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module.active_adapters
            if is_in_use or isinstance(module, self.tuner_layer_cls):
                cast(Any, module).set_requires_grad(adapter_name, is_trainable)

    @contextmanager
    def keep_trainability(self) -> Iterator[None]:
        """Undo changes that PEFT makes to `requires_grad` as a side effect."""
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        frozen = self._frozen_by_disabling
        yield
        self._frozen_by_disabling = frozen
        for parameter in self.model.parameters():
            parameter.requires_grad = before.get(parameter, parameter.requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; the others of the mixture stay active and as trainable as they were."""
        remaining = [name for name in self.active_adapters if name != adapter_name]
        is_merged = any(getattr(module, "merged", False) for module in self.model.modules())
        if self.routing_or_none is None or is_merged:  # PEFT refuses where the merged adapter is to go
            super().delete_adapter(adapter_name)
            return
        with self.keep_trainability():
            if remaining and adapter_name in self.peft_config:
                self.set_adapter(remaining[:1])  # PEFT's modules_to_save refuse several active adapters here
            super().delete_adapter(adapter_name)
            if remaining:
                self.set_adapter(remaining)

    def disable_adapter_layers(self) -> None:
        """Switch the mixture off: the output is the base model's."""
        trainable = {p for p in self.model.parameters() if p.requires_grad}
        super().disable_adapter_layers()
        self._frozen_by_disabling |= {p for p in trainable if not p.requires_grad}
        self._is_disabled = True

    def enable_adapter_layers(self) -> None:
        """Switch the mixture on again, as trainable as it was or as it has been made since."""
        if not self._is_disabled:
            super().enable_adapter_layers()
            return
        with self.keep_trainability():
            super().enable_adapter_layers()
        for parameter in self._frozen_by_disabling:
            parameter.requires_grad = True
        self._frozen_by_disabling, self._is_disabled = frozenset(), False

    def unload(self) -> nn.Module:
        """Return the base model without experts, routers and hooks."""
        base = super().unload()
        remove_routing(self.model)
        return base

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the experts under fixed weights into the base model and return it.

        Raises:
            ValueError: routing depends on the token, so no single weight equals the mixture.
        """
        base = super().merge_and_unload(*args, **kwargs)
        remove_routing(self.model)
        return base

    def check_merge(self) -> None:
        """Raise where merging would change outputs."""
        state = self.routing_or_none
        if state is None:
            return
        if has_experts_beside(self.model):
            raise ValueError(NO_MERGE)
        if state.attached is not None:
            raise ValueError(
                "cannot merge: the attached router decides per token; call `detach_router()` first" + _ROLL_OUT
            )
        if not state.config.router_kind.is_constant:
            raise ValueError(
                f"cannot merge: router_type={state.config.router_type!r} weighs experts differently for each token, "
                'so no single weight equals the mixture; only router_type="fixed" merges exactly' + _ROLL_OUT
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused for a mixture: PEFT would combine the experts of an adapter as if they were one LoRA."""
        if self.routing_or_none is not None:
            raise ValueError("`add_weighted_adapter` cannot combine routed adapters; activate them together instead")
        super().add_weighted_adapter(*args, **kwargs)

    # ---- saving ----

    @staticmethod
    def is_mixture_key(key: str) -> bool:
        """Whether a state dict key belongs to the attached router, which is saved once and not with each adapter."""
        return key.removeprefix("base_model.").startswith("router.")


@contextmanager
def _no_warning_of_patterns() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield


def _active_order(config: MoELoraConfig) -> list[str]:
    """The adapters that were active when a mixture was saved, in expert order."""
    active = [entry for entry in config.adapters or [] if entry["active"] is not None]
    return [entry["name"] for entry in sorted(active, key=lambda entry: entry["active"])]


def _saved_adapters(config: MoELoraConfig) -> dict[str, MoELoraConfig]:
    """The configurations of the adapters that a saved mixture lists; empty for a single adapter."""
    saved = {}
    for entry in config.adapters or []:
        saved[entry["name"]] = MoELoraConfig.from_peft_type(**entry["config"])
        saved[entry["name"]].inference_mode = config.inference_mode
        saved[entry["name"]].__dict__["read_from"] = config.read_from
    return saved
