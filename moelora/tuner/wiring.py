"""How routers are wired into a base model: which module holds each, which hooks ask it, where layers find its weights.

One state per base model, [`RoutingState`], ties them together. It is made here, with the first routed adapter, hangs on
the base model, and goes with [`moelora.forward.removal.remove_routing`].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import MoELoraConfig
from ..forward.hooks import BlockHook, ForwardHook, encoder_argument_position, refuse_fused_loss
from ..forward.joint_blocks import text_comes_first
from ..forward.removal import STATE_ATTRIBUTE
from ..forward.shared_input import readers_of
from ..forward.state import RoutingState
from . import blocks
from .layer import LayerLink, MoELoraLayer
from .placement import Place, places
from .router import MoELoraRouter


@dataclass(frozen=True)
class Wiring:
    """The routers, hooks and links of one base model.

    Args:
        model: the base model, whose layers PEFT has replaced.
        state: what hangs on it.
    """

    model: nn.Module
    state: RoutingState

    @classmethod
    def of(cls, model: nn.Module, configs: dict[str, MoELoraConfig]) -> Wiring:
        """That of a base model, which gets its state and the hooks around its forward where it has none.

        Args:
            model: the base model.
            configs: those of its adapters, by name; shared with the tuner, not copied.
        """
        state: RoutingState | None = getattr(model, STATE_ATTRIBUTE, None)
        if state is None:
            state = RoutingState(configs)
            setattr(model, STATE_ATTRIBUTE, state)
            cls(model, state)._hook_forward("", [], is_root=True)
        state.configs = configs
        return cls(model, state)

    def add(self, adapter_name: str, config: MoELoraConfig) -> list[str]:
        """Give an adapter its routers, and every linear that it adapts a link to the one that serves it.

        Returns:
            Names of the linears that have a router of their own.
        """
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, MoELoraLayer) and adapter_name in layer.lora_A
        }
        found = places(self.model, layers, config.router_scope, config.own_routers)
        for name, layer in layers.items():
            place = found[name]
            router = self._router_for(layer, place)
            if adapter_name not in router.lora_router:
                router.add_adapter(adapter_name, config, like=layer.lora_A[adapter_name].weight)
            if not hasattr(layer, "link"):
                self._link(layer, name, place, config.router_scope)
            if place.owner != name and layer.link.hook is not None:
                self._let_decide(router, layer.link.hook)
        self._link_readers()
        self.state.routers = {m.name: m for m in self.model.modules() if isinstance(m, MoELoraRouter)}
        return [name for name, place in found.items() if place.owner == name]

    def _router_for(self, layer: MoELoraLayer, place: Place) -> MoELoraRouter:
        owner: Any = self.model.get_submodule(place.owner)
        if "moe_router" not in owner._modules:
            owner.moe_router = MoELoraRouter(place.owner, place.width or layer.in_features, self.state)
        return owner.moe_router

    def _link(self, layer: MoELoraLayer, name: str, place: Place, scope: str) -> None:
        hook = self._hook_block(place.block, scope) if place.block else None
        layer.link = LayerLink(name, self.state, hook, place.reads)
        if layer is self._output_layer():
            self.state.handles.append(self.model.register_forward_pre_hook(refuse_fused_loss, with_kwargs=True))

    def _output_layer(self) -> nn.Module | None:
        find = getattr(self.model, "get_output_embeddings", None)
        return find() if find is not None else None

    def _link_readers(self) -> None:
        """Tell every routed layer which others read the same tensor after it."""
        parents = (m for m in self.model.modules() if any(isinstance(child, MoELoraLayer) for child in m.children()))
        for parent in parents:
            for names in readers_of(type(parent).forward):
                children = [child for name in names if isinstance(child := getattr(parent, name, None), MoELoraLayer)]
                for i, child in enumerate(children):
                    child.link.fused_with = tuple(other for other in children[i + 1 :] if other.is_routed_like(child))

    def _hook_forward(self, owner: str, stacks: list[str], is_root: bool = False) -> None:
        module = self.model.get_submodule(owner)
        hook = ForwardHook(module, self.state, stacks, is_root)
        self.state.handles += [
            module.register_forward_pre_hook(hook.before, with_kwargs=True),
            module.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
        ]

    def _hook_block(self, block: str, scope: str) -> BlockHook:
        """The hook of a block; its stack's first block gets one too: "model" scope and attached routers read there."""
        stack = blocks.stack_of(block)
        first = blocks.first_block(self.model, stack)
        owner = stack.rpartition(".")[0]
        if owner and first not in self.state.hooks:
            self._hook_forward(owner, [stack])
        for name in dict.fromkeys((first, block)):
            if name not in self.state.hooks:
                self.state.hooks[name] = self._new_hook(name, scope)
        return self.state.hooks[block]

    def _new_hook(self, name: str, scope: str) -> BlockHook:
        module = self.model.get_submodule(name)
        decoder = blocks.decoder_blocks_of(self.model)
        hook = BlockHook(
            state=self.state,
            name=name,
            stack=blocks.stack_of(name),
            router=None,
            scope=scope,
            reads_images=blocks.reads_images(self.model, name),
            is_decoder=module in decoder,
            is_encoder_decoder=bool(decoder),
            encoder_position=encoder_argument_position(module),
        )
        hook.text_first = text_comes_first(type(module).forward)
        self.state.handles += [
            module.register_forward_pre_hook(hook.before, with_kwargs=True),
            module.register_forward_hook(hook.after, always_call=True),
        ]
        return hook

    def _let_decide(self, router: MoELoraRouter, hook: BlockHook) -> None:
        """Make the block ask the router, and in "model" scope the first of its stack, where it is asked."""
        hook.router = router
        if hook.scope == "model":
            self.state.hooks[blocks.first_block(self.model, hook.stack)].router = router
