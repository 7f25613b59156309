"""A mixture taken apart into single experts, and put together again from those that are wanted.

Shapes: E experts, r rank of one expert, D in, O out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..config import MoELoraConfig, count_experts
from ..storage.structure import FACTOR, adapts_parameter
from ..tuner.peft_model import MixturePeftModel
from .domains import refresh_domain_classifier

Tensors = dict[str, Tensor]

_ROWS = r"moe_router\.lora_router\.(weight|maturity|tokens_per_expert|selection_bias|fixed_weights)"
_ALONG = {re.compile(rf"(.*\.)?{_ROWS}"): 0, re.compile(r".*\.lora_A\.weight"): 0, re.compile(r".*\.lora_B\.weight"): 1}
FIXED, IS_SET = "fixed_weights", "is_set"


def expert_dimension(key: str) -> int | None:
    """Along which dimension an adapter's tensor holds its experts one after the other; None where they share it.

    Example:
        >>> expert_dimension("layers.0.q_proj.lora_B.weight"), expert_dimension("moe_router.lora_router.hidden_weight")
        (1, None)
    """
    return next((dimension for pattern, dimension in _ALONG.items() if pattern.fullmatch(key)), None)


@dataclass(frozen=True)
class AdapterParts:
    """One adapter of a mixture.

    Attributes:
        experts: each expert's own tensors by PEFT's names: factors of rank r, its row of every router, its counters.
        shared: what all of them use: a two-layer router's hidden layer, modules to save.
        is_active: whether it belongs to the mixture.
    """

    name: str
    config: MoELoraConfig
    experts: list[Tensors]
    shared: Tensors = field(default_factory=dict)
    is_active: bool = True

    @property
    def is_single(self) -> bool:
        """Whether an adapter of this name always holds one expert."""
        return count_experts(self.name, self.config) == 1

    def tensors(self) -> Tensors:
        """The adapter's tensors as PEFT saves them, experts side by side."""
        joined = {
            key: torch.cat([expert[key] for expert in self.experts], dim=cast(int, expert_dimension(key)))
            for key in self.experts[0]
        }
        return joined | self.shared


def take_apart(model: PeftModel) -> list[AdapterParts]:
    """The adapters of a mixture: the active ones in expert order, then the others. Tensors are the model's own.

    Raises:
        ValueError: an attached router decides, which knows the experts by their number.
    """
    if model.base_model.routing.attached is not None:
        raise ValueError(
            "the mixture has an attached router, whose weights are one per expert as they are now; call "
            "`detach_router()` to go on with the built-in routers. Of a folder: load it, detach and save it again, "
            "which removes its router.safetensors"
        )
    state_dict = model.state_dict()
    active = model.base_model.routing.active_adapters
    found = []
    for name in [*active, *(name for name in model.peft_config if name not in active)]:
        config = model.peft_config[name]
        tensors = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
        )
        experts: list[Tensors] = [{} for _ in range(count_experts(name, config))]
        shared = {}
        for key, tensor in tensors.items():
            dimension = None if _is_native(config, key) else expert_dimension(key)
            if dimension is None:
                shared[key] = tensor
                continue
            for expert, piece in zip(experts, tensor.chunk(len(experts), dim=dimension), strict=True):
                expert[key] = piece
        found.append(AdapterParts(name, config, experts, shared, name in active))
    return found


def _is_native(config: MoELoraConfig, key: str) -> bool:
    """Whether a tensor is a factor of the base's own experts, which its own router weighs."""
    match = FACTOR.fullmatch(key)
    return match is not None and adapts_parameter(config, match["module"])


def without_native_experts(adapter: AdapterParts) -> AdapterParts:
    """The adapter without pairs of native experts: those are in force beside it, in the adapter that it comes from."""
    config = deepcopy(adapter.config)
    shared = {key: tensor for key, tensor in adapter.shared.items() if not _is_native(config, key)}
    config.target_parameters = None
    return replace(adapter, config=config, shared=shared)


def put_together(model: PeftModel, adapters: Sequence[AdapterParts]) -> PeftModel:
    """A mixture of these adapters on the base of model, which loses its own and is of no use afterwards.

    Where adapters know their domains, the classifier between those that there are now is solved for anew.
    """
    base = model.unload()
    first, *others = adapters
    mixture = cast(MixturePeftModel, get_peft_model(base, deepcopy(first.config), adapter_name=first.name))
    for other in others:
        mixture._add_inactive_adapter(other.name, other.config)
    for adapter in adapters:
        set_peft_model_state_dict(mixture, adapter.tensors(), adapter_name=adapter.name)
    mixture.set_adapter([each.name for each in adapters if each.is_active], inference_mode=first.config.inference_mode)
    refresh_domain_classifier(cast(PeftModel, mixture))
    return cast(PeftModel, mixture).train(model.training)


# ---- which experts ---------------------------------------------------------------------------------------------------


def names_of(adapters: Sequence[AdapterParts]) -> list[str]:
    """[E] for each expert of the mixture, in order, the name of its adapter."""
    return [adapter.name for adapter in adapters if adapter.is_active for _ in adapter.experts]


def find_experts(wanted: Sequence[str | int], names: Sequence[str]) -> list[int]:
    """Numbers of experts asked for by number or by the name of their adapter (all of its experts), in that order.

    Args:
        names: the mixture's experts, from [`names_of`].

    Raises:
        ValueError: there is no such expert, or one is named twice.

    Example:
        >>> find_experts(["code", 0], ["default", "default", "code"])
        [2, 0]
    """
    found: list[int] = []
    for item in wanted:
        number = int(item) if str(item).isdecimal() else None
        own = [i for i, name in enumerate(names) if i == number or name == item]
        if not own:
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise ValueError(f"there is no expert {item!r}; give numbers or adapters of {known}")
        if repeated := [i for i in own if i in found]:
            raise ValueError(f"expert {repeated[0]} is named twice ({item!r}); name each once")
        found += own
    return found


def select(adapters: Sequence[AdapterParts], kept: Sequence[int]) -> list[AdapterParts]:
    """The mixture of only the experts numbered in kept: its routers' softmax runs over them as if no other had been.

    Fixed weights that somebody set grow in proportion, so that their sum stays.

    Raises:
        ValueError: nothing is kept, or the fixed weights of what is kept are all zero.
    """
    if not kept:
        raise ValueError("no expert is left; keep at least one")
    chosen, start = [], 0
    for adapter in adapters:
        if not adapter.is_active:
            chosen.append(adapter)
            continue
        numbered = enumerate(adapter.experts, start)
        chosen.append(replace(adapter, experts=[expert for number, expert in numbered if number in kept]))
        start += len(adapter.experts)
    before, after = _fixed_totals(adapters), _fixed_totals(chosen)
    if any(not after.get(key, 1.0) for key in before):
        raise ValueError(
            "the experts that are kept have fixed weights of zero; keep others, or set other weights first"
        )
    return settle([_scaled(adapter, {key: before[key] / after[key] for key in after}) for adapter in chosen])


def _fixed_totals(adapters: Sequence[AdapterParts]) -> dict[str, float]:
    """Sums of fixed weights that were set, over the active experts, by the name of the tensor."""
    totals: dict[str, float] = {}
    for adapter in adapters:
        for expert in adapter.experts if adapter.is_active else ():
            for key, tensor in expert.items():
                is_set = adapter.shared.get(key.replace(FIXED, IS_SET))
                if key.endswith(FIXED) and is_set is not None and bool(is_set):
                    totals[key] = totals.get(key, 0.0) + float(tensor)
    return totals


def _scaled(adapter: AdapterParts, factors: dict[str, float]) -> AdapterParts:
    if not adapter.is_active or not factors:
        return adapter
    experts = [
        expert | {key: expert[key] * factors[key] for key in expert if key in factors} for expert in adapter.experts
    ]
    return replace(adapter, experts=experts)


def with_explicit_weights(adapters: Sequence[AdapterParts]) -> list[AdapterParts]:
    """The same mixture, fixed weights that are uniform because nobody set them now set to that number."""
    counts: dict[str, int] = {}
    for adapter in adapters:
        for expert in adapter.experts if adapter.is_active else ():
            for key in (key for key in expert if key.endswith(FIXED)):
                counts[key] = counts.get(key, 0) + 1
    explicit = []
    for adapter in adapters:
        unset = [key for key in counts if not bool(adapter.shared.get(key.replace(FIXED, IS_SET), True))]
        shared = {key.replace(FIXED, IS_SET): torch.ones(1, dtype=torch.bool) for key in unset}
        experts = [e | {key: torch.full_like(e[key], 1.0 / counts[key]) for key in unset} for e in adapter.experts]
        explicit.append(
            replace(adapter, experts=experts, shared=adapter.shared | shared) if adapter.is_active else adapter
        )
    return explicit


def settle(adapters: Sequence[AdapterParts]) -> list[AdapterParts]:
    """Configurations and names that fit the experts that the adapters now hold.

    `top_k_experts` becomes at most the number of experts, as routing reads it anyway. An adapter that keeps fewer
    experts than a configuration may say (two, or `top_k_experts`) becomes single adapters `expert_<i>`; one without
    experts is left out.

    Raises:
        ValueError: an adapter adapts a base's native experts too, and would not go on under its name.
    """
    total = sum(len(adapter.experts) for adapter in adapters if adapter.is_active)
    taken = {adapter.name for adapter in adapters if adapter.experts}
    settled: list[AdapterParts] = []
    for adapter in adapters:
        if not adapter.is_active:
            settled.append(adapter)
            continue
        config = deepcopy(adapter.config)
        config.top_k_experts = min(config.top_k_experts, total)
        if config.target_parameters and len(adapter.experts) < max(2, config.top_k_experts):
            raise ValueError(
                f"adapter {adapter.name!r} adapts a base's native experts too (`target_parameters`), which needs "
                f"{max(2, config.top_k_experts)} experts of ours or more in it; {len(adapter.experts)} would be left: "
                "keep more"
            )
        if adapter.experts:
            if adapter.is_single or len(adapter.experts) >= max(2, config.top_k_experts):
                config.num_experts = config.num_experts if adapter.is_single else len(adapter.experts)
                settled.append(replace(adapter, config=config))
            else:
                settled += [
                    replace(adapter, name=free_name(taken), config=deepcopy(config), experts=[expert])
                    for expert in adapter.experts
                ]
    return settled


def free_name(taken: set[str]) -> str:
    """The first `expert_<i>` that is not taken; it is from now on."""
    name = next(name for i in range(len(taken) + 1) if (name := f"expert_{i}") not in taken)
    taken.add(name)
    return name
