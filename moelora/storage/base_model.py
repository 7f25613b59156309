"""The frozen base model of a job: check it without its weights, then load it and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import MoELoraConfig
from ..recipe import ModelOptions
from ..schema import Problem, culprit, did_you_mean, shorten

NEEDED = {
    "config.json": ("config.json",),
    "weights": ("*.safetensors", "pytorch_model*.bin"),
    "tokenizer": ("tokenizer*", "vocab*", "*.model"),
}
"""What a folder must hold to be a model, as patterns of which one must match."""


def check_model(model: ModelOptions, block_size: int | None, mixture: dict[str, Any] | None) -> list[Problem]:
    """Say what is wrong with a model, reading its configuration but not its weights.

    Args:
        model: the model section.
        block_size: the recipe's block size, or None where that is wrong already.
        mixture: fields of `MoELoraConfig`, or None where those are wrong already.
    """
    found = _check_files(model)
    if found:
        return found
    try:
        config = load_config(model)
        empty = empty_model(config)
    except Exception as error:
        reason = shorten(str(error).strip().partition("\n")[0], 200)
        where = "" if Path(model.name).is_dir() else "no folder of that name, and from the hub "
        fix = f"{where}not a causal language model that transformers reads: {reason}"
        return [Problem("model.name", model.name, fix)]
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if block_size is not None and longest is not None and block_size > longest:
        found.append(Problem("block_size", block_size, f"the model reads at most {longest} tokens; lower it"))
    return found + (_check_mixture(empty, mixture) if mixture is not None else [])


def _check_files(model: ModelOptions) -> list[Problem]:
    folder = Path(model.name)
    if not folder.is_absolute():
        return _check_hub_id(model.name)
    if not folder.is_dir():
        fix = "no such folder; give a folder, relative to the recipe, or a hub id"
        return [Problem("model.name", model.name, fix)]
    if model.gguf_file is not None:
        there = (folder / model.gguf_file).is_file()
        others = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        fix = f"no such file in {folder}; GGUF files there: {others}"
        return [] if there else [Problem("model.gguf_file", model.gguf_file, fix)]
    lacking = [name for name, patterns in NEEDED.items() if not any(any(folder.glob(pattern)) for pattern in patterns)]
    if not lacking:
        return []
    hint = "; to read a GGUF file, set `model.gguf_file`" if any(folder.glob("*.gguf")) else ""
    return [Problem("model.name", model.name, f"not a model: the folder lacks {', '.join(lacking)}{hint}")]


def _check_hub_id(name: str) -> list[Problem]:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [Problem("model.name", name, f"neither a folder next to the recipe nor a hub id: {error}")]
    return []


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights: its modules and their shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _check_mixture(empty: PreTrainedModel, mixture: dict[str, Any]) -> list[Problem]:
    """Inject the mixture into a model without weights, which finds target modules that do not exist."""
    known = [name for name, _ in empty.named_modules()]
    # PEFT passes over these without a word.
    if lost := [name for name in mixture.get("modules_to_save") or [] if not any(key.endswith(name) for key in known)]:
        near = did_you_mean(lost[0], {name.rpartition(".")[2] for name in known})
        return [Problem("mixture.modules_to_save", lost, f"the model has no module of that name{near}")]
    try:
        with torch.device("meta"):
            get_peft_model(empty, MoELoraConfig(**mixture))
    except Exception as error:  # PEFT takes what it is given for what it should be
        reason = str(error) if isinstance(error, (ValueError, NotImplementedError)) else repr(error)
        name = culprit(reason, mixture) or "target_modules"
        return [Problem(f"mixture.{name}", mixture[name], shorten(reason, 400))]
    return []


def load_config(model: ModelOptions) -> PretrainedConfig:
    return AutoConfig.from_pretrained(model.name, **_gguf(model))


def load_tokenizer(model: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token and padding on the right, as training wants it."""
    tokenizer = AutoTokenizer.from_pretrained(model.name, **_gguf(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(model: ModelOptions, device: torch.device) -> PreTrainedModel:
    """The model's weights, in the precision for `device` but not yet on it."""
    loaded = AutoModelForCausalLM.from_pretrained(model.name, dtype=resolve_dtype(model, device), **_gguf(model))
    if model.gguf_file is not None:
        # GGUF weights are unpacked on loading, yet stay marked as quantised: marked models refuse to train and to save.
        del loaded.config.quantization_config
        loaded.hf_quantizer = None
        loaded.is_quantized = False
    return loaded


def resolve_dtype(model: ModelOptions, device: torch.device) -> torch.dtype:
    if model.dtype == "auto":
        # Most CPUs have no bfloat16 units: there it is tens of times slower than float32.
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, model.dtype)


def _gguf(model: ModelOptions) -> dict[str, str]:
    return {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
