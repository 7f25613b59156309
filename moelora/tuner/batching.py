"""transformers' continuous batching of a mixture: it gives what `generate` gives each prompt alone, or is refused."""

from __future__ import annotations

from typing import Any

import torch

from ..forward.packed_requests import PROBED
from . import blocks

_NO_WEIGHTS = (
    "`routing_weights` cannot be given to `generate_batch`, which packs the tokens of all prompts into one row: call "
    "`generate`, or use a mixture with fixed weights (`set_routing_weights`)"
)
_NO_OFFLOADING = (
    "`cpu_offload_space` is {space}, but this mixture has a domain classifier, and what that keeps of a text would not "
    "move to the CPU with the text's keys: set it to 0, and a request that has to wait is read again"
)


class ContinuousBatching:
    """Mixed into [`MixturePeftModel`]: the three ways into continuous batching, each checked before it begins.

    What they do and return is the base model's; all that is different is that prompts which are read in one row are
    routed as if each were alone. Its forwards are not counted in `routing_stats`.

    Raises:
        ValueError: `routing_weights` are given, the attached router reads more than one token at a time, or the cache
            would be moved to the CPU under a domain classifier.
    """

    base_model: Any
    get_base_model: Any

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers, and [`ContinuousBatching`]."""
        return self._batching("generate_batch", args, kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers, and [`ContinuousBatching`]."""
        return self._batching("init_continuous_batching", args, kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers, and [`ContinuousBatching`]."""
        return self._batching("continuous_batching_context_manager", args, kwargs)

    def _batching(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.pop("routing_weights", None) is not None:
            raise ValueError(_NO_WEIGHTS)
        self._check_router()
        for value in (*args, *kwargs.values()):
            self._check_offloading(value)
        self.base_model.note_roll_out()
        return getattr(self.get_base_model(), name)(*args, **kwargs)

    def _check_router(self) -> None:
        state = self.base_model.routing_or_none
        if state is None or state.attached is None or not state.enabled:
            return
        base = self.get_base_model()
        width = blocks.hidden_size(base, next(iter(state.hooks)))
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, PROBED, width, generator=generator)
        state.check_packable(hidden.to(base.device, base.dtype))

    def _check_offloading(self, value: Any) -> None:
        """Value may be a configuration of continuous batching, or one of generation, which may hold such a one."""
        value = getattr(value, "continuous_batching_config", None) or value
        space = getattr(value, "cpu_offload_space", None)
        state = self.base_model.routing_or_none
        if space and state is not None and any(router.routes_by_domain for router in state.routers.values()):
            raise ValueError(_NO_OFFLOADING.format(space=space))
