"""A model, a tokenizer and domains small enough to train in a test, all made on the spot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moelora import MoELoraConfig
from moelora.training import RecipeError, load_recipe

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the end of a text; no padding token, like Llama's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_tiny_model(folder: Path, *, chat: bool = True, hidden_size: int = 32, max_length: int = 64) -> Path:
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counting(count: int) -> list[dict[str, str]]:
    return [{"text": f"{number} plus one is {number + 1}"} for number in range(count)]


def shouting(count: int) -> list[dict[str, str]]:
    return [{"text": f"HELLO NUMBER {number}! HOW ARE YOU?"} for number in range(count)]


def tiny_recipe(folder: Path) -> dict[str, Any]:
    """A valid recipe of two domains, its model and data written beside it."""
    save_tiny_model(folder / "model")
    write_jsonl(folder / "counting.jsonl", counting(40))
    write_jsonl(folder / "shouting.jsonl", shouting(40))
    return {
        "model": {"name": "model"},
        "data": [
            {"name": "counting", "path": "counting.jsonl"},
            {"name": "shouting", "path": "shouting.jsonl", "weight": 2},
        ],
        "block_size": 32,
        "mixture": {"r": 2, "num_experts": 3, "top_k_experts": 1},
        "training": {
            "output_dir": "out",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "save_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


DATA = ["--data", "counting=counting.jsonl", "--data", "shouting=shouting.jsonl"]
"""The domains of [`save_tiny_adapter`] as the options of a command."""


def save_tiny_adapter(folder: Path, **options: Any) -> None:
    """A folder with a base model, an adapter of four random experts on it, and two domains of text."""
    base = LlamaForCausalLM.from_pretrained(save_tiny_model(folder / "model"))
    fields = {"r": 2, "target_modules": "all-linear", "num_experts": 4, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, MoELoraConfig(**(fields | options)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "adapter")
    write_jsonl(folder / "counting.jsonl", counting(10))
    write_jsonl(folder / "shouting.jsonl", shouting(10))


def problems(folder, recipe, *overrides, **options):
    """The problems of a recipe as {key: fix}, and a check that the message holds them all."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(folder, recipe), overrides, **options)
    for problem in caught.value.problems:
        assert problem.key in str(caught.value)
        assert problem.fix in str(caught.value)
    return {problem.key: problem.fix for problem in caught.value.problems}
