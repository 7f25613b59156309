"""Rival mixtures, re-implemented from their formulas in the form that trains fastest here; the results are the same as
those of the loops over experts in benchmarks/peers.py, which a test compares them with.

Letters: T tokens, D in, O out, E experts, K top-k, r rank of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..peers import SCALING, SoftmaxRouter


def _factors(base: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, D] drawn as PEFT draws it, B [O, rank] of zeros, in float32."""
    device = base.weight.device
    lora_A = torch.empty(rank, base.in_features, device=device)
    nn.init.kaiming_uniform_(lora_A, a=5**0.5)
    return nn.Parameter(lora_A), nn.Parameter(torch.zeros(base.out_features, rank, device=device))


def _router(base: nn.Linear, num_experts: int) -> SoftmaxRouter:
    return SoftmaxRouter(base.in_features, num_experts, torch.empty(0, device=base.weight.device))


class SoftMixtureLinear(nn.Module):
    """``W x + sum_e softmax(router(x))_e scaling B_e A_e x`` over all experts.

    LoRAMoE (Dou et al. 2023, arXiv:2312.09979); with one A for all experts HydraLoRA (Tian et al. 2024,
    arXiv:2404.19245).
    """

    def __init__(self, base: nn.Linear, num_experts: int, rank: int, shared_A: bool) -> None:
        super().__init__()
        self.base_layer, self.num_experts, self.shared_A = base, num_experts, shared_A
        self.router = _router(base, num_experts)
        self.lora_A, self.lora_B = _factors(base, num_experts * rank)
        if shared_A:
            self.lora_A = nn.Parameter(self.lora_A.detach()[:rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        h = F.linear(x, self.lora_A)
        per_expert = h.unsqueeze(-2) if self.shared_A else h.unflatten(-1, (self.num_experts, -1))
        weighted = (per_expert * self.router(x).to(h.dtype).unsqueeze(-1)).flatten(-2)
        return self.base_layer(x) + F.linear(weighted, self.lora_B) * SCALING


class TopKFeedForward(nn.Module):
    """MixLoRA (Li et al. 2024, arXiv:2404.15159): ``sum_k w_k (W_down z_k + D_k z_k)``,
    ``z_k = act(W_gate x + G_k x) * (W_up x + U_k x)``, over the K likeliest experts, their weights renormalised.

    For slot k, the ranks of all experts but the k-th choice are set to zero, so that one product over all ranks gives
    each token the delta of its own expert; W_down is linear, so it is applied once to the weighted sum. The balancing
    loss is E sum_e f_e P_e, f being the experts' shares of all choices.
    """

    NAMES = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, frozen: nn.Module, num_experts: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.frozen, self.num_experts, self.rank, self.top_k = frozen, num_experts, rank, top_k
        self.router = _router(frozen.gate_proj, num_experts)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in self.NAMES:
            self.lora_A[name], self.lora_B[name] = _factors(frozen.get_submodule(name), num_experts * rank)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        frozen, (A, B) = self.frozen, (self.lora_A, self.lora_B)
        probs = self.router(x)
        top, chosen = probs.topk(self.top_k, dim=-1)
        weights = top / top.sum(dim=-1, keepdim=True)
        picks = chosen.unsqueeze(-1) == torch.arange(self.num_experts, device=chosen.device)  # [..., K, E]
        shares = picks.float().mean(dim=-2).flatten(0, -2).mean(dim=0)
        self.balance = self.num_experts * shares @ probs.flatten(0, -2).mean(dim=0)
        gate, up = frozen.gate_proj(x), frozen.up_proj(x)
        h_gate, h_up = F.linear(x, A["gate_proj"]), F.linear(x, A["up_proj"])
        inner, h_down = 0.0, 0.0
        for slot in range(self.top_k):
            mine = picks[..., slot, :].to(h_gate.dtype).repeat_interleave(self.rank, dim=-1) * SCALING
            weight = weights[..., slot, None].to(h_gate.dtype)
            z = frozen.act_fn(gate + F.linear(h_gate * mine, B["gate_proj"]))
            z = z * (up + F.linear(h_up * mine, B["up_proj"]))
            inner = inner + weight * z
            h_down = h_down + weight * mine * F.linear(z, A["down_proj"])
        return frozen.down_proj(inner) + F.linear(h_down, B["down_proj"])


class Balanced(nn.Module):
    """A model whose training loss holds `coef` times the mean balancing loss of its feed-forward mixtures."""

    def __init__(self, model: nn.Module, coef: float) -> None:
        super().__init__()
        self.model, self.coef = model, coef

    def forward(self, **inputs: Any) -> Any:
        """See the model's."""
        output = self.model(**inputs)
        if self.training and output.loss is not None:
            losses = [m.balance for m in self.model.modules() if isinstance(m, TopKFeedForward)]
            output.loss = output.loss + self.coef * torch.stack(losses).mean()
        return output


def replace_linears(model: nn.Module, names: tuple[str, ...], num_experts: int, rank: int, shared_A: bool) -> None:
    """Put a soft mixture around every linear of one of these names."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(parent, name, SoftMixtureLinear(child, num_experts, rank, shared_A))


def replace_feed_forwards(model: nn.Module, num_experts: int, rank: int, top_k: int) -> None:
    """Put MixLoRA's mixture around every feed-forward network."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "act_fn"):
                setattr(parent, name, TopKFeedForward(child, num_experts, rank, top_k))
