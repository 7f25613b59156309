"""A plain LoRA for each adapter of a grown mixture: one task, for whoever knows only LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor

from ..storage.lora_file import LoraFile
from ..storage.mixture_files import StoredAdapter
from .exporting import joined, stored_adapters, to_lora, to_lora_mixture
from .remembered import energy, products, remembered_weights, weights_of


@dataclass(frozen=True)
class TaskLora:
    """What became of one adapter.

    Attributes:
        error: the share of its experts' deltas (squared) that the LoRA leaves out on the adapter's domain, by what
            domain statistics tell; 0 where it is exact, None where nothing tells.
    """

    lora: LoraFile
    error: float | None


def to_loras(model: PeftModel | Sequence[StoredAdapter]) -> dict[str, TaskLora]:
    """A plain LoRA for each active adapter, by its name: what the mixture does where that adapter alone is active.

    Of one expert it is exact. Of several it has them side by side (the rank is that of all together), each at its mean
    routing weight in the adapter's domain, which follows from the domain statistics; without these, all count alike.

    Raises:
        ValueError: an adapter trained biases or modules too.
    """
    active = [adapter for adapter in stored_adapters(model) if adapter.position is not None]
    return {adapter.name: _of_adapter(adapter) for adapter in active}


def _of_adapter(adapter: StoredAdapter) -> TaskLora:
    if adapter.num_experts == 1:
        return TaskLora(to_lora([adapter], adapter.name), 0.0)
    if adapter.config.router_kind.is_constant:
        return TaskLora(to_lora_mixture([adapter]), 0.0)
    if (weights := remembered_weights(adapter)) is None:
        share = adapter.config.routing_scale / adapter.num_experts
        return TaskLora(to_lora_mixture([adapter], [share] * adapter.num_experts), None)
    means = {name: weights_of(name, weights).mean(0) for name in adapter.pools}
    factors = {name: joined([(pool, means[name])]) for name, pool in adapter.pools.items()}
    lora = to_lora_mixture([adapter], [1.0] * adapter.num_experts)
    return TaskLora(LoraFile(f"adapter {adapter.name}", lora.config, factors), _left_out(adapter, weights))


def _left_out(adapter: StoredAdapter, weights: Mapping[str, Tensor]) -> float:
    """What constant weights leave out of all linears together."""
    left_out = whole = 0.0
    for name, pool in adapter.pools.items():
        weights_TE, products_EE = weights_of(name, weights), products(pool)
        left_out += energy(weights_TE - weights_TE.mean(0), products_EE)
        whole += energy(weights_TE, products_EE)
    return left_out / whole if whole else 0.0
