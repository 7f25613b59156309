"""What transformers and PEFT compute with an adapter: beside its base model, or merged into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ...forward.log_probs import log_probs, with_and_without
from ...recipe import ModelOptions
from ...schema import telling_user
from ...storage.base_model import load_model, resolve_dtype
from ...storage.finding import load_mixture
from .verdict import Computed, Prompts, Rows


def run_beside(base: ModelOptions, adapter: Path, prompts: Prompts, device: torch.device) -> Computed:
    """The base model with its adapter as `PeftModel.from_pretrained` loads it."""
    adapted, without = with_and_without(load_mixture(base, adapter, device), prompts)
    return Computed(adapted, without, _dtype(base, device))


def run_merged(base: ModelOptions, adapter: Path, prompts: Prompts, device: torch.device) -> Computed:
    """The base model with the adapter merged into its weights.

    Raises:
        UserError: the adapter cannot be merged, because it weighs experts differently for each token.
    """
    model = load_mixture(base, adapter, device)
    with torch.no_grad(), model.disable_adapter():
        without = [log_probs(model, ids) for ids in prompts]
    with telling_user(f"--runtime merged: {adapter}: "):
        merged = model.merge_and_unload(safe_merge=True)
    return Computed([log_probs(merged, ids) for ids in prompts], without, _dtype(base, device))


def run_model(base: ModelOptions, folder: str, prompts: Prompts, device: torch.device) -> Computed:
    """A whole model that has an adapter merged into it, and the base model by itself, one after the other."""
    merged = replace(base, name=folder, gguf_file=None)
    adapted, without = (_run_alone(options, prompts, device) for options in (merged, base))
    return Computed(adapted, without, _dtype(base, device))


def _run_alone(options: ModelOptions, prompts: Prompts, device: torch.device) -> Rows:
    model = load_model(options, device).to(device).eval()
    return [log_probs(model, ids) for ids in prompts]


def _dtype(base: ModelOptions, device: torch.device) -> str:
    return str(resolve_dtype(base, device)).removeprefix("torch.")
