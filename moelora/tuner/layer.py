"""The routed linear layer: PEFT's own LoRA layer for the base at hand, with a mixture in its forward.

Shapes: D in, O out, E experts, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import peft.tuners.lora as peft_lora
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..config import MoELoraConfig, count_experts
from ..forward.alignment import Reads, lines_up
from ..forward.block_routing import BlockRouting, columns
from ..forward.hooks import BlockHook
from ..forward.interfaces import Pool
from ..forward.shared_input import BoundGroup, SharedInput
from ..forward.state import ForwardContext, RoutingState
from ..ops import ExpertPool, Reader, launches_cost_most, mixture_by_expert, mixture_linear
from ..routing.decision import used_experts
from . import native
from .mixed_batch import rows_of_sample
from .offloaded import loaded
from .router import MoELoraRouter


@dataclass
class LayerLink:
    """Where a layer finds its routing."""

    name: str
    state: RoutingState
    hook: BlockHook | None  # of the block around it; None outside every block
    reads: Reads = "same"  # which tokens, beside those that enter its block
    fused_with: tuple[MoELoraLayer, ...] = ()  # its parent calls them after it, with the same tensor
    bound: BoundGroup | None = None  # with those of them that one product serves

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of November 2026 call `fused_with` otherwise."""
        self.__dict__.update({"fused_with": state.pop("followers", ()), "bound": None} | state)

    def __getstate__(self) -> dict[str, Any]:
        """What is bound is bound anew in a copy."""
        return self.__dict__ | {"bound": None}

    @property
    def routing(self) -> BlockRouting | None:
        """That of the block around it, while it runs, in this thread. Looked up once for each run of a layer."""
        return None if self.hook is None else self.hook.routing


# Python lets an object change its class only where the memory layouts agree, so at run time the mixin has no base.
_LayerBase: Any = LoraLayer if TYPE_CHECKING else object


class MoELoraLayer(_LayerBase):
    """Mixed into the layer class that PEFT dispatched, so quantised bases, merging and Conv1D stay PEFT's.

    1. Routing weights [..., E] of this input: from the block, the model, or the layer's own router.
    2. The frozen base layer.
    3. ``sum_e w_e * scaling * B_e A_e dropout(x)`` over the active adapters' experts, added to 2.

    lora_A[adapter].weight is [E * r, D] and lora_B[adapter].weight [O, E * r]; rank block e is expert e.
    """

    other_param_names = (*LoraLayer.other_param_names, "num_experts")  # deleted with an adapter

    link: LayerLink
    num_experts: dict[str, int]
    merged_weights: dict[str, Tensor]  # fixed routing weights [E] of each merged adapter
    moe_router: MoELoraRouter  # where it has one of its own, see tuner/placement.py

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class. x [..., D] -> [..., O].

        Raises:
            RuntimeError: the layer is called outside its block, which decides its routing.
            ValueError: x does not line up with the tokens that were routed.
        """
        if self.is_left_to_peft:
            return super().forward(x, *args, **kwargs)
        if kwargs:
            kwargs.pop("adapter_names", None)  # from PEFT, of each sample: its routing says it already
        routing = self.link.routing
        inputs = None if args or kwargs else self._shared_input(routing)
        if inputs is not None and (ready := inputs.take(self, x)) is not None:
            return ready
        names = self.routed_adapters()
        if not names:
            of_samples = self.link.state.in_force.call.adapter_names
            if of_samples is not None and not self.link.state.active_adapters:
                rows_of_sample(x, of_samples)  # all are the base's: no router sees how many there are
            return super().forward(x, *args, **kwargs)
        if self._may_be_plain_lora(routing):
            weights, pool = self._weights_of_pool(x, routing)
            if (few := self._few_loras(x, weights, pool, routing)) is not None:
                return self._as_plain_loras(x, *few, *args, **kwargs)
        if inputs is not None and routing is not None:
            fused = inputs.run(self, x, routing)
            if fused is not None:
                return fused
        weights = columns(*self._weights_of_pool(x, routing), names).to(x.device)
        with self._loaded(names):
            pools = self.expert_pools()
            if not self.cast_input_dtype_enabled:  # factors may be stored in what nothing is computed in
                pools = [pool.computed_in(x.dtype) for pool in pools]
            return mixture_linear(x, Reader(self.base_layer, pools), weights, *args, **kwargs)

    def _may_be_plain_lora(self, routing: BlockRouting | None) -> bool:
        """Whether the tokens may have to come out as a plain LoRA that was imported makes them, to the last bit.

        Not in training, where dropout, and soon the expert itself, are other than they were.
        """
        if self.training:
            return False
        context = self.link.state.current_context() if routing is None else routing.context
        return context.may_single_out

    def _few_loras(
        self, x: Tensor, weights: Tensor, pool: Pool, routing: BlockRouting | None
    ) -> tuple[list[str], Tensor] | None:
        """The adapters of one expert that have the tokens to themselves, with their weights [..., U].

        None where others have any, where several are all or one product of all takes fewer launches, and where weights
        given by hand want a gradient, those that are 0 too.
        """
        if weights.requires_grad and torch.is_grad_enabled() and self.link.state.is_routed_by_hand:
            return None
        used = routing.used_experts(x) if self._follows(routing) else used_experts(weights)
        by_column = [name for name, count in pool for _ in range(count)]
        if not used or (len(used) > 1 and (len(used) == len(by_column) or launches_cost_most(x))):
            return None
        names = [by_column[column] for column in used]
        if not all(self.link.state.configs[name].single_expert for name in names):
            return None
        return names, _columns_at(weights, used)

    def _as_plain_loras(self, x: Tensor, names: list[str], weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One in a plain LoRA's operations, several in one product: no bit depends on how many others there are."""
        here = [place for place, name in enumerate(names) if name in self.lora_A]
        if not here:
            return self.base_layer(x, *args, **kwargs)
        if len(here) < len(names):
            names, weights = [names[place] for place in here], _columns_at(weights, here)
        with self._loaded(names):
            pools = [self.expert_pool(name) for name in names]
            dtype = pools[0].lora_A.dtype if self.cast_input_dtype_enabled else x.dtype
            reader = Reader(self.base_layer, [pool.computed_in(dtype) for pool in pools])
            form = mixture_by_expert if len(pools) == 1 else mixture_linear
            return form(x, reader, weights.to(x.device), *args, **kwargs)

    def _loaded(self, names: list[str]) -> AbstractContextManager[Any]:
        """Within, these adapters' factors are there."""
        return loaded([factors[name] for factors in (self.lora_A, self.lora_B) for name in names])

    def _shared_input(self, routing: BlockRouting | None) -> SharedInput | None:
        """Where linears of the block leave each other results; None where this one has weights of its own."""
        return routing.shared_input if self._follows(routing) else None

    def _follows(self, routing: BlockRouting | None) -> TypeGuard[BlockRouting]:
        """Whether the weights of the tokens that enter the block are this linear's too."""
        if routing is None or routing.weights is None:
            return False
        return self.link.reads == "same" if routing.shared_by_user else not self.has_own_router

    @property
    def has_own_router(self) -> bool:
        """Whether its router serves no other linear."""
        return "moe_router" in self._modules

    def is_routed_like(self, other: MoELoraLayer) -> bool:
        """Whether both have the same weights wherever they read the same tensor."""
        return self.has_own_router == other.has_own_router and self.link.reads == other.link.reads == "same"

    @property
    def is_left_to_peft(self) -> bool:
        """Whether its experts are switched off, or merged into the base layer."""
        return self.disable_adapters or self.merged

    def routed_adapters(self) -> list[str]:
        """Names of the adapters that its weights are for, in expert order."""
        adapted = self._modules["lora_A"]._modules
        return [name for name in self.active_adapters if name in adapted]

    def expert_pools(self) -> list[ExpertPool]:
        """The factors of every routed adapter, in expert order; none where PEFT computes: disabled or merged."""
        return [] if self.is_left_to_peft else [self.expert_pool(name) for name in self.routed_adapters()]

    def expert_pool(self, adapter_name: str) -> ExpertPool:
        """The factors of one adapter's experts.

        Raises:
            ValueError: their rank is none of so many experts.
        """
        if len(self.lora_A[adapter_name].weight) != self.r[adapter_name]:
            raise ValueError(
                f"the experts of `{self.link.name}` have {len(self.lora_A[adapter_name].weight)} ranks in place of "
                f"{self.r[adapter_name]}: mixtures are swapped for those of the same `r` and `num_experts`, so call "
                "`prepare_model_for_compiled_hotswap` without `target_rank`"
            )
        return ExpertPool(
            lora_A=self.lora_A[adapter_name].weight,
            lora_B=self.lora_B[adapter_name].weight,
            num_experts=self.num_experts[adapter_name],
            scaling=self.scaling[adapter_name],
            dropout=self.lora_dropout[adapter_name],
        )

    def weights_for(self, x: Tensor) -> Tensor:
        """Routing weights [..., E] for x [..., D], E being the experts of this layer's routed adapters."""
        return columns(*self._weights_of_pool(x, self.link.routing), self.routed_adapters()).to(x.device)

    def _weights_of_pool(self, x: Tensor, routing: BlockRouting | None) -> tuple[Tensor, Pool]:
        link = self.link
        if link.hook is None or (routing is None and self._is_asked_before_its_block):
            return self._weights_outside_blocks(x)
        if self._follows(routing):
            return routing.weights_for(x, link.name), routing.pool
        if routing is None:
            raise RuntimeError(
                f"`{link.name}` was called outside its block `{link.hook.name}`, which decides its routing; call the "
                'block or the model, or use router_scope="module"'
            )
        context, router = routing.context, self.moe_router
        if context.call.routing_weights is not None:
            return self._weights_by_hand(x, context), context.pool
        mask = None if link.reads == "others" else routing.mask_for(x)
        is_known = mask is not None or not routing.may_be_padded
        return router(x, context, mask, is_known), router.pool

    def _weights_by_hand(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The caller's weights [..., E] for x [..., D], which are this block's tokens and those before them."""
        if self.link.reads == "others":
            raise ValueError(
                f"`{self.link.name}` reads other tokens than those that enter its block, for which `routing_weights` "
                "say nothing; leave it out with `exclude_modules`, or call the model without `routing_weights`"
            )
        batch, length = x.shape[0], x.shape[:-1].numel() // x.shape[0]
        weights = context.call.weights_for(torch.Size((batch, length)), context.state.num_experts, past_length=0)
        assert weights is not None
        return weights.reshape(*x.shape[:-1], -1)

    @property
    def _is_asked_before_its_block(self) -> bool:
        """Whether a forward calls it by itself, as DiT asks a block for its time step, and it has its own router."""
        return "moe_router" in self._modules and self.link.state.in_force.context is not None

    def _weights_outside_blocks(self, x: Tensor) -> tuple[Tensor, Pool]:
        state = self.link.state
        context = state.current_context()
        if (weights := context.user_weights(x.shape[:-1])) is not None:
            return weights, context.pool
        latest = context.latest
        if self.has_own_router and not (state.attached is not None and _serves(latest, x)):
            mask = context.mask(x, is_decoder=False)
            is_known = mask is not None or not context.hides_padding(x)
            return self.moe_router(x, context, mask, is_known), self.moe_router.pool
        if latest is None or latest.weights is None:
            raise ValueError(
                f"`{self.link.name}` runs before the first transformer block, so no router has decided yet; leave it "
                "out with `exclude_modules`"
            )
        return latest.weights_for(x, self.link.name), latest.pool

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See PEFT. The experts weigh in as in a mixture of the adapters that are merged, whatever is active, and their
        weights are kept, so that unmerging takes back what was merged even if routing has changed since."""
        names = list(adapter_names or self.active_adapters)
        if self.link.state.configs[names[0]].router_kind.is_constant:
            chosen = {name: self._fixed_router().fixed_weights_of(name, names) for name in names if name in self.lora_A}
            self.merged_weights = chosen | self.merged_weights
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """See PEFT."""
        super().unmerge()
        self.merged_weights = {}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """[O, D] (PEFT's orientation): the adapter's delta under fixed routing, which alone can be merged.

        Raises:
            ValueError: routing depends on the token.
        """
        config = self.link.state.configs[adapter]
        if not config.router_kind.is_constant:
            raise ValueError(f'`{self.link.name}` routes per token and has no single delta; use router_type="fixed"')
        factor = self.lora_B[adapter].weight
        weights_E = self.merged_weights.get(adapter)
        if weights_E is None:
            weights_E = self._fixed_router().fixed_weights_of(adapter, self.active_adapters)
        weights_E = weights_E * config.routing_scale
        per_rank = weights_E.repeat_interleave(factor.shape[1] // self.num_experts[adapter])
        original = factor.data
        try:  # PEFT's own method does the rest: transposition, precision, quantised types
            factor.data = original * per_rank.to(original)
            return super().get_delta_weight(adapter)
        finally:
            factor.data = original

    def _fixed_router(self) -> Any:
        if self.has_own_router:
            return self.moe_router
        hook = self.link.hook
        router = hook.router if hook is not None else None
        return router or next(iter(self.link.state.routers.values()))


def _columns_at(weights: Tensor, places: Sequence[int]) -> Tensor:
    """[..., len(places)]. By slices: a list of indices would be copied to the device, which the host waits for."""
    pieces = [weights[..., place : place + 1] for place in places]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _serves(routing: BlockRouting | None, x: Tensor) -> bool:
    """Whether a block that ran has decided on the tokens of x [..., D]."""
    return routing is not None and routing.weights is not None and lines_up(x.shape[:-1], routing.lead)


_CLASS_PREFIX = "MoELora"


def routed_class(layer_cls: type) -> type:
    """The class that mixes MoELoraLayer into one of PEFT's LoRA layer classes."""
    return _routed_class_of(f"{_CLASS_PREFIX}{layer_cls.__name__}", layer_cls)


def _routed_class_of(name: str, layer_cls: type) -> type:
    if name not in globals():
        globals()[name] = type(name, (MoELoraLayer, layer_cls), {"__module__": __name__})
    return globals()[name]


def __getattr__(name: str) -> type:
    """Make routed classes importable by name, so that models can be pickled and unpickled elsewhere."""
    if name.startswith(_CLASS_PREFIX):
        for module in (native, *vars(peft_lora).values()):
            layer_cls = getattr(module, name.removeprefix(_CLASS_PREFIX), None)
            if isinstance(layer_cls, type) and issubclass(layer_cls, LoraLayer):
                return _routed_class_of(name, layer_cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_routed(layer: Any, adapter_name: str, config: MoELoraConfig) -> None:
    """Turn the LoRA layer that PEFT created into a routed one, or add an adapter to a routed one.

    A parameter's layer is none: what has to be routed there, the base routes.
    """
    if isinstance(layer, peft_lora.ParamWrapper):
        layer.__class__ = native.ParamWrapper
    if isinstance(layer, (native.ParamWrapper, native.ExpertsLora)) and not layer._forward_pre_hooks:
        layer.register_forward_pre_hook(native.refuse_replaced_forward)
    if not isinstance(layer, LoraLayer) or isinstance(layer, native.ParamWrapper):
        return  # no LoRA: what wraps a parameter already, further out, got the adapter
    if not isinstance(layer, MoELoraLayer):
        layer.__class__ = routed_class(type(layer))
        layer.num_experts = {}
        layer.merged_weights = {}
    layer.num_experts[adapter_name] = count_experts(adapter_name, config)
    if config.init_lora_weights == "gaussian" and not layer.lora_A[adapter_name].weight.is_meta:
        # PEFT draws with deviation 1 / rank, and the stored rank is that of all experts together.
        layer.lora_A[adapter_name].weight.data *= layer.num_experts[adapter_name]
