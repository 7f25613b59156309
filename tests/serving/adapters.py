"""Adapters of every kind that is served, with weights that act: experts and routers random and far apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bases import VOCAB
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moelora import MoELoraConfig
from moelora.experts import build, from_lora, grow, learn_domain, put_together, select, take_apart

LOW, HIGH = (1, VOCAB // 2), (VOCAB // 2, VOCAB)
"""Two domains: spans of token ids."""


@dataclass(frozen=True)
class Workshop:
    """What an adapter is made from: its base model's folder, the linears that it acts on, and a folder for LoRAs."""

    model: Path
    linears: tuple[str, ...]
    scratch: Path

    def base(self) -> nn.Module:
        return load_base(self.model)


Builder = Callable[[Workshop], PeftModel]


def load_base(model: Path) -> nn.Module:
    """Attention in its readable form, which alone has soft caps and sinks."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def awaken(model: nn.Module, adapter: str = "", seed: int = 2, strength: float = 0.1) -> None:
    """Random B of this size, routers whose choice differs from token to token, experts that are mature."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    own = f".{adapter}." if adapter else ""
    for name, parameter in model.named_parameters():
        if own not in name:
            continue
        if "lora_A" in name or "lora_router" in name:
            parameter.copy_(draw(parameter, (3 if "router" in name else 1) * parameter.shape[-1] ** -0.5))
        elif "lora_B" in name:
            parameter.copy_(draw(parameter, strength))
    for name, buffer in model.named_buffers():
        if own in name and name.endswith("maturity"):
            buffer.fill_(1.0)
        elif own in name and name.endswith("selection_bias"):
            buffer.copy_(draw(buffer, 0.3))


def mixture(shop: Workshop, name: str = "default", **options: Any) -> PeftModel:
    """Four experts of rank 4, two to a token, unless told otherwise."""
    fields = {"r": 4, "lora_alpha": 8, "num_experts": 4, "top_k_experts": 2, "target_modules": list(shop.linears)}
    config = MoELoraConfig(**(fields | {"task_type": "CAUSAL_LM"} | options))
    model = get_peft_model(shop.base(), config, adapter_name=name)
    awaken(model, seed=2 + len(str(options)))
    return model.eval()


def plain(shop: Workshop, seed: int = 1, **options: Any) -> PeftModel:
    fields = {"r": 16, "lora_alpha": 16, "target_modules": list(shop.linears), "task_type": "CAUSAL_LM"}
    model = get_peft_model(shop.base(), LoraConfig(**(fields | options)))
    awaken(model, seed=seed)
    return model.eval()


def preset(shop: Workshop, name: str) -> PeftModel:
    config = MoELoraConfig.preset(name, target_modules=list(shop.linears), task_type="CAUSAL_LM")
    model = get_peft_model(shop.base(), config)
    awaken(model, seed=50, strength=0.02)  # they multiply by up to 16
    return model.eval()


def of_every_age(shop: Workshop) -> PeftModel:
    model = mixture(shop)
    for expert, value in enumerate((0.0, 0.3, 1.0, 0.7)):
        model.set_expert_maturity(expert, value)
    return model


def of_set_weights(shop: Workshop) -> PeftModel:
    model = mixture(shop, router_type="fixed", routing_scale=4.0)
    model.set_routing_weights([0.1, 0.5, -0.2, 0.6])
    return model


def texts(span: tuple[int, int], seed: int = 0, rows: int = 16, length: int = 48) -> list[dict[str, Tensor]]:
    ids = torch.randint(*span, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def grown(shop: Workshop, *domains: tuple[int, int], **options: Any) -> PeftModel:
    """Two adapters, of 4 and of 3 experts; each learns a domain where domains are given."""
    model = mixture(shop, routing_scale=2.0, **options)
    new = grow(model, 3)
    awaken(model, new, seed=9)
    for name, domain in zip(("default", new), domains, strict=False):
        learn_domain(model, name, texts(domain), rank=8)
    return model.eval()


def parts_of_one_domain(shop: Workshop) -> PeftModel:
    """An adapter that was pruned to fewer experts than top-k became single adapters, whose memories are equal."""
    model = grown(shop, LOW, HIGH, top_k_experts=3)
    return put_together(model, select(take_apart(model), [0, 1, 4, 5, 6])).eval()


def expert_by_expert(shop: Workshop) -> PeftModel:
    model = mixture(shop, name="expert_0", num_experts=3)
    for i in (1, 2):
        model.add_adapter(f"expert_{i}", model.peft_config["expert_0"])
        awaken(model, f"expert_{i}", seed=30 + i)
    return model.eval()


def saved_loras(shop: Workshop) -> dict[str, Path]:
    """Plain LoRAs that differ in rank, alpha and targets."""
    kinds = {
        "first": {"r": 5, "lora_alpha": 7},
        "second": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": list(shop.linears[:3])},
        "third": {"r": 4, "lora_alpha": 4, "rank_pattern": {shop.linears[0]: 2}},
    }
    for seed, (name, options) in enumerate(kinds.items()):
        if not (shop.scratch / name).exists():
            plain(shop, seed=60 + seed, **options).save_pretrained(str(shop.scratch / name))
    return {name: shop.scratch / name for name in kinds}


def with_an_import(shop: Workshop) -> PeftModel:
    model = mixture(shop)
    from_lora(model, saved_loras(shop)["second"], "imported")
    return model.eval()


def _mixture(**options: Any) -> Builder:
    return lambda shop: mixture(shop, **options)


def _plain(**options: Any) -> Builder:
    return lambda shop: plain(shop, **options)


DENSE = {"top_k_experts": 4, "router_temperature": 1.0, "routing_scale": 4.0}
KINDS: dict[str, Builder] = {
    "plain": _plain(),
    "plain_rslora": _plain(r=8, use_rslora=True, rank_pattern={"o_proj": 3}),
    "switched_off": _mixture(use_moe_routing=False, num_experts=4, top_k_experts=2),
    "sparse": _mixture(),
    "all_linear": _mixture(target_modules="all-linear", **DENSE),
    "top_1": _mixture(top_k_experts=1, router_type="learned"),
    "dense": _mixture(**DENSE),
    "of_every_age": of_every_age,
    "capacity": _mixture(expert_capacity_factor=0.5),
    "fixed": _mixture(router_type="fixed", routing_scale=4.0),
    "set_weights": of_set_weights,
    "two_layers": _mixture(router_hidden_size=24),
    "sigmoid": _mixture(router_type="sigmoid"),
    "loss_free": _mixture(load_balance_loss_type="loss_free"),
    "sigmoid_bias": _mixture(router_type="sigmoid", load_balance_loss_type="loss_free"),
    "rank_pattern": _mixture(rank_pattern={"q_proj": 2, "down_proj": 8}),
    "alpha_pattern": _mixture(alpha_pattern={"k_proj": 3, "up_proj": 20}),
    "rslora": _mixture(use_rslora=True, rank_pattern={"v_proj": 2}),
    "few_layers": _mixture(layers_to_transform=[0, 2]),
    "per_model": _mixture(router_scope="model"),
    "per_module": _mixture(router_scope="module"),
    "grown": grown,
    "grown_larger": lambda shop: grown(shop, top_k_experts=3),
    "domains": lambda shop: grown(shop, LOW, HIGH),
    "domains_dense": lambda shop: grown(shop, LOW, HIGH, top_k_experts=3, router_temperature=1.0),
    "domains_whole_text": lambda shop: grown(shop, LOW, HIGH, domain_window=None),
    "domains_per_model": lambda shop: grown(shop, LOW, HIGH, domain_window=None, router_scope="model"),
    "domains_far_back": lambda shop: grown(shop, LOW, HIGH, domain_window=100, router_scope="module"),
    "one_domain": parts_of_one_domain,
    "expert_by_expert": expert_by_expert,
    "imported": with_an_import,
    "built_arrow": lambda shop: build(shop.base(), saved_loras(shop), "arrow"),
    "built_uniform": lambda shop: build(shop.base(), saved_loras(shop), "uniform"),
    "multi_domain": lambda shop: preset(shop, "multi-domain"),
    "mergeable": lambda shop: preset(shop, "mergeable"),
    "continual": lambda shop: preset(shop, "continual"),
}
"""How each kind of adapter is made, by its name."""
