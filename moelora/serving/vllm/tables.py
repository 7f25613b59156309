"""Mixtures in tables that never move, for the blocks that CUDA graphs replay; see `ops.slot_tables`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.slot_tables import SlotTables
from ...routing.pooled import PooledRouter
from ..mixture import ServedMixture


class BlockTables:
    """The tables of one engine.

    Args:
        tables: of all its blocks.
        wrapper: knows each token's slot.
    """

    def __init__(self, tables: SlotTables, wrapper: Any) -> None:
        self.tables = tables
        self.wrapper = wrapper
        self._in_use: set[int] = set()

    @classmethod
    def make(cls, num_blocks: int, wrapper: Any, config: Any) -> BlockTables | None:
        """None where there are no kernels: on a CPU."""
        if torch.device(wrapper.device).type != "cuda":
            return None
        rank, hidden = config.lora_config.max_lora_rank, config.model_config.get_hidden_size()
        tables = SlotTables.empty(num_blocks, config.lora_config.max_loras, rank, hidden, rank, wrapper.device)
        return cls(tables, wrapper)

    @property
    def in_use(self) -> bool:
        """Whether any slot holds a mixture."""
        return bool(self._in_use)

    def refusal(self, mixture: ServedMixture) -> str | None:
        """Why the kernels cannot route a mixture; None if they can."""
        router = next(iter(mixture.routers.values()))
        if mixture.scope != "block":
            return f'router_scope="{mixture.scope}" is not routed in CUDA graphs'
        if mixture.routes_by_domain:
            return "its domain classifier does not run in CUDA graphs"
        if not router.config.router_kind.has_kernel or router.bias_E is not None:
            return f'router_type="{router.config.router_type}", or its biases, have no kernel'
        if mixture.columns:
            return "its adapters are in different blocks, which is not routed in CUDA graphs"
        rows = max(router.first_NH.shape[0] for router in mixture.routers.values())
        if rows > self.tables.first.shape[2]:
            return f"its routers have {rows} hidden units, and CUDA graphs keep --max-lora-rank of them"
        return None

    def take(self, slot: int, mixture: ServedMixture, blocks: Sequence[str]) -> bool:
        """Write a mixture's routers into a slot, if the kernels can route it."""
        if self.refusal(mixture) is not None:
            return False
        like = next(iter(mixture.routers.values()))
        routers = [mixture.routers.get(block, like) for block in blocks]  # where none is, there are no experts either
        seconds, maturities = [_second(router) for router in routers], [router.maturity_E for router in routers]
        self.tables.set(
            slot,
            first_LNH=torch.stack([router.first_NH for router in routers]),
            second_LEN=_stacked(seconds),
            maturity_LE=_stacked(maturities),
            rank=mixture.expert_rank,
            top_k=like.top_k,
            temperature=like.config.router_temperature,
            scale=like.config.routing_scale,
        )
        self._in_use.add(slot)
        return True

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if slot in self._in_use:
            self._in_use.discard(slot)
            self.tables.clear(slot)

    def route(self, hidden_TH: Tensor, residual_TH: Tensor | None, gate_TR: Tensor, block: int) -> None:
        """Write what the ranks of a batch's tokens are multiplied by in a block."""
        if self._is_plain_batch:
            return
        from ...ops.triton.slot_router import route_slots

        slots = self.wrapper.token_mapping_meta.token_lora_mapping[: hidden_TH.shape[0]]
        route_slots(hidden_TH, self.tables, block, slots, gate_TR, residual_TH=residual_TH)

    def weigh(self, shrunk: Tensor, gate_TR: Tensor) -> None:
        """Multiply shrunk activations [n, T, R] by them."""
        if not self._is_plain_batch:
            shrunk.mul_(gate_TR)

    @property
    def _is_plain_batch(self) -> bool:
        """Whether no token has a LoRA: vLLM computes nothing then, and captures a graph of its own of that."""
        return bool(self.wrapper.token_mapping_meta.no_lora_flag_cpu.item())


def _second(router: PooledRouter) -> Tensor | None:
    """[E, N], by which hidden units become logits, of all adapters; None for routers of one layer."""
    if all(part.hidden_weight is None for part in router.routers):
        return None
    return torch.block_diag(*(part.weight.detach().float() for part in router.routers))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None
