"""The process group in which capacity's counts are summed."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moelora.ops.data_parallel import ROUNDS, fits_over_ranks


@pytest.fixture
def groups(monkeypatch):
    """Those that counts were summed in, in a world of one process."""
    used = []
    monkeypatch.setattr(dist, "all_reduce", lambda counts, group: used.append(group))
    yield used
    if dist.is_initialized():
        dist.destroy_process_group()


def test_counts_queue_behind_nobody_elses_collectives(groups):
    for seconds in (70, 80):  # a group that was destroyed is not used again
        timeout = timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        fits_over_ranks(torch.rand(2, 5), 1.0)
        assert len(groups) == len(ROUNDS) and len(set(groups)) == 1 and dist.group.WORLD not in groups
        assert groups[0]._get_backend(torch.device("cpu")).options._timeout == timeout
        dist.destroy_process_group()
        groups.clear()
