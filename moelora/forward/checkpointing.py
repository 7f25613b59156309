"""Gradient checkpoints around blocks: a block that runs again in backward routes as it did the first time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .block_routing import BlockRouting
from .shared_input import SharedInput
from .state import ForwardContext, RoutingState

CHECKPOINTS = "gradient_checkpointing"  # the attribute by which a module of diffusers tells that it does


class DecidesRouting(Protocol):
    """What is asked of a block's hook, [`moelora.forward.hooks.BlockHook`]."""

    state: RoutingState
    name: str
    encoder_position: int | None

    @property
    def routing(self) -> BlockRouting | None:
        """In force inside the block."""

    @property
    def has_to_wait(self) -> bool:
        """Whether it cannot decide before the block's own hooks."""

    def decide(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Route the tokens that the block's arguments bring."""

    def leave(self, context: ForwardContext) -> None:
        """The block has run."""


def make_checkpoint_routed(block: Any, hook: DecidesRouting) -> None:
    """Make the block's checkpoint function pass the routing on; the model may have set a new one since."""
    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return
    function = block._gradient_checkpointing_func
    if isinstance(function, RoutedCheckpoint):
        if function.hook is hook:
            return
        function = function.function  # of a mixture that was discarded with the base model left as it was
    block._gradient_checkpointing_func = RoutedCheckpoint(function, hook)


def make_owners_checkpoints_routed(model: nn.Module, hooks: Mapping[str, DecidesRouting]) -> None:
    """The same where the owners of blocks checkpoint them, and other modules: in diffusers' models."""
    if not hasattr(model, "_repeated_blocks"):
        return
    by_block = {model.get_submodule(name): hook for name, hook in hooks.items()}
    owners: list[Any] = [each for each in model.modules() if each.training and getattr(each, CHECKPOINTS, False)]
    for owner in owners:
        if not isinstance(owner._gradient_checkpointing_func, RoutedCheckpoints):
            owner._gradient_checkpointing_func = RoutedCheckpoints(owner._gradient_checkpointing_func, by_block)


def make_checkpoint_plain(block: Any) -> None:
    """Give the block, or owner, the checkpoint function back that was wrapped."""
    function = getattr(block, "_gradient_checkpointing_func", None)
    if isinstance(function, RoutedCheckpoint | RoutedCheckpoints):
        block._gradient_checkpointing_func = function.function


class RoutedCheckpoint:
    """A checkpoint function that hands the routing weights to the checkpointed region as an argument.

    An argument, because a tensor captured by a closure gets no gradient in reentrant checkpoints, and one kept on the
    side is gone, or another forward's, when the region runs again.

    Transformers before 5.23 checkpoint around the block's hooks, so that nothing is routed yet. It is done here then;
    but under FSDP2 hooks make the router whole, so that it can only be done within.
    """

    def __init__(self, function: Callable, hook: DecidesRouting) -> None:
        self.function = function
        self.hook = hook

    def __call__(self, region: Callable, *args: Any, **kwargs: Any) -> Any:
        routing = self.hook.routing
        is_early = routing is None
        if is_early and self.hook.has_to_wait:
            return self.function(_DecidingRegion(region, self.hook), *args, **kwargs)
        if is_early:
            self.hook.decide(args, getattr(region, "keywords", {}))
            routing = self.hook.routing
        if routing is None:
            return self.function(region, *args, **kwargs)
        try:
            return self.function(_RoutedRegion(region, self.hook, routing), routing.weights, *args, **kwargs)
        finally:
            if is_early:
                self.hook.leave(routing.context)


class RoutedCheckpoints:
    """An owner's checkpoint function, which it calls with whichever block, or other module, is to run."""

    def __init__(self, function: Callable, hooks: Mapping[nn.Module, DecidesRouting]) -> None:
        self.function = function
        self.hooks = hooks

    def __call__(self, region: Callable, *args: Any, **kwargs: Any) -> Any:
        anyone = next(iter(self.hooks.values()))
        context = anyone.state.in_force.context
        if context is None:
            return self.function(region, *args, **kwargs)
        hook = self.hooks.get(region) if isinstance(region, nn.Module) else None
        if hook is None:
            return self.function(_UndecidedRegion(region, anyone, context), *args, **kwargs)
        return RoutedCheckpoint(self.function, hook)(region, *args, **kwargs)


class _Region:
    """Runs a checkpointed region, the first time and again in backward, in the context of its own forward.

    Backward runs in the thread of the device, or of whoever calls it: the forward is put in force there meanwhile.
    """

    def __init__(self, region: Callable, hook: DecidesRouting, context: ForwardContext) -> None:
        self.region = region
        self.hook = hook
        self.context = context
        self.mixture = hook.state.pool
        self.has_run = False

    @contextmanager
    def _running(self) -> Iterator[ForwardContext]:
        if self.hook.state.pool != self.mixture:
            then, now = [name for name, _ in self.mixture], self.hook.state.active_adapters
            raise RuntimeError(
                f"the mixture changed between forward and backward: block `{self.hook.name}` ran with adapters {then} "
                f"and is recomputed with {now}; call backward before changing adapters"
            )
        here = self.hook.state.in_force
        context = self.context.within_checkpoint(recomputing=self.has_run)
        self.has_run = True
        outer, here.context = here.context, context
        try:
            yield context
        finally:
            here.context = outer
            context.blocks.clear()  # routing and context refer to each other, and would wait for the garbage collector
            context.latest = None


class _RoutedRegion(_Region):
    """Runs it under the routing decided before."""

    def __init__(self, region: Callable, hook: DecidesRouting, routing: BlockRouting) -> None:
        super().__init__(region, hook, routing.context)
        self.routing = routing

    def __call__(self, weights: Tensor | None, *args: Any) -> Any:
        encoder_hidden, position = self.routing.encoder_hidden, self.hook.encoder_position
        if position is not None and len(args) > position and encoder_hidden is not None:
            encoder_hidden = args[position]
        with self._running() as context:
            context.region = self.hook.name
            context.blocks[self.hook.name] = dataclasses.replace(
                self.routing,
                context=context,
                weights=weights,
                encoder_hidden=encoder_hidden,
                shared_input=SharedInput(),
                encoder_weights=None,
            )
            return self.region(*args)


class _UndecidedRegion(_Region):
    """Runs what is no block, whose linears have routers of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._running():
            return self.region(*args, **kwargs)


class _DecidingRegion(_Region):
    """Runs it so that the block's hook decides the routing within, as the routers of "module" scope do."""

    def __init__(self, region: Callable, hook: DecidesRouting) -> None:
        super().__init__(region, hook, hook.state.current_context())

    def __call__(self, *args: Any) -> Any:
        if self.context.grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                f"block `{self.hook.name}` cannot be routed: this version of transformers runs FSDP2's hooks, before "
                "which the router is a shard, inside the checkpoint, and a reentrant one gives routing there no "
                'gradient. Pass gradient_checkpointing_kwargs={"use_reentrant": False}, use router_scope="model", or '
                "install transformers>=5.23"
            )
        with self._running() as context:
            output = self.region(*args)
            if not context.recomputing:
                self.context.latest = context.latest
            return output
