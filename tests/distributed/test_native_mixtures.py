"""Native mixture bases under DDP and FSDP2, whose hooks one process has as well as many."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads
from native import EXPERTS, batch, gradients, native_model, ours
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = {
    "pairs": {"target_modules": [], "target_parameters": EXPERTS},
    "pairs and linears": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "beside": {"target_modules": ["mlp.experts"]},
}


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(grads):
    return {
        name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in grads.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ddp_waits_for_no_expert(layout):
    """One token leaves most native experts idle; a parameter without gradient would end the second step."""
    inputs = {name: value[:1, :2] for name, value in batch().items()}
    plain, model = (ours(native_model("qwen3_moe"), **LAYOUTS[layout]).train() for _ in range(2))
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        expected_loss, expected = gradients(plain, inputs)
        loss, grads = gradients(wrapped, inputs)
        torch.testing.assert_close(loss, expected_loss)
        assert_same_grads(whole(grads), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fsdp2_makes_parameters_whole(layout, checkpoints):
    plain, model = (ours(native_model("gpt_oss"), **LAYOUTS[layout]).train() for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    if checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    expected_loss, expected = gradients(plain, batch())
    loss, grads = gradients(model, batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_same_grads(whole(grads), expected, rtol=1e-4, atol=1e-6)
