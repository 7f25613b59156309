"""Tiny random models under the hub names that PEFT's tests load, laid out as a hub cache so that nothing is patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT = {"hidden_size": 16, "ffn_dim": 4, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_GEMMA = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_MIXTURE = {**_GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_STANDINS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", {**_OPT, "num_hidden_layers": 5}),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _SIZES),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_SIZES, "num_labels": 1},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", _MIXTURE),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {**_MIXTURE, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    ),
    "bert-base-uncased": ("BertForSequenceClassification", _SIZES),
}


def build_hub_cache(cache: Path) -> None:
    """Write every stand-in to cache, a directory for HF_HUB_CACHE."""
    transformers.utils.logging.disable_progress_bar()
    for model_id, (architecture, sizes) in _STANDINS.items():
        model_cls: type[PreTrainedModel] = getattr(transformers, architecture)
        torch.manual_seed(0)
        vocab_size = 100 if "bert" in architecture.lower() else 1000
        model = model_cls(model_cls.config_class(vocab_size=vocab_size, **_TOKENS, **sizes))
        repository = cache / f"models--{model_id.replace('/', '--')}"
        revision = "0" * 40
        model.save_pretrained(repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
