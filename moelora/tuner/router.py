"""The router of one scope: it pools the scores of the active adapters and decides.

Shapes: B batch, S sequence, T = B * S tokens, H router input width, E experts of all active adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MoELoraConfig, count_experts
from ..forward.interfaces import Pool
from ..forward.state import ForwardContext, RoutingState
from ..ops.autocast import without_autocast
from ..ops.triton import kernels_for
from ..routing import ExpertRouter, Router, Routing, route
from ..routing.domain_classifier import over_context
from ..routing.pooled import AddUp, PooledRouter, Scored, first_weights, routes_by_domain, score
from ..routing.sums import RoutingSums, RoutingTotals
from ._peft import RouterTunerLayer
from .mixed_batch import weights_of_samples
from .offloaded import with_routers_loaded


class MoELoraRouter(nn.Module, RouterTunerLayer):
    """Holds every adapter's router for one block, model or module, and routes with the active ones.

    1. rms_norm the hidden states and score them with each active adapter's router, in float32: logits [T, E]. Where
       adapters have statistics of their domains, these decide between adapters and scores within
       (`routing.domain_classifier`).
    2. Softmax, top-k, maturity and (in training) capacity: [`moelora.routing.decision.route`].
    3. Report the sums that losses, maturity and statistics need to the forward's context.
    4. In training, drop contributions by `expert_dropout`; multiply by `routing_scale`.

    Args:
        name: the block, module or model this router serves, for statistics and errors.
        hidden_size: H.
        state: the model's routing state.
    """

    adapter_layer_names = ("lora_router",)
    active_adapters: list[str]  # a property of PEFT's
    _counted: Pool = ()  # the mixture that `totals` and `pending` are of
    _waiting: Mapping[Pool, tuple[RoutingTotals, Tensor | None]] = MappingProxyType({})  # those of others

    def __init__(self, name: str, hidden_size: int, state: RoutingState) -> None:
        super().__init__()
        self.name = name
        self.hidden_size = hidden_size
        self.lora_router = nn.ModuleDict()
        self.state = state
        self.totals = RoutingTotals()
        self.pending: Tensor | None = None  # [2, E]: mass and assignments not yet added to maturity and counters
        self.set_adapter([])

    def add_adapter(self, adapter_name: str, config: MoELoraConfig, like: Tensor) -> None:
        """Create an adapter's router on the device and in the floating dtype of `like`."""
        num_experts = count_experts(adapter_name, config)
        router = config.router_kind.make(
            self.hidden_size,
            num_experts,
            router_hidden_size=config.router_hidden_size,
            domain_rank=config.router_memory,
            has_bias=config.balancing.moves_bias,
        )
        if not any(p.is_meta for p in router.parameters()):
            device = None if like.is_meta else like.device  # a base that accelerate keeps on disk has meta tensors
            router.to(device, like.dtype if like.is_floating_point() else None)
        self.lora_router[adapter_name] = router

    def move_adapter(self, adapter_name: str, device: torch.device | None) -> None:
        """Put an adapter's router, just loaded, beside the other routers or layers of its scope."""
        if adapter_name in self.lora_router and (device := device or self.state.device_of(self)) is not None:
            self[adapter_name].to(device)

    @property
    def pool(self) -> Pool:
        """The active adapters that this router scores, with their numbers of experts."""
        routers = self.lora_router
        return tuple((name, self[name].num_experts) for name in self.active_adapters if name in routers)

    def __getitem__(self, adapter_name: str) -> Any:
        """One adapter's router."""
        return self.lora_router[adapter_name]

    def active_routers(self) -> list[ExpertRouter]:
        """The active adapters' routers, in expert order."""
        routers = self.lora_router
        return [self[name] for name in self.active_adapters if name in routers]

    def maturity(self, copy: bool = True) -> Tensor:
        """[E] float32; a copy, or the buffer itself where one adapter holds all experts."""
        parts = [router.maturity for router in self.active_routers()]
        return parts[0] if len(parts) == 1 and not copy else torch.cat(parts)

    def selection_bias(self, copy: bool = True) -> Tensor | None:
        """[E] float32, a copy or the buffer itself as of maturity; None where no bias balances the load."""
        parts = [router.selection_bias for router in self.active_routers() if router.selection_bias is not None]
        if not parts or len(parts) < len(self.active_routers()):
            return None
        return parts[0] if len(parts) == 1 and not copy else torch.cat(parts)

    @with_routers_loaded
    def decide(self, hidden: Tensor, context: ForwardContext | None = None, without: int | None = None) -> Tensor:
        """Routing weights [..., E] for hidden [..., H] as evaluation uses them; no capacity, nothing is counted.

        Args:
            context: the forward whose maturity and biases count; None: as they are now.
            without: an expert to leave out, as if it had never been.
        """
        config = self.state.config
        self.check_made_for(config)
        if config.router_kind.is_constant:
            return self._fixed_weights().expand(*hidden.shape[:-1], -1)
        with without_autocast(hidden.device.type):
            hidden_TH = self._checked(hidden).flatten(0, -2)
            scored = self._score(hidden_TH, self._first_weights(), self._in_context(hidden), without)
            weights_TE = self._route(scored, config, *self._kept(config, context)).weights
            return weights_TE.view(*hidden.shape[:-1], weights_TE.shape[-1])

    def _kept(self, config: MoELoraConfig, context: ForwardContext | None) -> tuple[Tensor | None, Tensor | None]:
        """The maturity and the biases [E] that decide; None for what the configuration has no use for."""
        source: Any = self if context is None else context
        arguments = () if context is None else (self,)
        maturity_E = source.maturity(*arguments) if config.router_kind.matures else None
        return maturity_E, source.selection_bias(*arguments) if config.balancing.moves_bias else None

    def check_made_for(self, config: MoELoraConfig) -> None:
        """Raise ValueError where the configuration has become another than the routers were made for."""
        kind = config.router_kind
        for router in self.active_routers():
            # By the method, for FSDP2 makes classes of its own of those that it shards.
            if getattr(type(router), "logits", None) is not getattr(kind.make, "logits", None):
                field = "router_type"
            elif (router.selection_bias is not None) != config.balancing.moves_bias:
                field = "load_balance_loss_type"
            else:
                continue
            raise ValueError(
                f"`{field}` was set to {getattr(config, field)!r} after the router of `{self.name or 'the model'}` was "
                "made, which it does not fit; set it back, or make the adapter anew with it"
            )

    @property
    def routes_by_domain(self) -> bool:
        """Whether the active adapters, several, all have statistics of their domains, which then decide."""
        return routes_by_domain(self.active_routers())

    @with_routers_loaded
    def forward(
        self, hidden: Tensor, context: ForwardContext, mask: Tensor | None = None, counts: bool = True
    ) -> Tensor:
        """Scaled routing weights [..., E] for hidden [..., H].

        Args:
            mask: [...], False on padding.
            counts: False where nobody knows which tokens are padding: then no expert is ever full, and nothing that
                depends on other tokens is summed up.

        Raises:
            ValueError: hidden has another width than the router.
        """
        config = context.config
        if context.call.adapter_names is not None:
            return weights_of_samples(self, hidden, context.call.adapter_names, self.state.configs)
        if config.router_kind.is_constant:
            weights = context.call.once(self, self._fixed_weights) if context.call.repeats else self._fixed_weights()
            return self._finish(weights.expand(*hidden.shape[:-1], -1), config.routing_scale, context)
        with without_autocast(hidden.device.type):
            if context.call.repeats:
                here, weigh = context.call.once(self, lambda: self._uncounted(config, hidden))
                weights = weigh(self._checked(hidden).to(here), self._in_context(hidden, mask, context))
                scale = 1.0
            else:
                weights, scale = self._counted_weights(self._checked(hidden), context, mask, counts)
            return self._finish(weights, scale, context)

    def _uncounted(
        self, config: MoELoraConfig, hidden: Tensor
    ) -> tuple[torch.device, Callable[[Tensor, AddUp], Tensor]]:
        """The device of the routers, and what makes weights of hidden states there, times the scale: looked up once."""
        routers = cast("list[Router]", self.active_routers())
        pooled = PooledRouter(routers, config)
        here = pooled.first_NH.device
        if pooled.is_softmax and self._can_fuse(hidden.to(here), pooled.first_NH, None):
            from ..ops.triton.router import weights_fused

            return here, weights_fused(
                pooled.first_NH, pooled.top_k, config.router_temperature, config.routing_scale, pooled.maturity_E
            )

        def weigh(hidden: Tensor, add_up: AddUp) -> Tensor:
            weights_TE = pooled.weights(hidden.flatten(0, -2), add_up)
            return weights_TE.view(*hidden.shape[:-1], weights_TE.shape[-1])

        return here, weigh

    def _counted_weights(
        self, hidden: Tensor, context: ForwardContext, mask: Tensor | None, counts: bool
    ) -> tuple[Tensor, float]:
        """The weights [..., E], and what they are yet to be multiplied by; the sums go to the context."""
        config = context.config
        routers = cast("list[Router]", self.active_routers())
        weight_NH, decides_by_domain = first_weights(routers), routes_by_domain(routers)
        maturity_E = context.maturity(self) if config.router_kind.matures else None
        bias_E = context.selection_bias(self) if config.balancing.moves_bias else None
        # Where domains decide, a batch of one goes to one adapter: a share of the whole pool would drop most of it.
        is_limited = context.training and counts and not decides_by_domain
        limit = self._capacity(context) if is_limited else (None, False)
        is_softmax = config.router_kind.has_kernel and bias_E is None and not decides_by_domain
        is_linear = is_softmax and all(router.hidden_weight is None for router in routers)
        here = hidden.to(weight_NH.device)
        if is_linear and self._can_fuse(here, weight_NH, limit[0]):
            mask_T = None if mask is None else mask.to(here.device)
            weights, sums = self._fused(here, weight_NH, config, maturity_E, mask_T, *limit)
            scale = 1.0
        else:
            mask_T = None if mask is None else mask.to(here.device).flatten()
            scored = self._score(here.flatten(0, -2), weight_NH, self._in_context(hidden, mask, context))
            routing = self._route(scored, config, maturity_E, bias_E, mask_T, *limit)
            sums = RoutingSums.of(routing, scored.logits, mask_T, config.load_balance_loss_type)
            weights, scale = routing.weights.view(*hidden.shape[:-1], routing.weights.shape[-1]), config.routing_scale
        if counts:
            context.record(self, sums)
        return weights, scale

    def _capacity(self, context: ForwardContext) -> tuple[float | None, bool]:
        """The factor of a training forward, and whether data-parallel ranks share the capacity.

        With a factor of E an expert may take every token; greater ones say no more, and may exceed all floats. A rank
        that has given its capacity up has that factor: others may not have, and wait for its counts.
        """
        factor, over_ranks = context.config.expert_capacity_factor, context.over_ranks
        if factor is None or (self.state.is_dropless and not over_ranks):
            return None, over_ranks
        return self.out_features if self.state.is_dropless else min(factor, self.out_features), over_ranks

    def _finish(self, weights: Tensor, scale: float, context: ForwardContext) -> Tensor:
        if context.training and context.config.expert_dropout > 0:
            weights = F.dropout(weights, context.config.expert_dropout)
        return weights if scale == 1.0 else weights * scale

    def _checked(self, hidden: Tensor) -> Tensor:
        """hidden [..., H].

        Raises:
            ValueError: of another width than the router.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"the router of `{self.name or 'the model'}` reads hidden states of width {self.hidden_size}, but got "
                f'{hidden.shape[-1]}; use router_scope="module"'
            )
        return hidden

    def _first_weights(self) -> Tensor:
        return first_weights(cast("list[Router]", self.active_routers()))

    @with_routers_loaded
    def logits(self, hidden: Tensor, without: int | None = None) -> Tensor:
        """[T, E] for hidden [..., H], as evaluation scores them; -inf for an expert that is left out."""
        hidden_TH = self._checked(hidden).flatten(0, -2)
        return self._score(hidden_TH, self._first_weights(), self._in_context(hidden), without).logits

    def _score(self, hidden_TH: Tensor, weight_NH: Tensor, add_up: AddUp, without: int | None = None) -> Scored:
        config, routers = self.state.config, cast("list[Router]", self.active_routers())
        return score(routers, hidden_TH, weight_NH, config.router_kind, config.router_temperature, add_up, without)

    def _in_context(self, hidden: Tensor, mask: Tensor | None = None, context: ForwardContext | None = None) -> AddUp:
        """How the densities [T, A] of a forward's tokens hidden [..., H] add up over their context."""
        if hidden.dim() != 3:
            return lambda densities_TA: densities_TA  # no sequence to read on in
        if context is not None and context.requests is not None:
            requests = context.requests
            return lambda densities_TA: requests.over_context(densities_TA, self.name)
        earlier = None if context is None else context.densities
        past = 0 if context is None else context.past_length
        window = self.state.config.domain_window

        def add_up(densities_TA: Tensor) -> Tensor:
            densities_BSA = densities_TA.view(*hidden.shape[:-1], -1)
            mask_BS = None if mask is None else mask.to(densities_TA.device)
            return over_context(densities_BSA, window, mask_BS, earlier, self.name, past).flatten(0, 1)

        return add_up

    def _can_fuse(self, hidden: Tensor, weight_NH: Tensor, capacity_factor: float | None) -> bool:
        """Whether the Triton router serves these tokens; else steps 1 to 3 run one by one."""
        if not kernels_for(hidden):
            return False
        from ..ops.triton.router import serves

        return serves(hidden, weight_NH, capacity_factor)

    @staticmethod
    def _fused(
        hidden: Tensor,
        weight_EH: Tensor,
        config: MoELoraConfig,
        maturity_E: Tensor | None,
        mask_T: Tensor | None,
        capacity_factor: float | None,
        over_ranks: bool,
    ) -> tuple[Tensor, RoutingSums]:
        """Weights [..., E], times routing_scale, and sums by one kernel."""
        from ..ops.triton.router import route_fused

        weights, packed, probs, squared_lse = route_fused(
            hidden,
            weight_EH,
            top_k=min(config.top_k_experts, weight_EH.shape[0]),
            temperature=config.router_temperature,
            maturity_E=maturity_E,
            mask_T=mask_T,
            capacity_factor=capacity_factor,
            over_ranks=over_ranks,
            scale=config.routing_scale,
        )
        return weights, RoutingSums(packed, probs, squared_lse)

    @staticmethod
    def _route(
        scored: Scored,
        config: MoELoraConfig,
        maturity_E: Tensor | None,
        bias_E: Tensor | None,
        mask_T: Tensor | None = None,
        capacity_factor: float | None = None,
        over_ranks: bool = False,
    ) -> Routing:
        return route(
            scored.logits,
            top_k=min(config.top_k_experts, scored.logits.shape[-1]),
            temperature=config.router_temperature,
            maturity_E=maturity_E,
            mask_T=mask_T,
            capacity_factor=capacity_factor,
            over_ranks=over_ranks,
            bias_E=bias_E,
            log_scores_TE=scored.log_scores,
        )

    def _fixed_weights(self) -> Tensor:
        num_pooled = sum(count for _, count in self.pool)
        return torch.cat([router(num_pooled) for router in self.active_routers()])

    def fixed_weights_of(self, adapter_name: str, mixture: Sequence[str]) -> Tensor:
        """[E] of one adapter in a mixture of these adapters, a copy; the adapter's router must be fixed."""
        num_pooled = sum(self[name].num_experts for name in mixture if name in self.lora_router)
        return self[adapter_name](num_pooled).clone()

    @property
    def in_features(self) -> int:
        """H, as on PEFT's layers."""
        return self.hidden_size

    @property
    def out_features(self) -> int:
        """E."""
        return sum(count for _, count in self.pool)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See PEFT; what was counted of a mixture waits until it is active again."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.pool != self._counted:
            waiting = {**self._waiting, self._counted: (self.totals, self.pending)}
            self.totals, self.pending = waiting.pop(self.pool, (RoutingTotals(), None))
            self._counted, self._waiting = self.pool, waiting

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT."""
        super().delete_adapter(adapter_name)
        self._waiting = {pool: counts for pool, counts in self._waiting.items() if adapter_name not in dict(pool)}

    def __repr__(self) -> str:
        return f"MoELoraRouter({self.name!r}, hidden_size={self.hidden_size}, pool={dict(self.pool)})"
