"""Taking a mixture off a base model: routers, hooks and the state that they share."""

from __future__ import annotations

from typing import Any

from torch import nn

from .checkpointing import make_checkpoint_plain

STATE_ATTRIBUTE = "_moelora_state"  # on the base model, which outlives tuners (transformers and diffusers discard them)


def remove_routing(model: nn.Module) -> None:
    """Leave nothing of ours on a base model whose layers are its own again."""
    state: Any = model.__dict__.pop(STATE_ATTRIBUTE, None)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    for module in list(model.modules()):
        module._modules.pop("moe_router", None)
        make_checkpoint_plain(module)
