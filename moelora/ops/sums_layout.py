"""The order in which a router packs its sums, for torch and Triton alike. Shapes: E experts."""

from __future__ import annotations

from functools import cache

PARTS = (
    ("num_tokens", False),
    ("assignments", True),  # the top-k assignments
    ("top1", True),  # tokens whose most probable expert this is
    ("dropped", False),  # assignments beyond capacity
    ("mass", True),  # routing weights
    ("entropy", False),
    ("top1_probs", False),
    ("probs", True),
    ("squared_lse", False),
)
"""Each sum's name, and whether there is one for each expert."""


def sizes(num_experts: int) -> list[int]:
    """How many numbers each part has."""
    return [num_experts if by_expert else 1 for _, by_expert in PARTS]


@cache
def size(num_experts: int) -> int:
    """How many numbers there are.

    Example:
        >>> size(8)
        37
    """
    return sum(sizes(num_experts))


def num_experts_of(size: int) -> int:
    """E of that many numbers."""
    vectors = sum(by_expert for _, by_expert in PARTS)
    return (size - (len(PARTS) - vectors)) // vectors


@cache
def starts(num_experts: int) -> dict[str, int]:
    """Where each part begins, under the name by which the kernels take it: AT_ and the part's.

    Example:
        >>> starts(8)["AT_MASS"]
        18
    """
    places, place = {}, 0
    for (name, _), length in zip(PARTS, sizes(num_experts), strict=True):
        places[f"AT_{name.upper()}"] = place
        place += length
    return places


def place(name: str, num_experts: int) -> tuple[int, int]:
    """Where a part begins, and how many numbers it has.

    Example:
        >>> place("mass", 8)
        (18, 8)
    """
    start = 0
    for part, length in zip(PARTS, sizes(num_experts), strict=True):
        if part[0] == name:
            return start, length
        start += length
    raise KeyError(name)
