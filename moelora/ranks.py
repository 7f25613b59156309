"""Capacity over data-parallel ranks: what one process would keep of the concatenated batch. Imports torch only.

Shapes: T this rank's tokens, E experts, N ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_ROUNDS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, bits) of each digit: 31 bits of a float that is not negative


def num_ranks() -> int:
    """N, the number of data-parallel processes: all there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def fits_over_ranks(priority_ET: Tensor, capacity_factor: float) -> Tensor:
    """[E, T] bool: the assignments that each expert keeps when it takes its most probable ones of all ranks.

    An expert keeps ``ceil(capacity_factor * assignments / E)``; of equally probable ones the first, by rank and then by
    token. Bits of floats from 0 to 1 are in the order of the floats, so the least probability that fits is found digit
    by digit: three sums of [E, 2048] counts and one exchange of [N, E] counts, however many tokens there are. Ranks may
    hold different numbers of tokens, and no process waits for its device.

    Args:
        priority_ET: [E, T] the probability of an assignment; negative where there is none.
    """
    num_experts = priority_ET.shape[0]
    key_ET = priority_ET.detach().float().contiguous().view(torch.int32)  # negative floats are negative here too
    least_E = room_E = key_ET.new_zeros(num_experts)
    for low, bits in _ROUNDS:
        counts = _counts_of_digit(key_ET, least_E, low, bits)
        dist.all_reduce(counts)
        if low == _ROUNDS[0][0]:
            share = counts.sum().double() * (capacity_factor / num_experts)
            room_E = (share * (1 - 1e-6)).ceil().int().expand(num_experts)  # as within_capacity rounds
        from_top = counts.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # assignments with this digit or a higher one
        digit = ((from_top >= room_E[:, None]).sum(-1) - 1).clamp(min=0)
        above = torch.cat([from_top, torch.zeros_like(from_top[:, :1])], dim=-1).gather(1, digit[:, None] + 1)
        room_E = room_E - above[:, 0]
        least_E = (least_E << bits) | digit.int()
    tied_ET = key_ET == least_E[:, None]
    place_ET = tied_ET.cumsum(-1, dtype=torch.int32) + _on_lower_ranks(tied_ET.sum(-1, dtype=torch.int32))[:, None]
    return (key_ET > least_E[:, None]) | (tied_ET & (place_ET <= room_E[:, None]))


def _counts_of_digit(key_ET: Tensor, prefix_E: Tensor, low: int, bits: int) -> Tensor:
    """[E, 2^bits]: assignments whose higher bits are prefix_E, by their next `bits` bits."""
    is_candidate = (key_ET >= 0) & ((key_ET >> (low + bits)) == prefix_E[:, None])
    digits = (key_ET >> low) & ((1 << bits) - 1)
    rows = torch.arange(key_ET.shape[0], device=key_ET.device)[:, None] << bits
    counts = key_ET.new_zeros(key_ET.shape[0] << bits)  # flat: in one dimension CUDA has a deterministic scatter_add
    return counts.scatter_add_(0, (rows + digits).flatten(), is_candidate.int().flatten()).view(-1, 1 << bits)


def _on_lower_ranks(count_E: Tensor) -> Tensor:
    """[E]: the sum of count_E over the ranks before this one."""
    counts_NE = count_E.new_zeros(num_ranks(), count_E.shape[0])
    counts_NE[dist.get_rank()] = count_E
    dist.all_reduce(counts_NE)
    return counts_NE[: dist.get_rank()].sum(0, dtype=torch.int32)
