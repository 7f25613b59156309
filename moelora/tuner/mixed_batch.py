"""One adapter for each sample of a batch, each a whole mixture: PEFT's `adapter_names`.

The adapters that are asked for act together for the length of a forward, so that one product serves all samples; what
a sample's own adapter does not hold has weight 0 there.
Shapes: B batch, H router input width, E experts of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import MoELoraConfig
from ..forward.interfaces import MixtureRouter
from ..ops.autocast import without_autocast
from ..routing import route
from ..routing.pooled import score
from ..routing.sums import RoutingTotals
from ._peft import BaseTunerLayer

BASE = "__base__"
"""The name of no adapter: a sample that is the base model's."""


def check_adapter_names(tuner: Any, adapter_names: Sequence[str], routing_weights: Tensor | None) -> None:
    """Refuse what would be decided twice, or not at all; PEFT checks the names themselves.

    Raises:
        ValueError: other weights are given too, or experts are merged.
    """
    if routing_weights is not None or tuner.routing.attached is not None:
        other = "`routing_weights`" if routing_weights is not None else "an attached router"
        raise ValueError(f"`adapter_names` lets each sample's own adapter route it, which {other} would, too: give one")
    if any(getattr(module, "merged", False) for module in tuner.model.modules()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


@contextmanager
def acting(tuner: Any, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within, exactly the adapters of these names act; what is active, trainable and counted is then as before."""
    layers: list[Any] = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
    active = tuner.active_adapters
    counted = [(router, router.totals, router.pending) for router in tuner.routing.routers.values()]
    for router, _, _ in counted:
        router.totals = RoutingTotals()
    _set_adapters(tuner, layers, [name for name in dict.fromkeys(adapter_names) if name != BASE])
    try:
        yield
    finally:
        _set_adapters(tuner, layers, active)
        for router, totals, pending in counted:
            router.totals, router.pending = totals, pending


def _set_adapters(tuner: Any, layers: Sequence[Any], names: list[str]) -> None:
    with tuner.keep_trainability():
        for layer in layers:
            layer.set_adapter(names)


def rows_of_sample(x: Tensor, adapter_names: Sequence[str]) -> int:
    """How many rows of x [rows, ...] are one sample's.

    Raises:
        ValueError: the rows are no multiple of B; in PEFT's words.
    """
    rows, rest = divmod(x.shape[0], len(adapter_names))
    if rest or not rows:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {x.shape[0]} respectively."
        )
    return rows


def weights_of_samples(
    router: MixtureRouter, hidden: Tensor, adapter_names: Sequence[str], configs: dict[str, MoELoraConfig]
) -> Tensor:
    """Scaled routing weights [..., E] for hidden [..., H], each sample's by its own adapter, as evaluation uses them.

    Args:
        hidden: rows of B samples in order: one each, or as many each where they hold beams or a sample's tokens.
        adapter_names: [B], of an adapter each or [`BASE`].

    Raises:
        ValueError: the rows are no multiple of B.
    """
    copies = rows_of_sample(hidden, adapter_names)
    owners = [name for name in adapter_names for _ in range(copies)]
    parts = []
    for name, count in router.pool:
        part = hidden.new_zeros((*hidden.shape[:-1], count), dtype=torch.float32)
        rows = [row for row, owner in enumerate(owners) if owner == name]
        index = torch.tensor(rows, dtype=torch.long, device=hidden.device)
        own = _weights(router[name], hidden[index], configs[name])
        parts.append(part.index_copy(0, index, own.to(part.device, part.dtype)))
    return torch.cat(parts, dim=-1)


def _weights(router: Any, hidden: Tensor, config: MoELoraConfig) -> Tensor:
    """[..., E'] of one adapter as if it were alone."""
    kind = config.router_kind
    if kind.is_constant:
        weights = router(router.num_experts).expand(*hidden.shape[:-1], -1)
        return weights * config.routing_scale
    with without_autocast(hidden.device.type):
        hidden_TH = hidden.flatten(0, -2)
        scored = score([router], hidden_TH, router.first_weight, kind, config.router_temperature, lambda own: own)
        routing = route(
            scored.logits,
            top_k=min(config.top_k_experts, router.num_experts),
            temperature=config.router_temperature,
            maturity_E=router.maturity if kind.matures else None,
            bias_E=router.selection_bias if config.balancing.moves_bias else None,
            log_scores_TE=scored.log_scores,
        )
        return routing.weights.view(*hidden.shape[:-1], -1) * config.routing_scale
