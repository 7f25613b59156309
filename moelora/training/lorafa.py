"""LoRA-FA for mixtures: A stands still, B's gradient is projected, and routers learn as under AdamW."""

from __future__ import annotations

from typing import Any

from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn

from ..tuner.layer import MoELoraLayer


def create_lorafa_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0) -> LoraFAOptimizer:
    """PEFT's LoRA-FA optimizer (arXiv:2308.03303) for a mixture; `lora_A` is frozen.

    PEFT's own `create_lorafa_optimizer` takes all parameters of LoRA in pairs, as they come, and routers are none. The
    projection is that of the LoRA of rank E * r in which an adapter's experts lie side by side.

    Args:
        model: with its adapters; what is trainable, and is no factor, learns as under AdamW.
        lr: learning rate of all.

    Raises:
        ValueError: model has no routed layers.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MoELoraLayer)]
    pairs = [pair for name, layer in layers for pair in _pairs(name, layer)]
    if not pairs:
        raise ValueError("the model holds no mixture; PEFT's own `create_lorafa_optimizer` serves a plain LoRA")
    for _, A, _, _ in pairs:
        A.requires_grad_(False)
    factors = {factor for _, A, B, _ in pairs for factor in (A, B)}
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p not in factors]
    trained = [pair for pair in pairs if pair[2].requires_grad]
    # The optimizer takes parameters whose names hold "lora" in pairs, and keeps its state by the name before that.
    names = [f"{name}.lora_{factor}" for name, _, _, _ in trained for factor in "AB"]
    names += [name.replace("lora_", "") for name, _ in rest]
    group: dict[str, Any] = {
        "params": [factor for _, A, B, _ in trained for factor in (A, B)] + [parameter for _, parameter in rest],
        "names": names,
        "scaling_factors": [scaling for _, _, _, scaling in trained for _ in "AB"] + [None] * len(rest),
        "lr": lr,
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _pairs(name: str, layer: Any) -> list[tuple[str, nn.Parameter, nn.Parameter, float]]:
    """A name of its own, A, B and scaling of each of a layer's adapters."""
    return [
        (f"{name}.{adapter}", layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        for adapter in layer.lora_A
    ]
