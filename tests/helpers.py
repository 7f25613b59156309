"""Tiny models of every architecture under test, and mixtures on them; float32, made from configurations, no network."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from moelora import MoELoraConfig
from moelora.forward.checkpointing import RoutedCheckpoint

VOCAB = 64
HIDDEN = 32
PAD = 0
SCOPES = ("block", "model", "module")
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**overrides: Any) -> LlamaForCausalLM:
    options = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return _build(LlamaForCausalLM, LlamaConfig(**(options | overrides)))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return _build(GPT2LMHeadModel, config)


def opt() -> OPTForCausalLM:
    """fc1 and fc2 see their tokens flattened to two dimensions."""
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return _build(OPTForCausalLM, config)


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=PAD,
        num_labels=3,
    )  # fmt: skip


def bert() -> BertForMaskedLM:
    return _build(BertForMaskedLM, _bert_config())


def bert_classifier() -> BertForSequenceClassification:
    return _build(BertForSequenceClassification, _bert_config())


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=PAD, decoder_start_token_id=PAD, eos_token_id=None,
    )  # fmt: skip
    return _build(T5ForConditionalGeneration, config)


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return _build(BartForConditionalGeneration, config)


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8,
        patch_size=4, num_channels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return _build(ViTForImageClassification, config)


class MLP(nn.Module):
    """No configuration, no blocks: two linears that only router_scope="module" can serve."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def mlp() -> MLP:
    return _build(MLP)


def _build(cls: Callable, *args: Any) -> Any:
    torch.manual_seed(0)
    model = cls(*args)
    for parameter in model.parameters():  # transformers starts at 0.02, where a wrong residual stream hides in rounding
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@dataclass(frozen=True)
class Architecture:
    """A builder with its targets and a batch; `mask` names its padding mask, `is_causal` says generate works alone."""

    name: str
    build: Callable[[], nn.Module]
    targets: list[str]
    task_type: str | None
    mask: str | None = "attention_mask"
    is_causal: bool = False
    is_encoder_decoder: bool = False
    num_routers: int = 2  # in "block" scope

    def batch(self, batch: int = 3, length: int = 7, labels: bool = True, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.name == "vit":
            inputs = {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
            return inputs | ({"labels": torch.arange(batch) % 3} if labels else {})
        ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
        inputs = {"input_ids": ids}
        if self.is_encoder_decoder:
            targets = torch.randint(2, VOCAB, (batch, length - 2), generator=generator)
            return inputs | ({"labels": targets} if labels else {"decoder_input_ids": targets})
        return inputs | ({"labels": ids.clone()} if labels else {})


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", llama, LLAMA_TARGETS, "CAUSAL_LM", is_causal=True),
        Architecture("gpt2", gpt2, ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM", is_causal=True),
        Architecture("opt", opt, ["q_proj", "v_proj", "out_proj", "fc1", "fc2"], "CAUSAL_LM", is_causal=True),
        Architecture("bert", bert, ["query", "key", "value", "attention.output.dense", "intermediate.dense"], None),
        Architecture(
            "t5", t5, ["q", "k", "v", "o", "wi", "wo"], "SEQ_2_SEQ_LM", is_encoder_decoder=True, num_routers=4
        ),
        Architecture(
            "bart",
            bart,
            ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
            "SEQ_2_SEQ_LM",
            is_encoder_decoder=True,
            num_routers=4,
        ),
        Architecture("vit", vit, ["q_proj", "k_proj", "v_proj", "fc1", "fc2"], None, mask=None),
    )
}
IN_SCOPES = [
    *((name, "block") for name in ARCHITECTURES),
    *((name, scope) for name in ("llama", "t5") for scope in ("model", "module")),
    *(("gpt2", "model"), ("opt", "module"), ("bart", "model"), ("vit", "module")),
]
"""Some pairs of architecture and scope in place of all: each architecture in "block" scope, other scopes on a few."""
CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.is_causal]
ENCODER_DECODER = [name for name, architecture in ARCHITECTURES.items() if architecture.is_encoder_decoder]


def every_pair(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by rows of the axes' product in which any two values of two axes meet, not by the whole product.

    Args:
        axes: the values of each parameter, by its name.
    """
    rows = list(itertools.product(*axes.values()))
    pairs = [set(itertools.combinations(enumerate(map(_told_apart, row)), 2)) for row in rows]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.append(rows[best])
    return pytest.mark.parametrize(tuple(axes), chosen, ids=_told_apart)


def _told_apart(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def config_for(architecture: Architecture, **overrides: Any) -> MoELoraConfig:
    options = {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": architecture.targets,
        "num_experts": 4,
        "top_k_experts": 2,
        "task_type": architecture.task_type,
        "router_type": "learned",
    }
    return MoELoraConfig(**(options | overrides))


def mixture_of(
    name: str, *, base: nn.Module | None = None, fresh: bool = False, experts: bool = False, **overrides: Any
) -> Any:
    """A PeftModel of an architecture by name, in eval mode.

    Args:
        base: a model of that architecture in place of the usual one.
        fresh: leave B at zero; otherwise experts and routers are random and far apart.
        experts: build expert by expert.
    """
    architecture = ARCHITECTURES[name]
    config = config_for(architecture, **overrides)
    torch.manual_seed(1)
    base = architecture.build() if base is None else base
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        if experts:
            model = get_peft_model(base, config, adapter_name="expert_0")
            for i in range(1, config.num_experts):
                model.add_adapter(f"expert_{i}", config)
        else:
            model = get_peft_model(base, config)
    if not fresh:
        awaken(model)
    return model.eval()


def awaken(model: nn.Module, seed: int = 2) -> None:
    """Make experts differ and routers decisive, so that a wrong route changes the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif "lora_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def routers_of(model: Any) -> dict[str, nn.Module]:
    return model.base_model.routing.routers


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one forward and backward in training mode."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), grads_of(model)


def assert_same_grads(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    assert expected, "no gradients at all"
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_clean(base: nn.Module) -> None:
    """Nothing of ours is left on an unloaded base model."""
    assert type(base) in {type(a.build()) for a in ARCHITECTURES.values()}
    assert not [name for name, _ in base.named_modules() if "lora" in name or "moe" in name]
    assert not [name for name in vars(base) if "moelora" in name]
    for module in base.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, module
        assert not isinstance(getattr(module, "_gradient_checkpointing_func", None), RoutedCheckpoint), module


class RandomRouter(nn.Module):
    """A user's own router, for attach_router: dense softmax of a linear."""

    def __init__(self, hidden_size: int = HIDDEN, num_experts: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_experts)
        self.calls: list[torch.Size] = []
        nn.init.normal_(self.linear.weight, std=0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls.append(hidden_states.shape)
        return self.linear(hidden_states).softmax(dim=-1)
