"""Token-expert pairs sorted by expert: what the sparse form computes in place of every expert for every token.

No shape depends on where tokens go, and the host waits for nothing, so a step can still be captured in a CUDA graph.
Shapes: T tokens, E experts, K experts of a token (slots), P = T * K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MIN_EXPERTS = 33  # smaller pools are computed as they always were
MIN_TOKENS = 256  # below, both wait for the host, and this form's operations are more
MIN_RANKS = 400  # of the whole pool for each slot; see `chooses_sparse`
FROZEN_RANKS = 1650  # what the frozen product takes, as ranks of a pool
MIN_WORK = (
    2.0e7  # tokens times ranks, those of the frozen product too, that take a GPU longer than a host starts this form
)
MAX_RANK = 128  # of one expert, which a program of the kernels has room for


def chooses_sparse(num_tokens: int, num_experts: int, top_k: int, rank: int, on_gpu: bool = True) -> bool:
    """Whether the sparse form is the faster one; on a GPU, which may wait for the host, or on a CPU.

    Both read and write every factor once a pass. Beyond that, all experts take time in proportion to T * E * r, which
    is arithmetic, and the pairs in proportion to T * K, which is reading and writing rows of their tokens. So the
    ratio E * r / K decides, once there is enough to do that the host is not what takes the time. The constants are
    fitted to `python -m benchmarks.pool` on an H200, at 1,024 and 8,192 tokens.

    Example:
        >>> chooses_sparse(8192, 256, 2, 16), chooses_sparse(8192, 8, 2, 16)
        (True, False)
    """
    ranks = num_experts * rank
    is_served = num_experts >= MIN_EXPERTS and num_tokens >= MIN_TOKENS and rank <= MAX_RANK
    has_work = not on_gpu or (ranks + FROZEN_RANKS) * num_tokens >= MIN_WORK
    return is_served and has_work and ranks >= MIN_RANKS * top_k


@dataclass(frozen=True)
class ExpertPairs:
    """The experts of each token, as rows sorted by expert, then by slot, then by token.

    A pair without weight (beyond capacity, dropped out) belongs to no expert: it comes last, as of an expert E.
    """

    weights: Tensor  # [P], with gradient
    experts: Tensor  # [P]: e, or E
    tokens: Tensor  # [P]
    ends: Tensor  # [(E + 1) * K] int32: where the pairs of one expert in one slot end, experts first
    num_experts: int
    num_tokens: int

    @property
    def num_slots(self) -> int:
        """K."""
        return len(self.ends) // (self.num_experts + 1)

    @classmethod
    def of(cls, weights: Tensor, top_k: int) -> ExpertPairs:
        """Sort the pairs of weights [..., E], of which no token has more than top_k that are not zero.

        A weight that is not among a token's top_k gets no gradient. That is right where it is zero whatever the
        scores are, as with a router that normalises over the chosen: the derivative ends at that zero.

        Example:
            >>> pairs = ExpertPairs.of(torch.tensor([[0.0, 0.7, 0.3], [0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]), 2)
            >>> pairs.experts.tolist(), pairs.tokens.tolist()
            ([0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 0, 2])
        """
        weights_TE = weights.flatten(0, -2)
        T, E = weights_TE.shape
        values_TK, chosen_TK = weights_TE.topk(top_k, dim=-1)
        experts_TK = torch.where(values_TK == 0, E, chosen_TK)
        slots = torch.arange(top_k, device=weights.device)
        # By slot first, so that of one expert and slot, tokens stay in their order.
        keys, order = (experts_TK * top_k + slots).t().flatten().int().sort(stable=True)
        every = torch.arange((E + 1) * top_k, device=weights.device, dtype=torch.int32)
        ends = torch.searchsorted(keys, every, right=True, out_int32=True)
        return cls(
            weights=values_TK.t().flatten().gather(0, order),
            experts=keys // top_k,
            tokens=order % T,
            ends=ends,
            num_experts=E,
            num_tokens=T,
        )

    @property
    def tile_rows(self) -> int:
        """Pairs that a program of the kernels takes: as many as an expert has in one slot where all have as many."""
        fair_share = max(self.num_tokens // self.num_experts, 1)
        return min(64, max(16, 1 << (fair_share - 1).bit_length()))

    @cached_property
    def tiles(self) -> Tensor:
        """[K, M, 3] int32: the expert, the first pair and the end of each tile of pairs of one expert in one slot.

        M is as many as any routing needs. Those that are left are empty, and of expert E.
        """
        ends_KE = self.ends.view(-1, self.num_slots).t()
        counts_KE = self.ends.diff(prepend=self.ends.new_zeros(1)).view(-1, self.num_slots).t()
        tiles_KE = (counts_KE + (self.tile_rows - 1)) // self.tile_rows
        last_KE = tiles_KE.cumsum(dim=1).contiguous()
        ids = torch.arange(self.num_tokens // self.tile_rows + self.num_experts + 1, device=self.ends.device)
        ids = ids.expand(self.num_slots, -1).contiguous()
        expert = torch.searchsorted(last_KE, ids, right=True).clamp_(max=self.num_experts)
        end = ends_KE.gather(1, expert)
        first = end - counts_KE.gather(1, expert) + (ids - (last_KE - tiles_KE).gather(1, expert)) * self.tile_rows
        return torch.stack([expert, first, torch.minimum(first + self.tile_rows, end)], dim=-1).int()
