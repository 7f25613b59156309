"""The mixture of one linear with tokens sorted by expert: what the concatenated form has to beat.

Every assignment (a token with one of its experts) becomes a row, rows are sorted by expert, and each product runs as
one grouped matrix product over the experts' segments. Nothing synchronises with the host, and nothing is dropped.

Letters: T tokens, D in, O out, E experts, K top-k, r rank of one expert, N = T * K assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """Which row of the sorted order is which assignment."""

    tokens: Tensor  # [N]: the token of each row
    assignments: Tensor  # [N]: the row's place in [T, K], flattened
    ends: Tensor  # [E] int32: where each expert's segment ends


def make_plan(expert_ids_TK: Tensor, num_experts: int) -> Plan:
    """Sort the assignments by expert."""
    ids, assignments = expert_ids_TK.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=ids.device)
    ends = torch.searchsorted(ids, experts, right=True).to(torch.int32)
    return Plan(assignments // expert_ids_TK.shape[1], assignments, ends)


def grouped_linear(
    base_layer: nn.Linear, x: Tensor, lora_A: Tensor, lora_B: Tensor, weights_TK: Tensor, plan: Plan, scaling: float
) -> Tensor:
    """base_layer(x) plus the mixture, for x [T, D], lora_A [E, r, D], lora_B [E, O, r] -> [T, O]."""
    rows_ND = x.index_select(0, plan.tokens)
    h = F.grouped_mm(rows_ND, lora_A.transpose(1, 2), offs=plan.ends)
    h = h * (weights_TK.flatten().index_select(0, plan.assignments) * scaling).unsqueeze(-1)
    delta_NO = F.grouped_mm(h, lora_B.transpose(1, 2), offs=plan.ends)
    return base_layer(x).index_add_(0, plan.tokens, delta_NO)
