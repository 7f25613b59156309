"""What is compared: one base model, adapted in different ways that all share its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.liger import apply_liger_kernel

import moelora.forward.block_routing
import moelora.tuner.layer
from moelora import MoELoraConfig, ops

from . import peers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

ARMS = {
    "frozen": "the frozen model, with gradients for its inputs as in LoRA training",
    "lora": "PEFT LoRA of the active rank k*r, adapters in the model's dtype (autocast_adapter_dtype=False)",
    "lora-default": "the same with PEFT's default, adapters in float32",
    "lora-equal": "PEFT LoRA of the mixture's total rank E*r, adapters in the model's dtype",
    "ours": "moelora, adapters in the model's dtype",
    "ours-dropless": "the same without a capacity limit",
    "ours-default": "moelora with PEFT's default, adapters in float32",
    "ours-fixed": "moelora with constant routing weights",
    "ours-fixed-default": "the same with PEFT's default, adapters in float32",
    "ours-e1": "moelora's kernels with one expert of rank k*r and no router: what LoRA would cost in them",
    "frozen-liger": "the frozen model with Liger's kernels, as Trainer(use_liger_kernel=True) applies them",
    "lora-liger": "lora-default with them",
    "ours-liger": "ours-default with them",
    "unsloth": "Unsloth's LoRA of the active rank, adapters in float32",
    "loop": "the same mixture as a loop over experts",
    "dense": "moelora with router_type=learned, every expert computed for every token",
    "sparse": "the same, each token's own experts computed alone",
    "native-lora": "PEFT's LoRA of a base's native experts (target_parameters), adapters in the model's dtype",
    "native-lora-default": "the same with PEFT's default, adapters in float32",
    "native": "moelora's form of the same LoRA, adapters in the model's dtype",
    "native-default": "the same with PEFT's default, adapters in float32",
    "native-outer": "native with one factor on the hidden side for all native experts (share_native_outer)",
    "beside": "moelora's mixture from what enters the native experts to what leaves them, in the model's dtype",
    "beside-default": "the same with PEFT's default, adapters in float32",
    "mixlora": "MixLoRA / MoE-PEFT, re-implemented from its formula",
    "loramoe": "LoRAMoE, re-implemented from its formula",
    "hydralora": "HydraLoRA, re-implemented from its formula",
    "unwatched": "ours, without MoELoraCallback",
    "watched": "ours, with MoELoraCallback and its logs",
    "concat": "moelora's mixture of one linear, routing given",
    "grouped": "the same with tokens sorted by expert and grouped products, sorting not counted",
    "stock-base": "the base model in an unmodified vLLM with LoRA switched on",
    "stock-lora": "a plain LoRA of the mixture's total rank E*r there",
    "plugin-base": "the base model in vLLM with moelora's plug-in",
    "plugin-lora": "the plain LoRA there",
    "mixture": "the mixture there",
}
WITH_LIGER = {"frozen-liger": "frozen", "lora-liger": "lora-default", "ours-liger": "ours-default"}
NATIVE_TARGETS: dict[str, dict[str, list[str]]] = {
    "native": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "beside": {"target_modules": ["mlp.experts"]},
}
ROUTER_TYPES = {  # of the arms that have another than moelora's default
    **dict.fromkeys(("ours-fixed", "ours-fixed-default", "ours-e1"), "fixed"),
    **dict.fromkeys(("dense", "sparse"), "learned"),
}


@dataclass(frozen=True)
class Mixture:
    """E experts of rank r, of which k speak."""

    experts: int
    rank: int
    top_k: int

    @property
    def active_rank(self) -> int:
        """k * r."""
        return self.top_k * self.rank

    @property
    def total_rank(self) -> int:
        """E * r."""
        return self.experts * self.rank


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def adapt(base: nn.Module, arm: str, mixture: Mixture) -> nn.Module:
    """A copy of the base model, around its own weights, as one arm adapts it."""
    if arm in WITH_LIGER:
        model = adapt(base, WITH_LIGER[arm], mixture)
        apply_liger_kernel(model, None)
        return model
    base.requires_grad_(False)
    model = shared_copy(base)
    with torch.device(next(base.parameters()).device):
        if arm == "frozen":
            pass
        elif arm in peers.PEERS:
            model = _adapt_as_peer(model, arm, mixture)
        elif arm.split("-")[0] in NATIVE_TARGETS:
            model = _adapt_natively(model, arm, mixture)
        elif arm.startswith("lora"):
            rank = mixture.total_rank if arm == "lora-equal" else mixture.active_rank
            model = _plain_lora(model, rank, ATTENTION + FEED_FORWARD, autocast=arm.endswith("default"))
        else:
            model = _adapt_as_ours(model, arm, mixture)
    fill_factors(model)
    return model


def fill_factors(model: nn.Module) -> None:
    """Fill factors B, which start at zero, with noise: arithmetic on zeros draws less power and runs faster."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


def _present(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in names if name in found]


def _plain_lora(model: nn.Module, rank: int, names: tuple[str, ...], autocast: bool) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_present(model, names))
    return get_peft_model(model, config, autocast_adapter_dtype=autocast)


def _adapt_natively(model: nn.Module, arm: str, mixture: Mixture) -> nn.Module:
    targets = NATIVE_TARGETS[arm.split("-")[0]]
    options = {"r": mixture.rank, "lora_alpha": 2 * mixture.rank} | targets
    of_mixture: dict[str, int] = {"num_experts": mixture.experts, "top_k_experts": mixture.top_k}
    if arm.endswith("outer"):
        of_mixture["share_native_outer"] = True
    config = LoraConfig(**options) if "lora" in arm else MoELoraConfig(**options | of_mixture)
    return get_peft_model(model, config, autocast_adapter_dtype=arm.endswith("default"))


def _adapt_as_peer(model: nn.Module, arm: str, mixture: Mixture) -> nn.Module:
    if arm != "hydralora" and _present(model, ATTENTION):
        model = _plain_lora(model, mixture.active_rank, ATTENTION, autocast=False)
    peers.adapt(model, arm, mixture.experts, mixture.rank, mixture.top_k, ATTENTION, FEED_FORWARD)
    return model


def _adapt_as_ours(model: nn.Module, arm: str, mixture: Mixture) -> nn.Module:
    is_single = arm == "ours-e1"
    rank = mixture.active_rank if is_single else mixture.rank
    config = MoELoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_present(model, ATTENTION + FEED_FORWARD),
        num_experts=max(mixture.experts, 2),
        top_k_experts=mixture.top_k,
        expert_capacity_factor=None if arm == "ours-dropless" else 1.25,
        router_type=ROUTER_TYPES.get(arm, "learned_with_maturity"),
    )
    name = "expert_0" if is_single else "default"  # an adapter of that name holds one expert
    return get_peft_model(model, config, name, autocast_adapter_dtype=arm.endswith("default"))


def as_arm(arm: str, run: Callable[[], object]) -> Callable[[], object]:
    """The same call, computed in the form that an arm is about."""
    if arm == "loop":
        return with_loop(run)
    return _in_form(run, is_sparse=arm == "sparse") if arm in ("dense", "sparse") else run


def _in_form(run: Callable[[], object], is_sparse: bool) -> Callable[[], object]:
    def chosen() -> object:
        with mock.patch.object(moelora.forward.block_routing, "chooses_sparse", lambda *_, **__: is_sparse):
            return run()

    return chosen


def with_loop(run: Callable[[], object]) -> Callable[[], object]:
    """The same call with the loop over experts in place of moelora's fast compute."""

    def loop(x, reader, weights):
        delta = ops.mixture(x.to(reader.pools[0].lora_A.dtype), reader.pools, weights, backend="reference")
        return reader.base_layer(x) + delta

    def looped() -> object:
        layers = moelora.tuner.layer
        with (
            mock.patch.object(layers.MoELoraLayer, "_shared_input", lambda *_: None),
            mock.patch.object(layers, "mixture_linear", loop),
        ):
            return run()

    return looped
