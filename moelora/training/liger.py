"""Liger's kernels for what is frozen around the mixture: norms, activations, rotary embeddings, the loss.

The Trainer puts them in place (`use_liger_kernel`), and says nothing where they cannot work: that is said here, before.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import is_liger_kernel_available

from ..config import MoELoraConfig
from ..recipe import Recipe
from ..schema import Problem, did_you_mean
from ..storage.base_model import empty_model, load_config
from ..tuner._peft import BaseTunerLayer
from ..tuner.native import has_native_adapters
from .engines import shards_parameters

Functions = Mapping[str, Callable[..., None]]
"""What puts the kernels into a model, by `model_type`: Liger's own table."""

FUSED_LOSS = "fused_linear_cross_entropy"
GATED_PRODUCTS = "swiglu"


def liger_functions(device: torch.device) -> Functions:
    """Liger's functions, where they are installed and run.

    Raises:
        ImportError: liger-kernel is not installed, or cannot be imported.
        ValueError: no kernels run on this device.
    """
    if not is_liger_kernel_available():
        raise ImportError("needs the package liger-kernel: pip install liger-kernel")
    if device.type in ("cpu", "mps"):
        raise ValueError(f"its kernels need a GPU that Triton knows, and this training runs on {device.type}; drop it")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def settle_liger(recipe: Recipe) -> tuple[Recipe, list[Problem]]:
    """The recipe with `use_liger_kernel` as it says, else on where the kernels work; and what is wrong with it.

    A kernel that does not work there, and that the recipe does not ask for, is switched off.

    Args:
        recipe: without problems otherwise.
    """
    asked = recipe.training.get("use_liger_kernel")
    if asked is False:
        return recipe, []
    arguments = TrainingArguments(**recipe.training)
    try:
        functions = liger_functions(arguments.device)
        model = empty_model(load_config(recipe.model))
        apply = _function_for(model.config.model_type, functions)
    except (ImportError, ValueError) as error:
        problems = [Problem("training.use_liger_kernel", True, str(error))] if asked else []
        return _with(recipe, use_liger_kernel=bool(asked)), problems
    config = recipe.training.get("liger_kernel_config") or {}
    problems = _check_config(config, apply)
    known = inspect.signature(apply).parameters
    for kernel, obstacle in _obstacles(model, recipe, arguments).items():
        if kernel in known:
            if config.get(kernel):
                problems.append(Problem(f"training.liger_kernel_config.{kernel}", True, obstacle))
            config = config | {kernel: False}
    return _with(recipe, use_liger_kernel=True, liger_kernel_config=config or None), problems


def _with(recipe: Recipe, **training: Any) -> Recipe:
    return dataclasses.replace(recipe, training=recipe.training | training)


def _function_for(kind: str, functions: Functions) -> Callable[..., None]:
    """Raises ValueError where Liger does not know the model's type."""
    if kind not in functions:
        types = ", ".join(sorted(functions))
        raise ValueError(f"Liger has no kernels for models of type {kind}, only for {types}; drop it")
    return functions[kind]


def _obstacles(model: PreTrainedModel, recipe: Recipe, arguments: TrainingArguments) -> dict[str, str]:
    """Why kernels cannot be used: the fused loss multiplies by the output layer's weight itself, and does not call the
    layer; that of gated products takes the place of native experts, too.

    Args:
        model: without weights; it gets the mixture.
    """
    with torch.device("meta"):
        get_peft_model(model, MoELoraConfig(**recipe.mixture))
    found = {}
    if shards_parameters(arguments):
        found[FUSED_LOSS] = (
            "reads the output layer's weight, of which FSDP and ZeRO-3 leave each process a part; drop it"
        )
    elif isinstance(model.get_output_embeddings(), BaseTunerLayer):
        found[FUSED_LOSS] = (
            "reads the output layer's frozen weight, past the mixture on it; drop it, or exclude that layer"
        )
    if has_native_adapters(model):
        found[GATED_PRODUCTS] = (
            "computes native experts as they are without adapters; drop it, or exclude native experts "
            r"(mixture.exclude_modules: '.*\.(experts|gate)\b.*')"
        )
    return found


def _check_config(config: Mapping[str, bool], apply: Callable[..., None]) -> list[Problem]:
    """What Liger would pass over without a word, or fail on once the model is loaded."""
    key, known = "training.liger_kernel_config", inspect.signature(apply).parameters.keys() - {"model"}
    problems = [
        Problem(f"{key}.{name}", config[name], f"no kernel of this model's{did_you_mean(name, known)}")
        for name in config.keys() - known
    ]
    if config.get("cross_entropy") and config.get(FUSED_LOSS, True):
        problems.append(Problem(f"{key}.cross_entropy", True, f"excludes the fused loss; set {FUSED_LOSS} to false"))
    return problems
