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

Functions = Mapping[str, Callable[..., None]]
"""What puts the kernels into a model, by `model_type`: Liger's own table."""

FUSED_LOSS = "fused_linear_cross_entropy"


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
    """The recipe with `use_liger_kernel` as it says, else on where the kernels can work; and what is wrong with it.

    Args:
        recipe: without problems otherwise.
    """
    asked = recipe.training.get("use_liger_kernel")
    if asked is False:
        return recipe, []
    config = recipe.training.get("liger_kernel_config") or {}
    try:
        functions = liger_functions(TrainingArguments(**recipe.training).device)
        apply = _function_for(recipe, functions, uses_fused_loss=config.get(FUSED_LOSS, True))
    except (ImportError, ValueError) as error:
        problems = [Problem("training.use_liger_kernel", asked, str(error))] if asked else []
        return _with(recipe, bool(asked)), problems
    return _with(recipe, True), _check_config(config, apply)


def _with(recipe: Recipe, use: bool) -> Recipe:
    return dataclasses.replace(recipe, training=recipe.training | {"use_liger_kernel": use})


def _function_for(recipe: Recipe, functions: Functions, uses_fused_loss: bool) -> Callable[..., None]:
    """The function for the recipe's model.

    Raises:
        ValueError: Liger does not know the model's type, or its loss would pass over what the mixture does.
    """
    model = empty_model(load_config(recipe.model))
    kind = model.config.model_type
    if kind not in functions:
        types = ", ".join(sorted(functions))
        raise ValueError(f"Liger has no kernels for models of type {kind}, only for {types}; drop it")
    if uses_fused_loss and _adapts_output_layer(model, recipe.mixture):
        raise ValueError(
            "Liger's loss reads the output layer's frozen weight, and the mixture adapts that layer; exclude it "
            f"(`mixture.exclude_modules`), or set training.liger_kernel_config.{FUSED_LOSS} to false"
        )
    return functions[kind]


def _adapts_output_layer(empty: PreTrainedModel, mixture: Mapping[str, Any]) -> bool:
    with torch.device("meta"):
        get_peft_model(empty, MoELoraConfig(**mixture))
    return isinstance(empty.get_output_embeddings(), BaseTunerLayer)


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
