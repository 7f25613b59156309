"""What one model's routers, blocks and layers share, and what one forward pass knows.

Nothing here is global: two models never share routing, every forward starts a fresh context, and which forward is in
force is a matter of the thread.
Shapes: B batch, S sequence, E experts of all active adapters.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MoELoraConfig, count_experts
from ..ops import is_transformed
from ..ops.data_parallel import num_ranks
from ..routing.domain_classifier import ContextDensities
from ..routing.sums import RoutingSums
from ..routing.training_sums import TrainingWindow
from .caches import kv_cache, past_length
from .call import Call
from .interfaces import MixtureRouter, Pool
from .masks import decoder_mask_from_labels, packed_mask, token_mask, without_nothing
from .overflow import StepRollback
from .packed_requests import PROBED, PackedRequests, check_reads_tokens_alone
from .training_loop import TrainingLoop


@dataclass
class ForwardEntry:
    """A forward that has begun and not ended, as the hook that began it finds it again."""

    hook: object
    outer: ForwardContext | None  # in force again when it ends
    before: ForwardEntry | None  # what had been opened before it
    context: ForwardContext | None = None  # None where the module runs within another's forward, or nothing is routed


@dataclass
class InForce:
    """What is in force in one thread."""

    context: ForwardContext | None = None  # the forward in progress
    entry: ForwardEntry | None = None  # the innermost one
    call: Call = field(default_factory=Call)
    copies: int | None = None  # what `generate` is about to call with; see [`Call`]


class _OfThread(threading.local):
    """Each thread its own, so that threads can run one model at once.

    Not a ContextVar, which torch.compile cannot trace; and what changes is one object further in, for what a compiled
    graph stores in a thread's local itself is lost (torch 2.13).
    """

    def __init__(self) -> None:
        self.in_force = InForce()


@dataclass
class RoutingState:
    """Shared by reference, and by all threads; lives as long as the base model is adapted."""

    configs: dict[str, MoELoraConfig]
    routers: dict[str, MixtureRouter] = field(default_factory=dict)  # by name, in the order of the model
    hooks: dict[str, Any] = field(default_factory=dict)  # the BlockHooks, by block name
    handles: list[Any] = field(default_factory=list)  # that remove the hooks
    of_thread: _OfThread = field(default_factory=_OfThread)
    attached: nn.Module | None = None  # the user's own router
    packable: nn.Module | None = None  # the one attached, once it was found to read each token alone
    balancing_loss: Tensor | None = None  # of the latest training forward
    rollback: StepRollback | None = None  # of the latest training forward, where a loss scaler may skip its step
    window: TrainingWindow | None = None  # sums of the training steps since the last log, where somebody logs
    is_dropless: bool = False  # in training too: see `give_up_capacity`
    loop: TrainingLoop | None = None  # the one that trains it, where MoELoraCallback tells
    delivered_at: int | None = None  # a router's version when the balancing loss last came by itself; see delivery
    warned: set[str] = field(default_factory=set)  # warnings that were given of this model, and need not be again

    @property
    def in_force(self) -> InForce:
        """What is in force in the thread that asks."""
        return self.of_thread.in_force

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that form the mixture, in expert order."""
        return next(iter(self.routers.values())).active_adapters if self.routers else []

    @property
    def config(self) -> MoELoraConfig:
        """The configuration that governs the mixture: the first active adapter's.

        Raises:
            ValueError: no adapter is active.
        """
        self.check_active()
        return self.configs[self.active_adapters[0]]

    def check_active(self) -> None:
        """Raise ValueError where no adapter is active, so that there are no experts."""
        if not self.active_adapters:
            raise ValueError(
                "the mixture has no active adapter; add one with `add_adapter`, or choose one with `set_adapter`"
            )

    @property
    def pool(self) -> Pool:
        """Every active adapter with its number of experts."""
        return tuple((name, count_experts(name, self.configs[name])) for name in self.active_adapters)

    @property
    def num_experts(self) -> int:
        """E."""
        return sum(count for _, count in self.pool)

    @property
    def is_routed_by_hand(self) -> bool:
        """Whether the routing weights are the caller's, or an attached router's."""
        return self.in_force.call.routing_weights is not None or self.attached is not None

    @property
    def may_single_out(self) -> bool:
        """Whether tokens can be an imported LoRA's alone: by weights given by hand, by a fixed router, or by top-1."""
        if not any(self.configs[name].single_expert for name in self.active_adapters):
            return False
        config = self.config
        return (
            self.is_routed_by_hand or config.router_kind.is_constant or min(config.top_k_experts, self.num_experts) == 1
        )

    @property
    def enabled(self) -> bool:
        """Whether anything is routed at all."""
        return bool(self.active_adapters) and not any(router.disable_adapters for router in self.routers.values())

    def device_of(self, router: MixtureRouter) -> torch.device | None:
        """The device that a router's other adapters are on, else that of the first router found elsewhere."""
        for candidate in (router, *self.routers.values()):
            for parameter in candidate.parameters():
                if not parameter.is_meta:
                    return parameter.device
        return None

    def check_packable(self, hidden: Tensor) -> None:
        """Raise ValueError where the attached router cannot read several texts in a row, such as hidden [1, S, H]."""
        if self.attached is None or self.attached is self.packable:
            return
        check_reads_tokens_alone(self.attached, hidden)
        if hidden.shape[1] >= PROBED:
            self.packable = self.attached

    def current_context(self) -> ForwardContext:
        """This thread's forward in progress, or a throw-away context for a submodule that is called by itself."""
        return self.in_force.context or ForwardContext(self, {}, training=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no forward in progress, no autograd graph and no training loop."""
        kept = {name: value for name, value in self.__dict__.items() if name != "of_thread"}
        return kept | {"balancing_loss": None, "rollback": None, "loop": None, "delivered_at": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.pop("growth", None)  # the name that pickles of November 2026 have for what is None in them
        self.__dict__.update({"warned": set(), "rollback": None} | state, of_thread=_OfThread())


class ForwardContext:
    """One forward pass of the base model: its inputs, its padding, its blocks' routing, what its routers reported.

    Args:
        inputs: the base model's arguments by name.
        training: whether capacity (unless it was given up), expert dropout and the balancing loss apply.
        is_lone: it stands in for a forward around one block that is called by itself, and ends with it.
    """

    def __init__(self, state: RoutingState, inputs: dict[str, Any], training: bool, is_lone: bool = False) -> None:
        self.state = state
        self.call = state.in_force.call
        self.is_lone = is_lone
        self.look_up()
        self.inputs = inputs
        self.training = training and not is_transformed()  # nobody could count, or balance, over what is one sample's
        self.recomputing = False  # inside a checkpointed region's second run
        self.in_checkpoint = False
        self.region: str | None = None  # the block whose checkpointed region runs, and carries its routing
        self.blocks: dict[str, Any] = {}  # the BlockRouting of the blocks that run, by name
        self.records: list[tuple[MixtureRouter, RoutingSums]] = []
        self.attached_weights: dict[str, Tensor] = {}  # by stack
        self.stack_weights: dict[str, Tensor] = {}  # "model" scope, by stack
        self.latest: Any = None  # that of the block that ran last
        self.grad_enabled = torch.is_grad_enabled()
        self.cache = kv_cache(inputs)
        self.past_length = past_length(self.cache)  # now: the blocks' attention lets it grow
        self.densities = ContextDensities.on(self.cache)
        self.requests = PackedRequests.of(inputs, self.config.domain_window)
        is_no_text = self.requests or self.call.is_generate or is_transformed()
        self.counts = self.training or not is_no_text  # whether what routers do is summed up
        has_no_mask = inputs.get("attention_mask") is None and self.requests is None
        self.packed = packed_mask(inputs.get("position_ids")) if has_no_mask else None  # [B, S]
        self._maturity: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor | None] = {}
        self._masks: dict[tuple[int, bool], Tensor | None] = {}  # by length and is_decoder

    def look_up(self) -> None:
        """Note what the active adapters are, which is the same for all blocks and layers of a forward.

        Raises:
            ValueError: no adapter is active, or its configuration has become another than its routers were made for.
        """
        self.config = self.state.config
        if self.call.adapter_names is None:
            next(iter(self.state.routers.values())).check_made_for(self.config)  # the others were made as it was
        self.pool = self.state.pool
        self.call.begin_forward(self.pool)
        self.may_single_out = self.state.may_single_out

    def within_checkpoint(self, recomputing: bool) -> ForwardContext:
        """The same forward for a checkpointed region, which may run again when, and where, others are under way.

        Only what says where it is becomes its own; what routers report, and have decided, is the forward's.
        """
        context = copy.copy(self)
        context.blocks, context.region = dict(self.blocks), None
        context.in_checkpoint, context.recomputing = True, recomputing
        return context

    @property
    def top_k(self) -> int | None:
        """Experts of a token that the mixture's own routers give any weight to, at most; None: maybe all."""
        is_alike = self.call.adapter_names is None  # else each sample's adapter has its own
        return self.config.top_k_experts if is_alike and self.config.router_kind.is_sparse else None

    @property
    def over_ranks(self) -> bool:
        """Whether data-parallel ranks share capacity: in a training step, which all of them take together."""
        return self.grad_enabled and num_ranks() > 1

    def maturity(self, router: MixtureRouter) -> Tensor:
        """[E] as it was when this forward first asked, so that a recomputed block routes as it did before."""
        if not self.training:
            return router.maturity(copy=False)
        if router.name not in self._maturity:
            self._copy_maturity(router)
        return self._maturity[router.name]

    def _copy_maturity(self, router: MixtureRouter) -> None:
        """Of this router, and of all others on its device: copies cost by their number."""
        now = {name: each.maturity(copy=False) for name, each in self.state.routers.items() if each.pool}
        here = {name: value for name, value in now.items() if value.device == now[router.name].device}
        parts = torch.cat(list(here.values())).split([value.numel() for value in here.values()])
        self._maturity |= {name: part for name, part in zip(here, parts, strict=True) if name not in self._maturity}

    def selection_bias(self, router: MixtureRouter) -> Tensor | None:
        """[E], as of maturity; None where no bias balances the load."""
        if not self.training:
            return router.selection_bias(copy=False)
        if router.name not in self._biases:
            self._biases[router.name] = router.selection_bias()
        return self._biases[router.name]

    def record(self, router: MixtureRouter, sums: RoutingSums) -> None:
        """Keep a router's sums, once; not those of a step of generate or of continuous batching.

        Raises:
            RuntimeError: inside a reentrant checkpoint, whose side results carry no gradient.
        """
        if self.recomputing or self is not self.state.in_force.context or not self.counts:
            return  # a server's forwards, some of them rehearsals, are no statistics of a text
        loses_gradient = self.in_checkpoint and self.grad_enabled and not torch.is_grad_enabled()
        if self.training and loses_gradient and self.config.balancing_coef > 0:
            raise RuntimeError(
                f"the balancing loss of router `{router.name}` would be lost: it runs inside a reentrant gradient "
                'checkpoint. Pass gradient_checkpointing_kwargs={"use_reentrant": False}, use router_scope="block" and '
                "leave out linears with routers of their own, or set `router_aux_loss_coef` to 0"
            )
        self.records.append((router, sums))

    def reset(self, stacks: Sequence[str]) -> None:
        """Make these stacks decide anew: their blocks are about to run (again)."""
        for stack in stacks:
            self.stack_weights.pop(stack, None)
            self.attached_weights.pop(stack, None)

    def mask(self, hidden: Tensor, is_decoder: bool) -> Tensor | None:
        """[B, S] bool for hidden [B, S, H], False on padding; None where no mask fits.

        Args:
            is_decoder: hidden belongs to the decoder of an encoder-decoder model.
        """
        if hidden.dim() != 3 or self.requests is not None:  # whose padding is nobody's
            return None
        batch, length = hidden.shape[:2]
        if torch.compiler.is_compiling():  # a compiled block would be compiled anew where it finds another's mask
            mask = self._mask_of(length, is_decoder)
        elif (length, is_decoder) in self._masks:
            mask = self._masks[length, is_decoder]
        else:
            mask = self._masks[length, is_decoder] = without_nothing(self._mask_of(length, is_decoder))
        return mask if mask is not None and mask.shape == (batch, length) else None

    def has_mask(self, is_decoder: bool) -> bool:
        """Whether the inputs say that some tokens may be padding."""
        masks = ("decoder_attention_mask", "labels") if is_decoder else ("attention_mask", "pixel_mask")
        return self.packed is not None or any(self.inputs.get(name) is not None for name in masks)

    def hides_padding(self, x: Tensor) -> bool:
        """Whether x [..., D], read outside every block and not what the mask is for, may hold padding.

        Frames of a sound may, whose mask is for samples; not images beside a text, nor what is pooled from a sequence.
        """
        is_sound = "input_values" in self.inputs or "input_features" in self.inputs
        return x.dim() == 3 and is_sound and self.has_mask(is_decoder=False)

    def _mask_of(self, length: int, is_decoder: bool) -> Tensor | None:
        past = None if self.cache is None else self.past_length
        if is_decoder:
            given = self.inputs.get("decoder_attention_mask")
            if given is None:
                given = decoder_mask_from_labels(self.inputs.get("labels"))
            return token_mask(given, length, past)
        if self.packed is not None:
            return self.packed
        return token_mask(self.inputs.get("attention_mask"), length, past)

    def user_weights(self, lead: torch.Size, is_encoder_decoder: bool = False) -> Tensor | None:
        """The user's `routing_weights` as [*lead, E] for hidden states [*lead, H]; None if there are none.

        Raises:
            ValueError: the shape does not fit; the message names both.
        """
        num_experts = self.state.num_experts
        return self.call.weights_for(lead, num_experts, self.past_length, is_encoder_decoder)

    def router_weights(self, stack: str, hidden: Tensor) -> Tensor | None:
        """[B, S, E] from the attached router, called once per stack on the first hidden states; None without one.

        Raises:
            ValueError: it returned another shape; the message names both.
        """
        if self.state.attached is None:
            return None
        if stack not in self.attached_weights:
            if self.requests is not None:
                self.state.check_packable(hidden)
            self.attached_weights[stack] = call_attached_router(self.state, hidden)
        return self.attached_weights[stack]


def call_attached_router(state: RoutingState, hidden: Tensor) -> Tensor:
    """The attached router's weights for hidden [B, S, H], checked to be [B, S, E].

    Raises:
        TypeError: it returned no tensor.
        ValueError: it returned another shape; the message names both.
    """
    assert state.attached is not None
    weights = state.attached(hidden)
    expected = (*hidden.shape[:-1], state.num_experts)
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"the attached router returned {type(weights).__name__}; its forward must return a tensor [B, S, E]"
        )
    if weights.shape != expected:
        raise ValueError(
            f"the attached router returned shape {list(weights.shape)} for hidden states {list(hidden.shape)}, "
            f"expected {list(expected)} (the mixture has {state.num_experts} experts)"
        )
    return weights
