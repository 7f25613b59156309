"""The module tree: which block a module lies in, what enters it, and which targets a mixture can serve."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..forward.hooks import encoder_argument_position
from ..ops.native import is_native
from ._peft import BaseTunerLayer

_CONTAINERS = (nn.ModuleList, nn.Sequential)  # stages of blocks: not called, or calling all that is in them in turn
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
        is_member = bool(parent) and isinstance(model.get_submodule(parent), nn.ModuleList)
        if is_member and not isinstance(model.get_submodule(name), _CONTAINERS):
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


def has_cross_attention(model: nn.Module, block_name: str) -> bool:
    """Whether a block can attend to what an encoder read."""
    return encoder_argument_position(model.get_submodule(block_name)) is not None


def is_native_expert(module_name: str, block_name: str) -> bool:
    """Whether a module of a block belongs to the model's own experts, each of which sees some of the tokens."""
    return "experts" in module_name.removeprefix(block_name).split(".")[:-1]


def reads_images(model: nn.Module, block_name: str) -> bool:
    """Whether a block belongs to an image tower, whose tokens no mask of a text tells of."""
    name = block_name
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            takes = inspect.signature(type(module).forward).parameters
            takes_images = "grid_thw" in takes or any(name.startswith("pixel_values") for name in takes)
            return takes_images and not {"input_ids", "inputs_embeds", "attention_mask"} & set(takes)
    return False


def check_targets(model: nn.Module, module_names: list[str]) -> None:
    """Refuse targets that cannot be routed.

    Raises:
        ValueError: the message names the module, and says to leave it out.
    """
    for name in module_names:
        module: Any = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, _NOT_LINEAR) or not is_linear(base):
            raise ValueError(
                f"`{name}` is a {type(base).__name__}, which a mixture cannot route: only linear layers and native "
                "experts have one input vector per token; leave it out of `target_modules` or add it to "
                "`exclude_modules`"
            )


def is_linear(base: nn.Module) -> bool:
    """Whether it makes one vector of one vector: a linear, or native experts."""
    return isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "in_features") or is_native(base)
