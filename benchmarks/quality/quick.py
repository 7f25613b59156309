"""A tiny random model and made-up data: they show that the code works, nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .data import IGNORED, SPLITS, Examples, Suite

VOCABULARY = 64
LENGTH = 16
ROWS = {"train": 32, "validation": 8, "test": 8}


def quick_base() -> nn.Module:
    """Two blocks of width 32, float32."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=LENGTH))


def quick_data(suite: str) -> Suite:
    """Three domains: numbers that count up by 1, 2 and 3; in "tasks" the last two tokens are the answer."""
    generator = np.random.default_rng(0)
    return {f"by-{step}": {s: _examples(generator, step, ROWS[s], suite) for s in SPLITS} for step in (1, 2, 3)}


def _examples(generator: np.random.Generator, step: int, rows: int, suite: str) -> Examples:
    starts = generator.integers(0, VOCABULARY, size=(rows, 1))
    ids = (starts + step * np.arange(LENGTH)) % VOCABULARY
    if suite == "lm":
        return Examples(ids, ids)
    length = LENGTH - step  # padded on the right
    positions = np.arange(LENGTH)
    mask = np.broadcast_to(positions < length, ids.shape)
    labels = np.where(mask & (positions >= length - 2), ids, IGNORED)
    choices = tuple(range(VOCABULARY)) if step == 1 else ()
    return Examples(ids, labels, np.ascontiguousarray(mask), choices)
