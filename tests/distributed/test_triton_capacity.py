"""The Triton router with a capacity that ranks share, in a group of one, against the kernel of one process."""

import pytest
import torch
import torch.distributed as dist
from helpers import every_pair
from test_triton_router import CLOSE, MASKS, MATURITY, case, fused

from moelora.ops.data_parallel import ROUNDS

SHAPE = (70, 3, 20, 2)  # tokens, experts, width, top-k; the interpreter takes a while for each expert


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_pair(maturity=["learned", "mixed"], mask=MASKS, factor=[0.01, 0.5, 1.25, 10.0])
def test_same_weights_sums_and_gradients(kernel_device, group, maturity, mask, factor, monkeypatch):
    monkeypatch.setattr("moelora.ops.triton.router.COUNTED_TOKENS", 64)  # several programs for an expert
    hidden, weight = case(SHAPE, torch.float32, kernel_device)
    options = {
        "top_k": SHAPE[3],
        "scale": 1.5,
        "capacity_factor": factor,
        "mask_T": MASKS[mask] and MASKS[mask](SHAPE[0]).to(kernel_device),
        "maturity_E": MATURITY[maturity] and MATURITY[maturity](SHAPE[1]).to(kernel_device),
    }
    (shared, sums), (single, expected) = (fused(hidden, weight, over_ranks=on, **options) for on in (True, False))
    assert torch.equal(shared, single) and torch.equal(sums.dropped, expected.dropped)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(sums, name), value, rtol=1e-5, atol=1e-4, msg=name)
    upstream = torch.randn_like(single)
    gradients = [torch.autograd.grad((weights * upstream).sum(), (hidden, weight)) for weights in (shared, single)]
    for actual, its in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, its, **CLOSE)


def test_sums_queue_behind_nobody_elses_collectives(kernel_device, group, monkeypatch):
    groups, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda counts, group: groups.append(group) or all_reduce(counts, group=group)
    )
    hidden, weight = case(SHAPE, torch.float32, kernel_device)
    fused(hidden, weight, top_k=SHAPE[3], capacity_factor=0.5, over_ranks=True)
    assert len(groups) == len(ROUNDS) and dist.group.WORLD not in groups


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_never_synchronises_with_the_host():
    from moelora.ops.triton.router import route_fused

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    hidden, weight = case((130, 7, 20, 3), torch.float32, "cuda")
    options = {"top_k": 3, "capacity_factor": 0.5, "over_ranks": True}
    route_fused(hidden, weight, **options)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route_fused(hidden, weight, **options)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
