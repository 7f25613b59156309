"""What the routers did in training since somebody last looked: summed on the device, read at once, over all ranks.

Kept apart from each router's own totals, which also count evaluation and which a user may reset.
Shapes: E experts, R routers, F sums of a router.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import sums_layout
from .sums import counting_alone, counting_dtype

Layout = tuple[tuple[str, int], ...]  # (router name, number of its sums), in the order of a forward


class TrainingWindow:
    """Sums of every router over training forwards, until they are popped.

    A step costs one concatenation and one addition for all routers together, and no synchronisation. Nearly always
    every forward runs the same routers, so one tensor per layout of a forward is one tensor.
    """

    def __init__(self) -> None:
        self._sums: dict[Layout, Tensor] = {}  # every router's sums, every router's loss, number of forwards

    def add(self, names: Sequence[str], flats: Sequence[Tensor], losses_R: Tensor) -> None:
        """Add one forward: names of its routers, their balancing losses [R] and what each counted: [F + 1], its sums
        and whether this forward is left out of them."""
        layout = tuple((name, flat.numel()) for name, flat in zip(names, flats, strict=True))
        device = losses_R.device
        total = torch.cat([*(flat.to(device) for flat in flats), losses_R.detach(), losses_R.new_ones(1)])
        total = total.to(counting_dtype(device))
        with counting_alone():
            if layout in self._sums:
                total += self._sums[layout].to(device)
            self._sums[layout] = total

    def pop(self, num_experts: dict[str, int], device: torch.device) -> Tensor:
        """[sum of F + 3]: for each router named, its sums, the forwards left out of them, its summed loss and the
        number of all its forwards; float64 where the device has it.

        The layout depends on num_experts alone, so that ranks agree on it whatever each of them ran. Sums of an
        earlier, differently sized mixture are dropped.
        """
        dtype = counting_dtype(device)
        sizes = {name: sums_layout.size(count) + 3 for name, count in num_experts.items()}
        rows = {name: torch.zeros(size, dtype=dtype, device=device) for name, size in sizes.items()}
        with counting_alone():
            popped, self._sums = self._sums, {}
        for layout, total in popped.items():
            *flats, losses_R, forwards = total.to(device).split([size for _, size in layout] + [len(layout), 1])
            for (name, _), flat, loss in zip(layout, flats, losses_R.split(1), strict=True):
                if name in rows and rows[name].numel() == flat.numel() + 2:
                    rows[name] += torch.cat([flat, loss, forwards])
        return torch.cat(list(rows.values()))
