"""Capacity over data-parallel ranks: what one process would keep of the concatenated batch. Imports torch only.

Shapes: T this rank's tokens, E experts, N ranks.
"""

from __future__ import annotations

import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# (lowest bit, bits) of each digit of the 30 bits of a float from 0 to 1. At every sum over ranks all wait for each
# other, so there are few, and small ones: for 8 experts 64 KiB, 128 KiB and 4 KiB for each rank, which neither NVLink
# nor a slow network notices much beside its latency. The last digit is the shortest, because it is counted for each
# rank; with two digits of 15 bits there would be one sum fewer, but 1 MiB each, the second for each rank.
ROUNDS = ((19, 11), (7, 12), (0, 7))


# Weak, so that the group ends with dist.destroy_process_group: one that outlives it aborts the process at exit.
_groups: weakref.WeakValueDictionary[str, dist.ProcessGroup] = weakref.WeakValueDictionary()


def num_ranks() -> int:
    """N, the number of data-parallel processes: all there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(counts: Tensor) -> None:
    """Add up counts over all ranks, in place, in a process group of their own.

    A group works off its collectives in the order they were asked for. In the group of all ranks stand FSDP2's gathers
    and DDP's gradients too, behind which these counts, and with them the block, would have to wait. Two groups at work
    at once are safe where every rank asks in the same order, as all do here: it is the order of the program.
    """
    dist.all_reduce(counts, group=_group_of_counts())


def _group_of_counts() -> dist.ProcessGroup:
    """The group, made at the first sum; all ranks come to it together."""
    group = _groups.get("counts")
    if group is None:
        _groups["counts"] = group = dist.new_group(timeout=_timeout())
    return group


# torch.compile calls it while it traces, and keeps the group: what torch.compiler.assume_constant_result sets, which
# imports the whole compiler.
_group_of_counts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _timeout() -> timedelta | None:
    """What init_process_group was given; None, which is the backend's own, where a backend does not tell."""
    world = dist.group.WORLD
    assert world is not None
    try:
        return world._get_backend(world._device_types[0]).options._timeout
    except (AttributeError, RuntimeError):
        return None


def fits_over_ranks(priority_ET: Tensor, capacity_factor: float) -> Tensor:
    """[E, T] bool: the assignments that each expert keeps when it takes its most probable ones of all ranks.

    An expert keeps ``ceil(capacity_factor * assignments / E)``; of equally probable ones the first, by rank and then by
    token. Bits of floats from 0 to 1 are in the order of the floats, so the least probability that fits is found digit
    by digit: three sums of counts over ranks, however many tokens there are. Counts of the last digit stay apart by
    rank, which tells what ties on lower ranks. Ranks may hold different numbers of tokens, and no process waits for its
    device. The Triton router (ops/triton/capacity_kernels.py) sums the same counts, so ranks may run either form.

    Args:
        priority_ET: [E, T] the probability of an assignment; negative where there is none.
    """
    num_experts = priority_ET.shape[0]
    key_ET = priority_ET.detach().float().contiguous().view(torch.int32)  # negative floats are negative here too
    least_E = room_E = key_ET.new_zeros(num_experts)
    for low, bits in ROUNDS:
        counts_NF = _counts_of_digit(key_ET, least_E, low, bits)
        sum_over_ranks(counts_NF)
        if low == ROUNDS[0][0]:
            share = counts_NF[0, -1].double() * (capacity_factor / num_experts)
            room_E = (share * (1 - 1e-6)).ceil().int().expand(num_experts)  # as within_capacity rounds
        counts_NED = counts_NF[:, :-1].unflatten(1, (num_experts, 1 << bits))
        counts_ED = counts_NED.sum(0, dtype=torch.int32)
        from_top = counts_ED.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # with this digit or a higher one
        digit_E1 = ((from_top >= room_E[:, None]).sum(-1, keepdim=True) - 1).clamp(min=0)
        room_E = room_E - (from_top - counts_ED).gather(1, digit_E1)[:, 0]
        least_E = (least_E << bits) | digit_E1[:, 0].int()
    on_lower_ranks_E1 = counts_NED[: dist.get_rank()].sum(0, dtype=torch.int32).gather(1, digit_E1)
    tied_ET = key_ET == least_E[:, None]
    place_ET = tied_ET.cumsum(-1, dtype=torch.int32) + on_lower_ranks_E1
    return (key_ET > least_E[:, None]) | (tied_ET & (place_ET <= room_E[:, None]))


def count_rows(low: int) -> int:
    """Rows of the counts of the digit at bit `low`: one that all ranks add to; for the last digit one for each rank."""
    return 1 if low > 0 else num_ranks()


def _counts_of_digit(key_ET: Tensor, prefix_E: Tensor, low: int, bits: int) -> Tensor:
    """[count_rows, E * 2^bits + 1]: assignments whose higher bits are prefix_E, by their next bits; last, all."""
    is_candidate = (key_ET >= 0) & ((key_ET >> (low + bits)) == prefix_E[:, None])
    digits = (key_ET >> low) & ((1 << bits) - 1)
    rows = torch.arange(key_ET.shape[0], device=key_ET.device)[:, None] << bits
    counts_NF = key_ET.new_zeros(count_rows(low), (key_ET.shape[0] << bits) + 1)
    mine = counts_NF[dist.get_rank() % len(counts_NF)]  # flat: in one dimension CUDA has a deterministic scatter_add
    mine.scatter_add_(0, (rows + digits).flatten(), is_candidate.int().flatten())
    mine[-1] = is_candidate.sum()
    return counts_NF
