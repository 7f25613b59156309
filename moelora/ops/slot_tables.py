"""Routing for serving: every token belongs to a slot, and every slot holds the routers of one mixture, or none.

The tables never move, so that a CUDA graph captured once routes whatever the slots hold later. `route_slots_reference`
says what is correct; triton/slot_router.py does it on a GPU.

Shapes: L blocks, S slots, N rows of one slot's first layer, H width, T tokens, E experts, R columns of the gate: the
greatest rank that is served. Adapters of one mixture lie one below the other; all experts are padded to one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm_linear import EPS


@dataclass(frozen=True, eq=False)
class SlotTables:
    """Static buffers with the routers of all slots in all blocks; see `empty` and `set`.

    Attributes:
        first: [L, S, N, H] float32, what the normalised hidden states meet first: a row an expert of a one-layer
            router, a row a hidden unit of a two-layer one.
        second: [L, S, N, N] float32, expert by hidden unit; read where a slot has hidden units.
        outside: [L, S, N] float32, the part of its probability with which an expert outside the top-k weighs in.
        num_experts: [S] int32; 0 where the slot holds no mixture.
        num_rows: [S] int32, rows of `first` in use.
        has_hidden: [S] int32, 1 where the routers have two layers.
        rank: [S] int32, of one expert.
        top_k: [S] int32.
        temperature: [S] float32.
        scale: [S] float32, what every weight is multiplied by.
        max_rank: R.
    """

    first: Tensor
    second: Tensor
    outside: Tensor
    num_experts: Tensor
    num_rows: Tensor
    has_hidden: Tensor
    rank: Tensor
    top_k: Tensor
    temperature: Tensor
    scale: Tensor
    max_rank: int

    @classmethod
    def empty(
        cls,
        num_blocks: int,
        num_slots: int,
        rows: int,
        hidden_size: int,
        max_rank: int,
        device: torch.device | str | None = None,
    ) -> SlotTables:
        """Tables of which no slot holds a mixture.

        Args:
            rows: N, the most experts, and the most hidden units, that one mixture may have in a block.
            max_rank: R, the most that the ranks of a mixture's experts may sum to.
        """
        L, S, N = num_blocks, num_slots, rows
        return cls(
            first=torch.zeros(L, S, N, hidden_size, dtype=torch.float32, device=device),
            second=torch.zeros(L, S, N, N, dtype=torch.float32, device=device),
            outside=torch.zeros(L, S, N, dtype=torch.float32, device=device),
            num_experts=torch.zeros(S, dtype=torch.int32, device=device),
            num_rows=torch.zeros(S, dtype=torch.int32, device=device),
            has_hidden=torch.zeros(S, dtype=torch.int32, device=device),
            rank=torch.zeros(S, dtype=torch.int32, device=device),
            top_k=torch.zeros(S, dtype=torch.int32, device=device),
            temperature=torch.ones(S, dtype=torch.float32, device=device),
            scale=torch.ones(S, dtype=torch.float32, device=device),
            max_rank=max_rank,
        )

    @property
    def num_slots(self) -> int:
        """S."""
        return self.first.shape[1]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.first.shape[3]

    def clear(self, slot: int) -> None:
        """Let the slot hold no mixture: its tokens get a gate of ones."""
        self._check_slot(slot)
        self.num_experts[slot] = 0
        self.num_rows[slot] = 0

    def set(
        self,
        slot: int,
        *,
        first_LNH: Tensor,
        second_LEN: Tensor | None = None,
        maturity_LE: Tensor | None = None,
        rank: int,
        top_k: int,
        temperature: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        """Write a mixture's routers into a slot, in place, over what it held.

        Args:
            first_LNH: [L, rows, H]; rows are experts where there is no second layer.
            second_LEN: [L, E, rows], block-diagonal over adapters; None for one-layer routers.
            maturity_LE: [L, E] in [0, 1]; None means mature.
            rank: of one expert.
            top_k: of more than there are experts, all are taken.

        Raises:
            ValueError: something does not fit these tables; the slot is as it was.
        """
        self._check_slot(slot)
        rows = first_LNH.shape[1]
        experts = rows if second_LEN is None else second_LEN.shape[1]
        self._check_sizes(experts, rows, rank)
        self._check_shape("first_LNH", first_LNH, rows, self.hidden_size)
        if second_LEN is not None:
            self._check_shape("second_LEN", second_LEN, experts, rows)
        if maturity_LE is not None:
            self._check_shape("maturity_LE", maturity_LE, experts)
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, but must be at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, but must be positive")

        self.first[:, slot, :rows] = first_LNH
        if second_LEN is not None:
            self.second[:, slot, :experts, :rows] = second_LEN
        self.outside[:, slot, :experts] = 0.0 if maturity_LE is None else 1.0 - maturity_LE.float()
        self.num_rows[slot], self.has_hidden[slot] = rows, int(second_LEN is not None)
        self.rank[slot], self.top_k[slot] = rank, min(top_k, experts)
        self.temperature[slot], self.scale[slot] = temperature, scale
        self.num_experts[slot] = experts

    def check(self, hidden_TH: Tensor, slot_T: Tensor, gate_TR: Tensor, residual_TH: Tensor | None) -> None:
        """Raise a ValueError unless a batch fits these tables; reads shapes alone, nothing from the device."""
        T = len(hidden_TH)
        expected = {"hidden_TH": (hidden_TH, (T, self.hidden_size)), "slot_T": (slot_T, (T,))}
        expected["gate_TR"] = (gate_TR, (T, self.max_rank))
        if residual_TH is not None:
            expected["residual_TH"] = (residual_TH, (T, self.hidden_size))
            if residual_TH.dtype != hidden_TH.dtype:
                raise ValueError(f"residual_TH is {residual_TH.dtype}, but hidden_TH is {hidden_TH.dtype}")
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, but these tables take {list(shape)}")
        if gate_TR.dtype != torch.float32:
            raise ValueError(f"gate_TR is {gate_TR.dtype}, but must be torch.float32")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is none of the {self.num_slots} slots 0 to {self.num_slots - 1}")

    def _check_sizes(self, experts: int, rows: int, rank: int) -> None:
        most = self.first.shape[2]
        if not 1 <= experts <= most:
            raise ValueError(f"the mixture has {experts} experts, but the tables have room for 1 to {most}")
        if not 1 <= rows <= most:
            raise ValueError(f"the routers have {rows} hidden units, but the tables have room for 1 to {most}")
        if rank < 1 or experts * rank > self.max_rank:
            raise ValueError(
                f"{experts} experts of rank {rank} need a rank of {experts * rank}, but the greatest that is served is "
                f"{self.max_rank}"
            )

    def _check_shape(self, name: str, tensor: Tensor, *sizes: int) -> None:
        expected = (self.first.shape[0], *sizes)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have {list(expected)}")


def route_slots_reference(
    hidden_TH: Tensor,
    tables: SlotTables,
    block: int,
    slot_T: Tensor,
    gate_TR: Tensor,
    residual_TH: Tensor | None = None,
) -> None:
    """Write what multiplies each token's shrunk activations. The host waits for the slots' numbers.

    Column c of a token with a mixture gets scale times the weight of expert c // rank, columns beyond its experts 0;
    docs/maths.md has the weights. A token whose slot is none of the S, or holds no mixture, gets ones.

    Args:
        hidden_TH: [T, H] of any floating dtype, what enters the block.
        block: which of the L blocks.
        slot_T: [T] integers.
        gate_TR: [T, R] float32, written.
        residual_TH: [T, H]; what enters the block is then the sum, rounded to the dtype of hidden_TH.
    """
    tables.check(hidden_TH, slot_T, gate_TR, residual_TH)
    gate_TR.fill_(1.0)
    for slot, num_experts in enumerate(tables.num_experts.tolist()):
        tokens = (slot_T == slot).nonzero().flatten() if num_experts > 0 else slot_T[:0]
        if len(tokens) > 0:
            entering = hidden_TH[tokens] if residual_TH is None else hidden_TH[tokens] + residual_TH[tokens]
            gate_TR[tokens] = _gate_of(entering, tables, block, slot)


def _gate_of(entering_TH: Tensor, tables: SlotTables, block: int, slot: int) -> Tensor:
    """[T, R] float32 for tokens that are all of one slot, which holds a mixture."""
    experts, rows, rank = (int(table[slot]) for table in (tables.num_experts, tables.num_rows, tables.rank))
    normed = F.rms_norm(entering_TH.float(), (tables.hidden_size,), eps=EPS)
    z = F.linear(normed, tables.first[block, slot, :rows])
    if tables.has_hidden[slot]:
        z = F.linear(F.silu(z), tables.second[block, slot, :experts, :rows])
    probs = torch.softmax(z / tables.temperature[slot], dim=-1)
    chosen = probs.argsort(dim=-1, descending=True, stable=True)[:, : int(tables.top_k[slot])]
    shares = (probs * tables.outside[block, slot, :experts]).scatter(1, chosen, probs.gather(1, chosen))
    weights = shares / shares.sum(dim=-1, keepdim=True) * tables.scale[slot]
    return F.pad(weights.repeat_interleave(rank, dim=1), (0, tables.max_rank - experts * rank))
