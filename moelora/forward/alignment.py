"""Whether a linear reads the tokens that enter its block, by the shapes, and values of the one for the other.

Shapes: B batch, S sequence, D a linear's input width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Reads = Literal["same", "earlier", "others"]
"""Which tokens a linear reads: those that enter its block, earlier ones of the cache too, or others."""


def lines_up(read: Sequence[int], lead: Sequence[int]) -> bool:
    """Whether inputs [*read, D] hold the tokens [*lead] in their order.

    They do where only dimensions of size one differ (the latents of multi-head latent attention), or where they are
    flattened (OPT's `fc1`).

    Example:
        >>> lines_up((2, 1, 7), (2, 7)), lines_up((14,), (2, 7)), lines_up((7, 2), (2, 7))
        (True, True, False)
    """
    if tuple(read) == tuple(lead):
        return True
    if len(read) == 1 and len(lead) == 2 and read[0] == lead[0] * lead[1]:
        return True
    return [size for size in read if size != 1] == [size for size in lead if size != 1]


def fit(values: Tensor, lead: Sequence[int], x: Tensor) -> Tensor | None:
    """values [*lead, ...] of a block's tokens for x [..., D]; None where x holds other tokens.

    Example:
        >>> import torch
        >>> fit(torch.ones(2, 7, 4), (2, 7), torch.ones(2, 1, 7, 16)).shape
        torch.Size([2, 1, 7, 4])
    """
    read = x.shape[:-1]
    if read == lead:
        return values
    return values.reshape(*read, *values.shape[len(lead) :]) if lines_up(read, lead) else None
