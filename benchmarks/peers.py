"""The compute paths of other mixtures of LoRA, re-implemented from their formulas.

Their code is bound to versions of transformers and peft that no longer install beside each other. What is measured here
is each formula in the plain form that its authors chose (loop over experts, what is shared, what is materialised), in
the model's dtype. Attention linears of MixLoRA and LoRAMoE carry plain LoRA of rank k*r, which is PEFT's.

Letters: T tokens, D in, O out, E experts, K top-k, r rank of one expert. scaling = alpha / r = 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEERS = ("mixlora", "loramoe", "hydralora")
SCALING = 2.0


class Factors(nn.Module):
    """One expert's delta of one linear: ``scaling * B A x``."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        kind = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features, **kind) * base.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * SCALING


class SoftmaxRouter(nn.Module):
    """``softmax(x W^T)`` over the experts, in float32."""

    def __init__(self, width: int, num_experts: int, like: Tensor) -> None:
        super().__init__()
        weight = torch.randn(num_experts, width, device=like.device, dtype=like.dtype)
        self.weight = nn.Parameter(weight * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E] float32."""
        return torch.softmax(F.linear(x, self.weight), dim=-1, dtype=torch.float32)


class MixLoRAFeedForward(nn.Module):
    """MixLoRA (Li et al. 2024, arXiv 2404.15159), with MoE-PEFT's sharing of the frozen products.

    1. p = softmax(router(x)); each token keeps its K largest, renormalised to sum 1.
    2. g = W_gate x and u = W_up x once, for all experts.
    3. For each expert, on the tokens it got: ``y_e = W_down z + D_e z``, ``z = act(g + G_e x) * (u + U_e x)``, where
       D_e, G_e, U_e are the expert's LoRA deltas. The down projection runs once per expert.
    4. y = sum_e p_e y_e.
    """

    def __init__(self, feed_forward: nn.Module, num_experts: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.feed_forward = feed_forward
        self.top_k = top_k
        base = feed_forward.gate_proj
        self.router = SoftmaxRouter(base.in_features, num_experts, base.weight)
        names = ("gate_proj", "up_proj", "down_proj")
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: Factors(feed_forward.get_submodule(name), rank) for name in names})
            for _ in range(num_experts)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., D]."""
        frozen = self.feed_forward
        x = hidden.flatten(0, -2)
        weights_TK, expert_ids_TK = self.router(x).topk(self.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(x.dtype)
        gate, up = frozen.gate_proj(x), frozen.up_proj(x)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(expert_ids_TK == number)
            mine = x.index_select(0, tokens)
            gated = frozen.act_fn(gate.index_select(0, tokens) + expert["gate_proj"](mine))
            inner = gated * (up.index_select(0, tokens) + expert["up_proj"](mine))
            out = frozen.down_proj(inner) + expert["down_proj"](inner)
            y = y.index_add(0, tokens, out * weights_TK[tokens, slots, None])
        return y.view_as(hidden)


class LoRAMoELinear(nn.Module):
    """LoRAMoE (Dou et al. 2023, arXiv 2312.09979): ``W x + sum_e softmax(router(x))_e scaling B_e A_e x``, every expert
    on every token, one after the other."""

    def __init__(self, base: nn.Linear, num_experts: int, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.router = SoftmaxRouter(base.in_features, num_experts, base.weight)
        self.experts = nn.ModuleList(Factors(base, rank) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        y = self.base_layer(x)
        weights = self.router(x).to(x.dtype)
        for number, expert in enumerate(self.experts):
            y = y + weights[..., number, None] * expert(x)
        return y


class HydraLoRALinear(nn.Module):
    """HydraLoRA (Tian et al. 2024, arXiv 2404.19245): ``W x + sum_e softmax(router(x))_e scaling B_e (A x)``, A shared
    by all heads B_e."""

    def __init__(self, base: nn.Linear, num_experts: int, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.router = SoftmaxRouter(base.in_features, num_experts, base.weight)
        kind = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features, **kind) * base.in_features**-0.5)
        heads = (nn.Parameter(torch.zeros(base.out_features, rank, **kind)) for _ in range(num_experts))
        self.lora_B = nn.ParameterList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        y = self.base_layer(x)
        weights = self.router(x).to(x.dtype)
        h = F.linear(x, self.lora_A)
        for number, head in enumerate(self.lora_B):
            y = y + weights[..., number, None] * (F.linear(h, head) * SCALING)
        return y


def adapt(
    model: nn.Module,
    peer: str,
    num_experts: int,
    rank: int,
    top_k: int,
    attention: tuple[str, ...],
    feed_forward: tuple[str, ...],
) -> None:
    """Put a peer's modules in place, around the model's own linears.

    Args:
        attention: names of the attention linears; HydraLoRA adapts them too.
        feed_forward: names of the linears of the feed-forward network.

    Raises:
        ValueError: MixLoRA finds no feed-forward network.
    """
    names = (*attention, *feed_forward) if peer == "hydralora" else feed_forward
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if peer == "mixlora" and hasattr(child, "act_fn"):
                setattr(parent, name, MixLoRAFeedForward(child, num_experts, rank, top_k))
            elif peer != "mixlora" and name in names and isinstance(child, nn.Linear):
                linear = LoRAMoELinear if peer == "loramoe" else HydraLoRALinear
                setattr(parent, name, linear(child, num_experts, rank))
            else:
                continue
            replaced += 1
    if not replaced and peer == "mixlora":
        raise ValueError("`mixlora` (peer) found no feed-forward network with `act_fn`; measure it in a whole model")
