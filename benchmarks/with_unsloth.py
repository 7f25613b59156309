"""A base model as Unsloth loads and adapts it. Only for a process that imported `unsloth` before anything else."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from .arms import ATTENTION, FEED_FORWARD, fill_factors
from .models import build_base
from .options import mixture_of


def adapted_model(args: argparse.Namespace, length: int) -> nn.Module:
    """Unsloth's LoRA of the active rank, on a model of the preset's shape, in Unsloth's own settings.

    Args:
        length: tokens of the longest sequence; Unsloth cuts longer ones.
    """
    from unsloth import FastLanguageModel

    rank = mixture_of(args).active_rank
    with tempfile.TemporaryDirectory() as folder:
        save_base(args, Path(folder))
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, dtype=getattr(torch, args.dtype), load_in_4bit=False
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[*ATTENTION, *FEED_FORWARD],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
    )
    fill_factors(model)
    return model


def train(model: nn.Module, is_checkpointed: bool) -> None:
    """Ready to train, with Unsloth's gradient checkpointing or without any."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model, use_gradient_checkpointing="unsloth" if is_checkpointed else False)


def generate(model: nn.Module) -> None:
    """Ready to generate."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)


def save_base(args: argparse.Namespace, folder: Path) -> None:
    """Random weights with a tokenizer that is never asked for tokens, as a user's folder would hold them."""
    build_base(args).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unknown>", "<begin>", "<end>", "<padding>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    special = {"unk_token": "<unknown>", "bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<padding>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
