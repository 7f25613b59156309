"""What the routers did in training since somebody last looked: summed on the device, read at once, over all ranks.

Kept apart from each router's own totals, which also count evaluation and which a user may reset.
Shapes: E experts, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .stats import RouterStats, RoutingSums, counting_alone, counting_dtype, describe

if TYPE_CHECKING:
    from .state import RoutingState

Layout = tuple[tuple[str, int], ...]  # (router name, number of its sums), in the order of a forward


class TrainingWindow:
    """Sums of every router over training forwards, until they are popped.

    A step costs one concatenation and one addition for all routers together, and no synchronisation. Nearly always
    every forward runs the same routers, so one tensor per layout of a forward is one tensor.
    """

    def __init__(self) -> None:
        self._sums: dict[Layout, Tensor] = {}  # every router's sums, every router's loss, number of forwards

    def add(self, names: Sequence[str], flats: Sequence[Tensor], losses_R: Tensor) -> None:
        """Add one forward: names of its routers, their balancing losses [R] and what each counted: [4E + 6], its sums
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
        """[sum of 4E + 8]: for each router named, its sums, the forwards left out of them, its summed loss and the
        number of all its forwards; float64 where the device has it.

        The layout depends on num_experts alone, so that ranks agree on it whatever each of them ran. Sums of an
        earlier, differently sized mixture are dropped.
        """
        dtype = counting_dtype(device)
        rows = {name: torch.zeros(4 * count + 8, dtype=dtype, device=device) for name, count in num_experts.items()}
        with counting_alone():
            popped, self._sums = self._sums, {}
        for layout, total in popped.items():
            *flats, losses_R, forwards = total.to(device).split([size for _, size in layout] + [len(layout), 1])
            for (name, _), flat, loss in zip(layout, flats, losses_R.split(1), strict=True):
                if name in rows and rows[name].numel() == flat.numel() + 2:
                    rows[name] += torch.cat([flat, loss, forwards])
        return torch.cat(list(rows.values()))


def pop_training_stats(state: RoutingState) -> dict[str, RouterStats]:
    """What each router did in training since the last call, by router name, summed over data-parallel ranks.

    Every rank has to call it. The device is read once, whatever the number of routers. balancing_loss is the mean of
    the forwards' losses, which is what was optimised.
    """
    routers = {name: router for name, router in state.routers.items() if router.pool}
    if state.window is None or not routers:
        return {}
    maturities = [router.maturity() for router in routers.values()]
    sizes = {name: maturity.numel() for name, maturity in zip(routers, maturities, strict=True)}
    flat = state.window.pop(sizes, maturities[0].device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat)
    host = torch.cat([flat, *(maturity.to(flat.device) for maturity in maturities)]).cpu()
    rows = host[: flat.numel()].split([4 * count + 8 for count in sizes.values()])
    columns = host[flat.numel() :].split(list(sizes.values()))
    stats = {}
    for name, row, maturity in zip(routers, rows, columns, strict=True):
        non_finite, loss, forwards = row[-3:].tolist()
        mean_loss = loss / max(forwards - non_finite, 1)
        described = describe(RoutingSums.of_packed(row[:-3]), maturity, mean_loss, non_finite)
        if described is not None:
            stats[name] = described
    return stats
