"""Weights that accelerate keeps on the CPU or on disk, and brings for the forward of the very module that holds them.

Routers and factors are read by whoever multiplies with them, and their modules' own forward is not called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

from torch import nn

_HOOK = "_hf_hook"  # where accelerate's add_hook_to_module leaves it
_AT_HAND = nullcontext()


def loaded(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Within, the weights of these modules are where they are computed with."""
    hooked = [module for module in modules if _HOOK in module.__dict__]
    return _loaded(hooked) if hooked else _AT_HAND


@contextmanager
def _loaded(modules: Sequence[Any]) -> Iterator[None]:
    for module in modules:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            module._hf_hook.post_forward(module, None)


def with_routers_loaded(method: Callable) -> Callable:
    """A method of [`MoELoraRouter`] that reads its adapters' routers."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        routers = self._modules["lora_router"]._modules.values()
        if not any(_HOOK in router.__dict__ for router in routers):
            return method(self, *args, **kwargs)
        with loaded(self.active_routers()):
            return method(self, *args, **kwargs)

    return call
