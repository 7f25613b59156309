"""Read what the routers did in training since somebody last looked, over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..ops import sums_layout
from ..routing.sums import RouterStats, RoutingSums, describe
from .state import RoutingState


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
    rows = host[: flat.numel()].split([sums_layout.size(count) + 3 for count in sizes.values()])
    columns = host[flat.numel() :].split(list(sizes.values()))
    stats = {}
    for name, row, maturity in zip(routers, rows, columns, strict=True):
        non_finite, loss, forwards = row[-3:].tolist()
        mean_loss = loss / max(forwards - non_finite, 1)
        described = describe(RoutingSums.of_packed(row[:-3]), maturity, mean_loss, non_finite)
        if described is not None:
            stats[name] = described
    return stats
