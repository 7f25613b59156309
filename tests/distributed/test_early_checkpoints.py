"""Transformers before 5.23 checkpoint around a block's hooks, those of FSDP2 included, which make its weights whole."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import ARCHITECTURES, assert_same_grads, mixture_of, train_step
from test_checkpointing import TOLERANCE, count_runs, same_counts
from test_triton_router import case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@pytest.fixture
def mesh():
    """Of one process: its shards are whole, but they are DTensors until FSDP2's hooks have run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def checkpoint_early(block):
    """Make the block checkpoint as in those versions."""

    class Early(type(block)):
        def __call__(self, *args, **kwargs):
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(partial(self.run, **kwargs), *args)
            return super().__call__(*args, **kwargs)

        def run(self, *args, **kwargs):
            self.gradient_checkpointing = False  # once is enough
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.gradient_checkpointing = True

    block.__class__ = Early


def sharded(mesh, use_reentrant, **options):
    """A mixture on tiny Llama under FSDP2 with early checkpoints, and the same without any of it."""
    plain, model = (mixture_of("llama", maturity_tokens=40, expert_dropout=0.3, **options) for _ in range(2))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for block in model.get_base_model().model.layers:
        checkpoint_early(block)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, plain


@pytest.mark.parametrize("scope", ["block", "module"])
def test_routes_within_the_checkpoint(mesh, scope):
    """Once counted, and with the mask, the maturity and the dropout of the first time."""
    model, plain = sharded(mesh, use_reentrant=False, router_scope=scope)
    runs = count_runs(model)
    for seed in (1, 2):
        inputs = ARCHITECTURES["llama"].batch(seed=seed)
        inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7])
        results = []
        for each in (plain, model):
            torch.manual_seed(3)
            results.append(train_step(each, inputs))
        assert len(runs) == 2 * seed, "checkpointing did not recompute"
        (expected_loss, expected), (loss, gradients) = results
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
        assert_same_grads({name: grad.full_tensor() for name, grad in gradients.items()}, expected, **TOLERANCE)
        same_counts(model, plain)


def test_the_users_own_weights_are_carried(mesh):
    model, plain = sharded(mesh, use_reentrant=False)
    inputs = ARCHITECTURES["llama"].batch() | {"routing_weights": torch.rand(3, 4)}
    results = []
    for each in (plain, model):
        torch.manual_seed(3)
        results.append(train_step(each, inputs)[1])
    gradients = {name: grad.full_tensor() for name, grad in results[1].items()}
    assert gradients.keys() == results[0].keys()
    assert_same_grads(gradients, results[0], **TOLERANCE)


def test_a_reentrant_checkpoint_is_refused_by_name(mesh):
    model, _ = sharded(mesh, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"layers\.0.*FSDP2.*use_reentrant.*False.*transformers>=5.23"):
        model.train()(**ARCHITECTURES["llama"].batch())


def test_the_triton_router_takes_no_shard(mesh):
    """It would read the shard as if it were the whole."""
    pytest.importorskip("triton")
    from moelora.ops.triton.router import serves

    hidden, weight = case((9, 3, 20, 2), torch.float32, "cpu")
    assert serves(hidden, weight, None) and not serves(
        hidden, distribute_tensor(weight.detach(), mesh, [Shard(0)]), None
    )
