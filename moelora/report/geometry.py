"""How large, how rich and how alike experts are, from their factors alone: no product B A is ever formed.

For experts i and j of one linear, <B_i A_i, B_j A_j> = tr(A_i A_jᵀ B_jᵀ B_i) = Σ_ab (A_i A_jᵀ)_ab (B_iᵀ B_j)_ab: two
small Gram matrices, multiplied entry by entry and summed over rank blocks.

Shapes: N ranks of all experts together, D in, O out, E experts, H router input width, R routers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.pool import ExpertPool
from ..routing import Router, rms_norm
from ..storage.structure import owner_of

Layout = tuple[tuple[str, int], ...]  # (adapter, number of experts), in expert order
Modules = Mapping[str, Mapping[str, ExpertPool]]  # module name -> adapter name -> its experts there
DIRECTIONS = 4096  # of which sharpness is the mean: its standard error is below 0.004


@dataclass(frozen=True)
class Geometry:
    """Of the experts in one group of linears (one router's, or all).

    Attributes:
        norm: [E] Frobenius norm of scaling · B A over all linears of the group together.
        effective_rank: [E] mean over linears of exp(entropy of the normalised singular values) of B A
            (Roy and Vetterli, 2007): 1 to r; 0 where the expert is still zero everywhere.
        similarity: [E, E] cosine of the products, all linears of the group taken as one vector; 0 with a zero expert.
    """

    norm: Tensor
    effective_rank: Tensor
    similarity: Tensor


def geometry(modules: Modules, layout: Layout) -> Geometry:
    """The geometry of a group of linears; experts that a linear lacks count as zero there.

    Args:
        modules: the group's linears.
        layout: the adapters, with their numbers of experts, in the order that results are to have.
    """
    num_experts = sum(count for _, count in layout)
    inner_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    rank_sum_E, present_E = inner_EE.new_zeros(num_experts), inner_EE.new_zeros(num_experts)
    for pools in modules.values():
        inner, rank_E = _of_module(pools, layout)
        inner_EE += inner
        rank_sum_E += rank_E
        present_E += rank_E > 0
    norm_E = inner_EE.diagonal().clamp(min=0).sqrt()
    lengths_EE = norm_E[:, None] * norm_E
    similarity = torch.where(lengths_EE > 0, inner_EE / lengths_EE.clamp(min=1e-300), 0.0).clamp(-1, 1)
    return Geometry(norm_E, rank_sum_E / present_E.clamp(min=1), similarity)


def _of_module(pools: Mapping[str, ExpertPool], layout: Layout) -> tuple[Tensor, Tensor]:
    """Inner products [E, E] of one linear's products, and their effective ranks [E]."""
    here = [pools[name] for name, _ in layout if name in pools]
    lora_A = torch.cat([pool.lora_A.detach().double().cpu() * pool.scaling for pool in here])
    lora_B = torch.cat([pool.lora_B.detach().double().cpu() for pool in here], dim=1)
    gram_A, gram_B = lora_A @ lora_A.T, lora_B.T @ lora_B
    ranks_E = torch.tensor([pools[name].rank if name in pools else 0 for name, count in layout for _ in range(count)])
    num_experts = len(ranks_E)
    expert_N = torch.arange(num_experts).repeat_interleave(ranks_E)
    membership_NE = F.one_hot(expert_N, num_experts).double()
    inner = membership_NE.T @ (gram_A * gram_B) @ membership_NE
    ranks = inner.new_zeros(num_experts)
    for expert in expert_N.unique():
        own = (expert_N == expert).nonzero().flatten()
        ranks[expert] = _effective_rank(gram_A[own][:, own], gram_B[own][:, own])
    return inner, ranks


def _effective_rank(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """exp(entropy) of the singular values of B A, which are the roots of the eigenvalues of gram_B · gram_A."""
    values, vectors = torch.linalg.eigh(gram_B)
    root = vectors * values.clamp(min=0).sqrt()
    singular = torch.linalg.eigvalsh(root.T @ gram_A @ root).clamp(min=0).sqrt()
    if not singular.sum() > 0:
        return singular.new_zeros(())
    return torch.special.entr(singular / singular.sum()).sum().exp()


def group_modules(modules: Modules, routers: Sequence[str]) -> dict[str, dict[str, Mapping[str, ExpertPool]]]:
    """The linears that each router steers: those inside its block, or all (the model's router is named "")."""
    groups: dict[str, dict[str, Mapping[str, ExpertPool]]] = {name: {} for name in routers}
    for module, pools in modules.items():
        if (owner := owner_of(module, routers)) is not None:
            groups[owner][module] = pools
    return groups


def sharpness(routers: Sequence[Router], temperature: float) -> float:
    """How decided a mixture's router is by itself: its mean top-1 probability over random directions.

    Hidden states drawn from a normal distribution are normalised as real ones are. 1/E is a router without an opinion,
    1 one that sends every direction to a single expert. Real hidden states are no random directions, so compare
    routers with each other by it, and read confidence on texts from a report.

    Args:
        routers: of the active adapters of one block, module or model; all read the same width H.
        temperature: `router_temperature`.
    """
    width = routers[0].first_weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    normed = rms_norm(torch.randn(DIRECTIONS, width, generator=generator))
    with torch.no_grad():
        logits = torch.cat([router(normed.to(router.first_weight.device)).cpu() for router in routers], dim=-1)
    return float(torch.softmax(logits / temperature, dim=-1).amax(dim=-1).mean())
