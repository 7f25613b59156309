"""Hooks that run routing: on the base model and on its blocks.

Hooks are objects, not closures, so that models can be pickled and deep-copied.
Shapes: B batch, S sequence, H hidden, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import is_transformed
from .block_routing import BlockRouting
from .caches import kv_cache
from .checkpointing import make_checkpoint_routed, make_owners_checkpoints_routed
from .delivery import warn_once
from .finish import finish_forward
from .interfaces import MixtureRouter, SharingLinear
from .masks import block_mask
from .removal import remove_routing
from .shared_input import SharedInput
from .state import ForwardContext, ForwardEntry, RoutingState

_NOT_BALANCED = (
    "under torch.func and torch.jit.trace a mixture in training routes as in evaluation, without capacity; there is no "
    "balancing loss, and nothing is counted, for what runs may be one sample of a batch"
)


class ForwardHook:
    """On the base model and on owners of block stacks: opens a context before a forward, closes it whatever happens.

    The base model always opens a new one. The owner of a stack does so only when it is called by itself, as `generate`
    calls an encoder; otherwise it only makes its stack decide anew.
    """

    def __init__(self, module: nn.Module, state: RoutingState, stacks: Sequence[str], is_root: bool) -> None:
        self.state = state
        self.stacks = stacks
        self.is_root = is_root
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.parameter_names = [parameter.name for parameter in parameters if parameter.kind in positional]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook.

        Raises:
            RuntimeError: under nn.DataParallel, whose replicas would share the routers of one GPU.
        """
        state, here = self.state, self.state.in_force
        if self.is_root and "peft_config" not in module.__dict__:  # diffusers' unload_lora knows the layers alone
            remove_routing(module)
            return
        mine = here.entry = ForwardEntry(self, here.context, here.entry)  # first: whatever is raised, `after` is called
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "a mixture cannot run under nn.DataParallel, which the Trainer uses where a process sees several GPUs: "
                "start with `accelerate launch` or torchrun, one process a GPU, or set CUDA_VISIBLE_DEVICES=0"
            )
        if not state.enabled:
            here.context = None
        elif self.is_root or here.context is None:
            inputs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
            mine.context = here.context = ForwardContext(state, inputs, training=module.training)
            if self.is_root and module.training and is_transformed():
                warn_once(state, _NOT_BALANCED)
            elif self.is_root and module.training:
                for name, hook in state.hooks.items():
                    make_checkpoint_routed(module.get_submodule(name), hook)
                make_owners_checkpoints_routed(module, state.hooks)
        else:
            here.context.reset(self.stacks)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook, also called when the forward raised (output is then None)."""
        here = self.state.in_force
        mine = here.entry
        while mine is not None and mine.hook is not self:  # others that an interrupt kept from ending
            mine = mine.before
        if mine is None:
            return None  # it raised before it began
        here.entry, here.context = mine.before, mine.outer
        context = mine.context
        if context is None:
            return None
        if context.call.is_generate:
            context.call.prefilled = True
        context.densities.keep_on(kv_cache(output) if context.cache is None else context.cache)
        return None if output is None else finish_forward(context, module, output)


class BlockHook:
    """On one block: decides the routing of the tokens entering it, and leaves it with the forward that is in force.

    Args:
        name: the block's name.
        stack: the name of the list of blocks it belongs to.
        router: the block's own router ("block" scope), the model's ("model"), or None where each linear has its own.
        is_decoder: it belongs to the decoder of an encoder-decoder model.
        scope: the router scope.
        reads_images: it belongs to an image tower, which masks of text say nothing about.

    Attributes:
        leaders: the linears that ran last in the block, each for those that read its input after it.
        text_first: see [`joint_blocks.text_comes_first`].
    """

    leaders: Sequence[SharingLinear] = ()
    reads_images = False  # pickles of November 2026 have none
    text_first: bool | None = None

    def __init__(
        self,
        state: RoutingState,
        name: str,
        stack: str,
        router: MixtureRouter | None,
        scope: str,
        is_decoder: bool,
        is_encoder_decoder: bool,
        encoder_position: int | None,
        reads_images: bool = False,
    ) -> None:
        self.state = state
        self.name = name
        self.stack = stack
        self.router = router
        self.scope = scope
        self.is_decoder = is_decoder
        self.is_encoder_decoder = is_encoder_decoder
        self.encoder_position = encoder_position
        self.reads_images = reads_images

    @property
    def routing(self) -> BlockRouting | None:
        """The routing in force inside the block, in this thread; None while it does not run."""
        context = self.state.in_force.context
        return None if context is None else context.blocks.get(self.name)

    def before(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        context = self.state.in_force.context
        if context is not None and context.region == self.name:
            return  # decided before the checkpoint
        self.decide(args, kwargs)
        make_checkpoint_routed(block, self)

    def decide(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Route the tokens that the block's arguments bring."""
        if not self.state.enabled:
            return
        here = self.state.in_force
        context = here.context
        if context is None:
            _refuse_foreign_checkpoint(self.name)
            context = ForwardContext(self.state, {}, training=False, is_lone=True)
        hidden = hidden_states_of(args, kwargs)
        mask, may_be_padded = self._padding(context, hidden, kwargs)
        shared = self._shared_weights(context, hidden)
        is_known = mask is not None or not may_be_padded
        weights = self._built_in_weights(context, hidden, mask, is_known) if shared is None else shared
        context.latest = context.blocks[self.name] = BlockRouting(
            context=context,
            lead=hidden.shape[:-1],
            mask=mask,
            pool=context.pool if shared is not None or self.router is None else self.router.pool,
            weights=weights,
            shared_by_user=shared is not None,
            router=self.router,
            encoder_hidden=encoder_states_of(args, kwargs, self.encoder_position),
            shared_input=None if torch.compiler.is_compiling() else SharedInput(),
            text_first=self.text_first,
            top_k=context.top_k if shared is None else None,
            may_be_padded=may_be_padded,
        )
        here.context = context

    def after(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, also called when the forward raised."""
        context = self.state.in_force.context
        if context is not None and context.region != self.name:
            self.leave(context)

    def leave(self, context: ForwardContext) -> None:
        """Let go of the block's routing: it has run."""
        routing = context.blocks.pop(self.name, None)
        if routing is not None and routing.shared_input is not None:
            routing.shared_input.close()
        if context.is_lone and not context.blocks:
            self.state.in_force.context = None

    @property
    def has_to_wait(self) -> bool:
        """Whether it cannot decide yet: its router is a shard until FSDP2's hooks on the block have run."""
        state = self.state
        if self.router is None or self.scope != "block" or state.is_routed_by_hand or not state.enabled:
            return False
        return any(hasattr(parameter, "full_tensor") for parameter in self.router.parameters())  # a DTensor

    def _shared_weights(self, context: ForwardContext, hidden: Tensor) -> Tensor | None:
        if context.call.routing_weights is not None:
            return context.user_weights(hidden.shape[:-1], self.is_encoder_decoder)
        return context.router_weights(self.stack, hidden)

    def _padding(self, context: ForwardContext, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """The mask of the block's tokens, as far as one is known, and whether some of them may be padding."""
        mask = None if self.reads_images else context.mask(hidden, self.is_decoder)
        if mask is not None or not (self.reads_images or context.has_mask(self.is_decoder)):
            return mask, mask is not None
        mask = block_mask(kwargs, hidden.shape[1]) if hidden.dim() == 3 else None
        tells_of_none = self.reads_images or ("attention_mask" in kwargs and kwargs["attention_mask"] is None)
        return mask, mask is not None or not tells_of_none

    def _built_in_weights(
        self, context: ForwardContext, hidden: Tensor, mask: Tensor | None, counts: bool
    ) -> Tensor | None:
        if self.router is None:
            return None
        if self.scope == "block":
            return self.router(hidden, context, mask, counts) if self.router.pool else None
        if self.stack not in context.stack_weights:
            context.stack_weights[self.stack] = self.router(hidden, context, mask, counts)
        return context.stack_weights[self.stack]


def refuse_fused_loss(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook on a model whose output layer is routed, which Liger's loss would not be called through.

    Raises:
        ValueError: that loss is about to be computed, by the output layer's frozen weight alone.
    """
    skips = kwargs.get("skip_logits")
    has_labels = any(kwargs.get(name) is not None for name in ("labels", "shift_labels"))
    if has_labels and (model.training if skips is None else skips) and model.forward.__module__.startswith("liger_"):
        raise ValueError(
            "the mixture adapts the model's output layer, and Liger's fused loss would pass its experts over: switch "
            'that loss off (Trainer: liger_kernel_config={"fused_linear_cross_entropy": False}), or leave the layer '
            "out with `exclude_modules`"
        )


def encoder_argument_position(block: nn.Module) -> int | None:
    """Where a block's forward takes `encoder_hidden_states`, counted without self; None if it does not."""
    names = list(inspect.signature(type(block).forward).parameters)
    return names.index("encoder_hidden_states") - 1 if "encoder_hidden_states" in names else None


def encoder_states_of(args: tuple, kwargs: dict[str, Any], position: int | None) -> Tensor | None:
    """What cross-attention reads in a block, by its arguments; None if nothing."""
    return args[position] if position is not None and len(args) > position else kwargs.get("encoder_hidden_states")


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What enters a block, by its arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
    return hidden


def _refuse_foreign_checkpoint(name: str) -> None:
    # In the backward pass without a context of ours: a checkpoint we did not prepare is running the block again, and
    # would route it without the mask and the maturity of the first time.
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"block `{name}` is recomputed by a checkpoint that does not carry its routing; use the model's own "
            "gradient_checkpointing_enable() (Trainer: gradient_checkpointing=True)"
        )
