"""Where routers go: which block a module lies in, and which targets a scope can serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..ops.native import is_native
from ._peft import BaseTunerLayer

_NOT_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.modules.batchnorm._BatchNorm)


def find_block(model: nn.Module, module_name: str) -> str | None:
    """Name of the transformer block that a module lies in; None if it lies in none.

    That is the nearest ancestor that transformers checkpoints as a layer, or whose class diffusers lists among the
    model's repeated blocks; where it lists none, and in models of other libraries, the outermost member of an
    `nn.ModuleList`.
    """
    parts = module_name.split(".")
    ancestors = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    if repeated := getattr(model, "_repeated_blocks", None):
        return next((name for name in ancestors if type(model.get_submodule(name)).__name__ in repeated), None)
    for name in ancestors:
        if isinstance(model.get_submodule(name), GradientCheckpointingLayer):
            return name
    for name in reversed(ancestors):
        parent = name.rpartition(".")[0]
        if parent and isinstance(model.get_submodule(parent), nn.ModuleList):
            return name
    return None


def reads_another_width(model: nn.Module, module_name: str) -> bool:
    """Whether a linear reads a text of another width than its block's, as diffusers' cross-attention may.

    No router of the block can read that, so it has one of its own.
    """
    parent, _, name = module_name.rpartition(".")
    attention: Any = model.get_submodule(parent)
    width = getattr(attention, "cross_attention_dim", None)
    return name in ("to_k", "to_v") and width is not None and width != getattr(attention, "query_dim", width)


def stack_of(block_name: str) -> str:
    """Name of the list that a block belongs to: "model.layers" for "model.layers.3"."""
    return block_name.rpartition(".")[0]


def first_block(model: nn.Module, stack: str) -> str:
    """Name of the first block of a stack."""
    return f"{stack}.{next(name for name, _ in model.get_submodule(stack).named_children())}"


def hidden_size(model: nn.Module, block_name: str) -> int:
    """H, the width of the hidden states entering a block: by a configuration, else by what the block begins with."""
    name = block_name
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
        if not name:
            break
        name = name.rpartition(".")[0]
    modules: list[Any] = list(model.get_submodule(block_name).modules())
    for module in modules:  # the first normalises what enters; norms of heads come later
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.LayerNorm):  # which may have no weight
            return module.normalized_shape[-1]
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            return weight.shape[-1]
    return next(module.in_features for module in modules if hasattr(module, "in_features"))


def decoder_blocks_of(model: Any) -> set[nn.Module]:
    """Every module outside the encoder of an encoder-decoder model; empty for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    encoder = model.get_encoder()
    return set(model.modules()) - set(encoder.modules())


def check_targets(model: nn.Module, module_names: list[str], scope: str) -> None:
    """Refuse targets that cannot be routed.

    Raises:
        ValueError: the message names the module and the scope to use, or says to leave it out.
    """
    for name in module_names:
        module: Any = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, _NOT_LINEAR) or not _is_linear(base):
            raise ValueError(
                f"`{name}` is a {type(base).__name__}, which a mixture cannot route: only linear layers and native "
                "experts have one input vector per token; leave it out of `target_modules` or add it to "
                "`exclude_modules`"
            )
        if scope == "block" and find_block(model, name) is None:
            raise ValueError(
                f'`{name}` lies outside every transformer block, so router_scope="block" has no router for it; use '
                'router_scope="module", or leave it out with `exclude_modules`'
            )
    if scope == "model" and module_names and not any(find_block(model, name) for name in module_names):
        raise ValueError(
            f'router_scope="model" routes on what enters the first transformer block, and none of the targets '
            f'({", ".join(module_names[:3])}) lies in one; use router_scope="module"'
        )


def check_one_width(model: nn.Module, module_names: list[str]) -> None:
    """Refuse blocks that one router cannot serve.

    Raises:
        ValueError: hidden states of several widths enter them, as in a UNet.
    """
    names = {block for name in module_names if (block := find_block(model, name))}
    widths = sorted({hidden_size(model, name) for name in names})
    if len(widths) > 1:
        raise ValueError(
            f'router_scope="model" has one router for all blocks, which hidden states of widths '
            f'{", ".join(map(str, widths))} enter; use router_scope="block"'
        )


def _is_linear(base: nn.Module) -> bool:
    """Whether it makes one vector of one vector: a linear, or native experts."""
    return isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "in_features") or is_native(base)
