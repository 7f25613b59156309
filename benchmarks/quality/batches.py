"""Training batches: the same for every method, given a seed.

Letters: N steps, B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import Examples


@dataclass(frozen=True)
class Batches:
    """ids [N, B, S]; labels [N, B, S], or [N, B, K] of the last K tokens; mask [N, B, S], False on padding, or None."""

    ids: Tensor
    labels: Tensor
    mask: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids, labels and mask of one step."""
        return self.ids[step], self.labels[step], None if self.mask is None else self.mask[step]


def make_batches(sources: Sequence[Examples], steps: int, rows: int, seed: int, device: str) -> Batches:
    """Draw from all sources in turn, so that each has its equal share; each in a random order of its own, begun anew
    when it is through."""
    total = steps * rows
    generator = np.random.default_rng(seed)
    share = -(-total // len(sources))
    ids, labels, masks = [], [], []
    for source in sources:
        rounds = [generator.permutation(len(source)) for _ in range(-(-share // len(source)))]
        order = np.concatenate(rounds)[:share]
        ids.append(source.ids[order])
        labels.append(source.labels[order])
        masks.append(np.ones_like(source.ids[order], dtype=bool) if source.mask is None else source.mask[order])

    def arrange(parts: list) -> Tensor:
        mixed = np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])[:total]
        return torch.from_numpy(mixed).view(steps, rows, -1).to(device)

    is_padded = any(source.mask is not None for source in sources)
    return Batches(arrange(ids), arrange(labels), arrange(masks) if is_padded else None)
