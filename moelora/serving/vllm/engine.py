"""Routing in one engine: what the ranks of a batch's tokens are multiplied by in a block, and who computes that.

On a CPU, and wherever nothing is captured, `Slots` decides, in torch; where CUDA graphs replay a block, kernels that
read tables which never move (`ops.slot_tables`). Shapes: T tokens, H hidden size, R `--max-lora-rank`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, CUDAGraphMode

from ..mixture import ServedMixture
from ..slots import Gates, Rows, Slots, write_gates
from . import operators
from .blocks import IS_SPLIT, BlockInput, adapted_blocks, class_name
from .densities import KeptDensities
from .tables import BlockTables


class EngineRouting:
    """Made once the LoRA layers are in place, before anything is compiled.

    Args:
        model: vLLM's.
        linears: its LoRA layers by name; of the linears that vLLM has packed into one, all names in their order.
        wrapper: weighs the ranks of the language model.
        config: vLLM's.
    """

    def __init__(
        self, model: nn.Module, linears: dict[str, tuple[Any, Sequence[str]]], wrapper: Any, config: Any
    ) -> None:
        self.config = config
        self.wrapper = wrapper
        self.slots = Slots(self._over_context)
        self.max_rank = config.lora_config.max_lora_rank
        blocks = adapted_blocks(model, linears)
        self.blocks = list(blocks)
        self.unknown = next((name for name in map(class_name, blocks.values()) if name not in IS_SPLIT), None)
        self.tables = None if self.unknown else BlockTables.make(len(blocks), wrapper, config)
        layers = config.compilation_config.static_forward_context.items()
        with_cache = {name: layer for name, layer in layers if hasattr(layer, "kv_cache")}
        self.densities = KeptDensities.of(with_cache, config.cache_config)
        compiled = config.compilation_config
        # Blocks are compiled or replayed, so that no Python runs when a batch does.
        self.is_captured = compiled.mode != CompilationMode.NONE or compiled.cudagraph_mode != CUDAGraphMode.NONE
        self._linears = {
            id(layer.lora_a_stacked): names for layer, names in linears.values() if hasattr(layer, "lora_a_stacked")
        }
        self.number = operators.number(self)
        if self.unknown is None:
            self._hook(blocks.values())

    @property
    def traced_as(self) -> str:
        """What compiled code depends on: vLLM keeps it on disk, by a hash of a configuration that this has to be in."""
        digest = hashlib.sha256()
        for file in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return f"{digest.hexdigest()[:16]}, engine {self.number}"

    def _hook(self, blocks: Iterable[nn.Module]) -> None:
        if self.is_captured:
            number = self.number  # what is traced may hold a number, and not this object
            self.wrapper.multiply = lambda shrunk, gate: torch.ops.moelora.weigh(shrunk, gate, number)
        for index, block in enumerate(blocks):
            hook = BlockHook(self, index, BlockInput.of(block, IS_SPLIT[class_name(block)]))
            block.register_forward_pre_hook(hook.before, with_kwargs=True)
            block.register_forward_hook(hook.after)

    # ---- what is in the slots ----------------------------------------------------------------------------------------

    def set(self, slot: int, mixture: ServedMixture | None, rank: int, has_head: bool) -> None:
        """Note what has been put into a slot: a mixture, or a plain LoRA, of this rank, that may act on the logits."""
        self.clear(slot)
        self.wrapper.ranks[slot] = rank
        if has_head:
            self.wrapper.heads.add(slot)
        if mixture is None or not mixture.routers:
            return
        if self.tables is None or not self.tables.take(slot, mixture, self.blocks):
            for router in mixture.routers.values():
                router.to(self.wrapper.device)
            self.slots.set(slot, mixture)
            self._watch_linears()

    def clear(self, slot: int) -> None:
        """Note that a slot is empty."""
        self.wrapper.ranks.pop(slot, None)
        self.wrapper.heads.discard(slot)
        self.slots.clear(slot)
        if self.tables is not None:
            self.tables.clear(slot)
        self._watch_linears()

    def _watch_linears(self) -> None:
        self.wrapper.gates_of_linear = self._gates_of_linear if self.slots.hold("module") else None

    def refusal(self, mixture: ServedMixture) -> str | None:
        """Why this engine cannot serve a mixture; None if it can."""
        parallel = self.config.parallel_config
        if not mixture.routers:
            return None  # constant weights: plain LoRA
        if self.unknown is not None:
            return (
                f"its base is made of {self.unknown}, of which nobody has tested what a router reads; add "
                f"`{self.unknown}` to IS_SPLIT in moelora/serving/vllm/blocks.py and a tiny model to "
                'tests/serving/test_architectures.py, or train with router_type="fixed"'
            )
        if self.is_captured:
            why = "this platform has no kernels for it" if self.tables is None else self.tables.refusal(mixture)
            if why is not None:
                return f"{why}; start vLLM with --enforce-eager"
        if mixture.scope == "module" and parallel.tensor_parallel_size > 1:
            return (
                'router_scope="module" reads whole inputs, which tensor parallelism cuts; use --tensor-parallel-size 1'
            )
        if mixture.scope == "model" and parallel.pipeline_parallel_size > 1:
            return 'router_scope="model" decides in the first block alone; use --pipeline-parallel-size 1'
        return self._refusal_of_domains(mixture) if mixture.routes_by_domain else None

    def _refusal_of_domains(self, mixture: ServedMixture) -> str | None:
        window = next(iter(mixture.routers.values())).config.domain_window
        if self.densities is None or not self.densities.reaches(window):
            return (
                f"its domain classifier reads {window or 1} tokens back (`domain_window`), further than any attention "
                "layer of this model"
            )
        if self.config.kv_transfer_config is not None:
            return "its domain classifier needs what stood beside the KV cache; do without --kv-transfer-config"
        if self.config.parallel_config.decode_context_parallel_size > 1:
            return "its domain classifier reads a whole text; use --decode-context-parallel-size 1"
        return None

    # ---- what a batch is multiplied by -------------------------------------------------------------------------------

    def enter(self, block: int, hidden_TH: Tensor, residual_TH: Tensor | None) -> None:
        """Have the wrapper weigh the ranks in a block, which hidden_TH enters, plus residual_TH where that is given."""
        if self.is_captured:  # nobody knows now what will be served then
            self.wrapper.gate = gate_TR = self._blank(hidden_TH)
            torch.ops.moelora.route(hidden_TH, residual_TH, gate_TR, self.number, block)
            return
        self.wrapper.gates = self._gates(block, hidden_TH, residual_TH)
        if not self.wrapper.reads_gates_by_slot:
            self.wrapper.gate = self._whole_gate(block, hidden_TH, residual_TH, self.wrapper.gates)

    def leave(self) -> None:
        """Have it weigh nothing."""
        self.wrapper.gate, self.wrapper.gates = None, {}

    def _whole_gate(self, block: int, hidden_TH: Tensor, residual_TH: Tensor | None, gates: Gates) -> Tensor | None:
        """[T, R]; None where all are ones."""
        in_tables = self.tables is not None and self.tables.in_use
        if not gates and not in_tables:
            return None
        gate_TR = self._blank(hidden_TH).fill_(1.0)  # not every rank of every token is written
        if in_tables:
            self.route(hidden_TH, residual_TH, gate_TR, block)
        write_gates(gates, self.wrapper.groups, gate_TR)
        return gate_TR

    def _gates(self, block: int, hidden_TH: Tensor, residual_TH: Tensor | None) -> Gates:
        groups = self.wrapper.groups
        if not self.slots.routed(groups, "block"):
            return {}
        entering = hidden_TH if residual_TH is None else hidden_TH + residual_TH
        return self.slots.block_gates(self.blocks[block], block == 0, entering, groups)

    def _blank(self, hidden_TH: Tensor) -> Tensor:
        return torch.empty(hidden_TH.shape[0], self.max_rank, dtype=torch.float32, device=hidden_TH.device)

    def route(self, hidden_TH: Tensor, residual_TH: Tensor | None, gate_TR: Tensor, block: int) -> None:
        """Write the gate of a block as the tables have it."""
        assert self.tables is not None  # refused otherwise
        self.tables.route(hidden_TH, residual_TH, gate_TR, block)

    def weigh(self, shrunk: Tensor, gate_TR: Tensor) -> None:
        """Multiply shrunk activations [n, T, R] by the gate, in place."""
        assert self.tables is not None
        self.tables.weigh(shrunk, gate_TR)

    def _over_context(self, router: str, rows: Rows, densities_TA: Tensor, window: int | None) -> Tensor:
        assert self.densities is not None
        return self.densities.over_context(router, rows, densities_TA, window)

    def _gates_of_linear(self, lora_a_stacked: tuple[Tensor, ...], x: Tensor) -> list[Gates] | None:
        """By slice, for the linears that have routers of their own."""
        groups, names = self.wrapper.groups, self._linears.get(id(lora_a_stacked), ())
        if not self.slots.routed(groups, "linear"):
            return None
        return [self.slots.linear_gates(name, x, groups) for name in names] or None


class BlockHook:
    """On one block: has its tokens' weights computed as it is entered, and forgets them as it is left."""

    def __init__(self, routing: EngineRouting, index: int, block_input: BlockInput) -> None:
        self.routing, self.index, self.input = routing, index, block_input

    def before(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Runs before the block's forward; traced where that is compiled."""
        hidden, residual = self.input.find(args, kwargs)
        self.routing.enter(self.index, hidden, residual)

    def after(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Runs after it."""
        self.routing.leave()
