"""A tiny random model and made-up tasks: they show that the code works, nothing else."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tasks import SPLITS, Question, Task

ROWS = {"train": 24, "validation": 4, "test": 6}
ANIMALS = ("cat", "dog", "owl", "fox")


def quick_tokenizer() -> Any:
    """A token for each character."""
    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<eos>", "<pad>", *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def quick_base() -> nn.Module:
    """Two blocks of width 32, float32, frozen."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128, max_position_embeddings=512))
    return model.requires_grad_(False)


def quick_tasks() -> list[Task]:
    """Three tasks on the same words: say the first letter, the last one, the length."""
    answers = {
        "first": lambda word: word[0],
        "last": lambda word: word[-1],
        "length": lambda word: str(len(word)),
    }
    return [
        Task(name, {split: _questions(f"{name}?", answer, ROWS[split]) for split in SPLITS})
        for name, answer in answers.items()
    ]


def _questions(definition: str, answer: Any, rows: int) -> tuple[Question, ...]:
    words = ["".join(ANIMALS[(row >> shift) % 4] for shift in (0, 2)) for row in range(rows)]
    return tuple(Question(definition, word, (answer(word),)) for word in words)
