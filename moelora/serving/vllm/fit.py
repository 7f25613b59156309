"""Whether a mixture fits the model that vLLM serves: every factor has its linear, and the linear its size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from ...storage.base_model import empty_model
from ...storage.mixture_files import misfit
from ..mixture import ServedMixture
from .contract import HEAD


def empty_base(model_config: Any) -> nn.Module:
    """The base without its weights, as transformers builds it from the configuration that vLLM has read."""
    config = copy.deepcopy(model_config.hf_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes are those of the model before it was quantised
    return empty_model(config)


def check_base(served: ServedMixture, base: nn.Module, name: str) -> None:
    """Compare the factors with the linears of the base.

    Raises:
        ValueError: the mixture was trained on another model.
    """
    shapes = {name: (B.shape[0], A.shape[1]) for name, (A, B) in served.factors.items()}
    if problem := misfit(shapes, base):
        raise ValueError(f"it was not trained on {name}: {problem}. Serve its base model, or train it on this")


def check_targets(served: ServedMixture, manager: Any, renamed: Callable[[str], str]) -> None:
    """See that vLLM applies every factor: it passes over those that it has no LoRA layer for.

    Raises:
        ValueError: a linear of the mixture is served without a LoRA layer.
    """
    is_whole = manager.routing.config.parallel_config.pipeline_parallel_size == 1
    applied = {one for name in manager.modules for one in manager.packed_modules.get(name, [name])}
    blocks = manager.routing.blocks
    for module in served.factors:
        name = renamed(module)
        is_elsewhere = not is_whole and not any(name.startswith(f"{block}.") for block in blocks)
        if name not in applied and not is_elsewhere:
            raise ValueError(
                f"vLLM has no LoRA layer for `{module}`; serve with --lora-target-modules that include "
                f"`{module.rpartition('.')[2]}`, or train without it"
            )
        if served.routers and name.rpartition(".")[2] == HEAD:
            raise ValueError(f"`{module}` is computed where nothing weighs ranks; train without it")
        is_routed = bool(served.routers) and served.scope != "module"
        if is_routed and not is_elsewhere and not any(name.startswith(f"{block}.") for block in blocks):
            raise ValueError(
                f'`{module}` is in no block, where nothing routes; train without it, or router_scope="module"'
            )
