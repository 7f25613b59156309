"""Routing in one engine: which block is running, what its tokens' ranks are multiplied by, and who computes that.

On a CPU, and wherever nothing is captured, `Slots` decides, in torch; where CUDA graphs replay a block, kernels that
read tables which never move (`ops.slot_tables`). Shapes: T tokens, H hidden size, R `--max-lora-rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, CUDAGraphMode

from ...routing.domain_classifier import WINDOW
from ...routing.pooled import AddUp
from ..mixture import ServedMixture
from ..slots import Rows, Slots
from . import operator
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
        self.slots = Slots()
        blocks = adapted_blocks(model, linears)
        self.blocks = list(blocks)
        self.unknown = next((name for name in map(class_name, blocks.values()) if name not in IS_SPLIT), None)
        self.tables = None if self.unknown else BlockTables.make(len(blocks), wrapper, config)
        self.densities = self._densities()
        compiled = config.compilation_config
        # Blocks are compiled or replayed, so that no Python runs when a batch does.
        self.is_captured = compiled.mode != CompilationMode.NONE or compiled.cudagraph_mode != CUDAGraphMode.NONE
        self._linears = {
            id(layer.lora_a_stacked): names for layer, names in linears.values() if hasattr(layer, "lora_a_stacked")
        }
        if self.unknown is None:
            self._hook(blocks.values())

    def _hook(self, blocks: Iterable[nn.Module]) -> None:
        number = operator.number(self)
        for index, block in enumerate(blocks):
            hook = BlockHook(number, index, self, BlockInput.of(block, IS_SPLIT[class_name(block)]))
            block.register_forward_pre_hook(hook.before, with_kwargs=True)
            block.register_forward_hook(hook.after)

    # ---- what is in the slots ----------------------------------------------------------------------------------------

    def set(self, slot: int, mixture: ServedMixture | None, rank: int) -> None:
        """Note what has been put into a slot: a mixture, or a plain LoRA, of this rank."""
        self.clear(slot)
        self.wrapper.ranks[slot] = rank
        if mixture is None or not mixture.routers:
            return
        if self.tables is None or not self.tables.take(slot, mixture, self.blocks):
            for router in mixture.routers.values():
                router.to(self.wrapper.device)
            self.slots.mixtures[slot] = mixture
        if mixture.scope == "module":
            self.wrapper.gates_of_linear = self._gates_of_linear

    def clear(self, slot: int) -> None:
        """Note that a slot is empty."""
        self.wrapper.ranks.pop(slot, None)
        self.slots.mixtures.pop(slot, None)
        if self.tables is not None:
            self.tables.clear(slot)
        if not any(mixture.scope == "module" for mixture in self.slots.mixtures.values()):
            self.wrapper.gates_of_linear = None

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
        if self.is_captured and (self.tables is None or (why := self.tables.refusal(mixture))):
            return f"{why if self.tables else 'this platform has no kernels for it'}; start vLLM with --enforce-eager"
        if mixture.scope == "module" and parallel.tensor_parallel_size > 1:
            return (
                'router_scope="module" reads whole inputs, which tensor parallelism cuts; use --tensor-parallel-size 1'
            )
        if mixture.scope == "model" and parallel.pipeline_parallel_size > 1:
            return 'router_scope="model" decides in the first block alone; use --pipeline-parallel-size 1'
        return self._refusal_of_domains() if mixture.routes_by_domain else None

    def _refusal_of_domains(self) -> str | None:
        if self.densities is None:
            return f"its domain classifier reads {WINDOW} tokens back, further than any attention layer of this model"
        if self.config.kv_transfer_config is not None:
            return "its domain classifier needs what stood beside the KV cache; do without --kv-transfer-config"
        if self.config.parallel_config.decode_context_parallel_size > 1:
            return "its domain classifier reads a whole text; use --decode-context-parallel-size 1"
        return None

    def _densities(self) -> KeptDensities | None:
        layers = self.config.compilation_config.static_forward_context.items()
        windows = {name: getattr(layer, "sliding_window", None) for name, layer in layers if hasattr(layer, "kv_cache")}
        whole = [name for name, window in windows.items() if window is None or window >= WINDOW]
        whole.sort(key=lambda name: windows[name] is not None)
        return KeptDensities(whole[0], self.config.cache_config) if whole else None

    # ---- what a batch is multiplied by -------------------------------------------------------------------------------

    def needs_gate(self) -> bool:
        """Whether any token's ranks are weighed in blocks; always, where blocks are captured before anybody knows."""
        if self.is_captured or (self.tables is not None and self.tables.in_use):
            return True
        mixtures = self.slots.mixtures
        return bool(mixtures) and any(slot in mixtures for slot, _ in self.wrapper.groups)

    def fill(self, block: int, hidden_TH: Tensor, residual_TH: Tensor | None, gate_TR: Tensor) -> None:
        """Write what the ranks of a batch's tokens are multiplied by in a block."""
        if self.tables is not None:
            self.tables.fill(block, hidden_TH, residual_TH, gate_TR)
        else:
            gate_TR.fill_(1.0)
        if self.slots.mixtures:
            entering = hidden_TH if residual_TH is None else hidden_TH + residual_TH
            name = self.blocks[block]
            self.slots.weigh_block(name, block == 0, entering, self.wrapper.groups, self._add_up(name), gate_TR)

    def _add_up(self, router: str) -> Callable[[Rows], AddUp]:
        return lambda rows: lambda densities_TA: self._over_context(router, rows, densities_TA)

    def _over_context(self, router: str, rows: Rows, densities_TA: Tensor) -> Tensor:
        assert self.densities is not None  # refused otherwise
        return self.densities.over_context(router, rows, densities_TA)

    def _gates_of_linear(self, lora_a_stacked: tuple[Tensor, ...], x: Tensor) -> list[Tensor] | None:
        """By slice, for the linears that have routers of their own."""
        names = self._linears.get(id(lora_a_stacked), ())
        groups = self.wrapper.groups
        if not names or not self.slots.of_scope(groups, ("module",)):
            return None
        blank = self.wrapper.gate
        gates = []
        for name in names:
            gate = (
                x.new_ones(x.shape[0], lora_a_stacked[0].shape[2], dtype=torch.float32)
                if blank is None
                else blank.clone()
            )
            self.slots.weigh_linear(name, x, groups, self._add_up(name), gate)
            gates.append(gate)
        return gates


class BlockHook:
    """On one block: has its tokens' weights computed as it is entered, and forgets them as it is left."""

    def __init__(self, engine: int, index: int, routing: EngineRouting, block_input: BlockInput) -> None:
        self.engine, self.index, self.routing, self.input = engine, index, routing, block_input
        self.rank = routing.config.lora_config.max_lora_rank

    def before(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Runs before the block's forward; traced where that is compiled."""
        if not self.routing.needs_gate():
            return
        hidden, residual = self.input.find(args, kwargs)
        hidden = hidden.flatten(0, -2)
        residual = None if residual is None else residual.flatten(0, -2)
        gate = torch.empty(hidden.shape[0], self.rank, dtype=torch.float32, device=hidden.device)
        torch.ops.moelora.route(hidden, residual, self.engine, self.index, gate)
        self.routing.wrapper.gate = gate

    def after(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Runs after it."""
        self.routing.wrapper.gate = None
