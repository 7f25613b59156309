"""Where routers go: which block a module lies in, and which targets a scope can serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ._peft import BaseTunerLayer

_NOT_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.modules.batchnorm._BatchNorm)


def find_block(model: nn.Module, module_name: str) -> str | None:
    """Name of the transformer block that a module lies in; None if it lies in none.

    That is the nearest ancestor that transformers checkpoints as a layer, else the outermost member of an
    `nn.ModuleList` (models of other libraries).
    """
    parts = module_name.split(".")
    ancestors = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    for name in ancestors:
        if isinstance(model.get_submodule(name), GradientCheckpointingLayer):
            return name
    for name in reversed(ancestors):
        parent = name.rpartition(".")[0]
        if parent and isinstance(model.get_submodule(parent), nn.ModuleList):
            return name
    return None


def check_forwards(model: nn.Module) -> None:
    """Refuse a model that computes with forwards of Unsloth's, which take a LoRA's factors from its layers.

    Its decoding multiplies by whatever factors a LoRA layer holds: by those of all experts, unweighted, without calling
    the layers or the routers. Output would be wrong, and nothing would say so.

    Raises:
        ValueError: naming the first such module.
    """
    for name, module in model.named_modules():
        source = getattr(module.forward, "__module__", None) or ""
        if source.startswith("unsloth"):
            raise ValueError(
                f"`{name or type(module).__name__}` computes by `{source}`: Unsloth's decoding adds all experts, "
                "unweighted. Load the model with transformers' `from_pretrained`, in a process that does not import "
                "unsloth, and train with `use_liger_kernel=True` (docs/tools.md)"
            )


def stack_of(block_name: str) -> str:
    """Name of the list that a block belongs to: "model.layers" for "model.layers.3"."""
    return block_name.rpartition(".")[0]


def first_block(model: nn.Module, stack: str) -> str:
    """Name of the first block of a stack."""
    return f"{stack}.{next(name for name, _ in model.get_submodule(stack).named_children())}"


def hidden_size(model: nn.Module, block_name: str) -> int:
    """H, the width of the hidden states entering a block.

    Raises:
        ValueError: neither a configuration nor a normalisation layer tells.
    """
    name = block_name
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
        if not name:
            break
        name = name.rpartition(".")[0]
    for module in model.get_submodule(block_name).modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            return weight.shape[-1]
    raise ValueError(
        f"cannot tell the width of the hidden states entering `{block_name}`: the model has no `config.hidden_size`; "
        'use router_scope="module"'
    )


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
                f"`{name}` is a {type(base).__name__}, which a mixture cannot route: only linear layers have one input "
                "vector per token; leave it out of `target_modules` or add it to `exclude_modules`"
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


def _is_linear(base: nn.Module) -> bool:
    return isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "in_features")
