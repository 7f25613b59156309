"""vLLM's LoRA managers, taking mixtures too: what a folder is read into, and what a slot gets beside its factors."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import vllm.envs as envs
from torch import nn
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ...schema import UserError
from ..mixture import ServedMixture, read_served_mixture
from .contract import HEAD, SERVED_RANKS, least_rank
from .engine import EngineRouting
from .fit import check_base, check_targets, empty_base
from .refusal import is_mixture
from .wrapper import weighed

logger = init_logger("vllm.moelora")


class MixtureModelManager(LRUCacheLoRAModelManager):
    """Holds the LoRAs of one worker's model, and the routing of those that are mixtures."""

    punica_wrapper_mapping: dict[str, Any]

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
            raise ValueError("moelora weighs ranks on the model's own stream; unset VLLM_LORA_ENABLE_DUAL_STREAM")
        if vllm_config.lora_config.fully_sharded_loras and vllm_config.device_config.device_type == "cpu":
            raise ValueError("moelora's products on a CPU know whole LoRAs; do without --fully-sharded-loras")
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        layers = {name: (layer, self.packed_modules.get(name, [name])) for name, layer in self.modules.items()}
        wrapper = next(iter(self.punica_wrapper_mapping.values()))
        self.routing = EngineRouting(self.model, layers, wrapper, vllm_config)
        if isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config["moelora"] = self.routing.traced_as

    @cached_property
    def empty_base(self) -> nn.Module:
        """The base in transformers, without weights, to compare mixtures with."""
        return empty_base(self.routing.config.model_config)

    def _init_punica_wrapper(self, *args: Any, **kwargs: Any) -> None:
        super()._init_punica_wrapper(*args, **kwargs)
        same = {id(wrapper): weighed(wrapper) for wrapper in self.punica_wrapper_mapping.values()}
        self.punica_wrapper_mapping = {key: same[id(w)] for key, w in self.punica_wrapper_mapping.items()}

    def activate_adapter(self, lora_id: int) -> bool:
        """See vLLM."""
        is_new = super().activate_adapter(lora_id)
        if is_new:
            lora = self._registered_adapters[lora_id]
            has_head = any(name.rpartition(".")[2] == HEAD for name in lora.loras)
            slot, mixture = self.lora_index_to_id.index(lora_id), getattr(lora, "mixture", None)
            self.routing.set(slot, mixture, _rank(lora), has_head)
        return is_new

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.routing.clear(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)


class MixtureWorkerManager(LRUCacheWorkerLoRAManager):
    """Reads a LoRA's folder, or a mixture's."""

    takes_mixtures = True
    _manager_cls = MixtureModelManager
    _adapter_manager: Any

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        folder = get_adapter_absolute_path(lora_request.lora_path)
        if not is_mixture(folder):
            return super()._load_adapter(lora_request)
        try:
            served = read_served_mixture(folder)
            self._check(served)
        except (UserError, ValueError) as error:
            raise ValueError(f"moelora cannot serve {lora_request.lora_name!r}: {error}") from error
        return self._as_lora(lora_request.lora_int_id, served)

    def _check(self, served: ServedMixture) -> None:
        """Raise ValueError where the engine cannot serve a mixture, before anything of the engine changes."""
        manager, limit = self._adapter_manager, self.lora_config.max_lora_rank
        if served.rank > limit:
            enough = least_rank(served.rank)
            most = f"vLLM serves {SERVED_RANKS[-1]} at most: prune or merge"
            raise ValueError(
                f"{served.num_experts} experts of rank {served.expert_rank} are a LoRA of rank {served.rank}, and "
                f"--max-lora-rank is {limit}; " + (f"start vLLM with --max-lora-rank {enough}" if enough else most)
            )
        check_base(served, manager.empty_base, manager.routing.config.model_config.model)
        check_targets(served, manager, self._renamed)
        if (why := manager.routing.refusal(served)) is not None:
            raise ValueError(why)

    def _as_lora(self, lora_id: int, served: ServedMixture) -> LoRAModel:
        layers = {}
        for module, (A, B) in served.factors.items():
            name, dtype = self._renamed(module), self.lora_config.lora_dtype
            layers[name] = LoRALayerWeights(name, served.rank, served.rank, A.to(dtype), B.to(dtype), scaling=1.0)
        lora = LoRAModel(lora_id, served.rank, layers)
        routers = {name and self._renamed(name): router for name, router in served.routers.items()}
        columns = {name and self._renamed(name): columns for name, columns in served.columns.items()}
        # The factors have gone into the layers, which vLLM packs and drops.
        lora.mixture = ServedMixture(served.num_experts, served.expert_rank, served.scope, {}, routers, columns)
        logger.info(
            "moelora: %d experts of rank %d, router_scope=%s", served.num_experts, served.expert_rank, served.scope
        )
        return lora

    def _renamed(self, name: str) -> str:
        """vLLM's name of a module."""
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return name
        renamed = mapper.get_rename_mapper().map_name(f"{name}.weight")
        if renamed is None:
            raise ValueError(f"the model in vLLM has no `{name}`")
        return renamed.removesuffix(".weight")


def _rank(lora: LoRAModel) -> int:
    """The largest of its layers'; those of native experts, and packed ones, are lists."""
    factors = []
    for layer in lora.loras.values():
        factors += layer.lora_a if isinstance(layer.lora_a, list) else [layer.lora_a]
    return max((factor.shape[-2] for factor in factors if factor is not None), default=lora.rank)
