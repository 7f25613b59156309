"""What a NaN or an overflow must not do: stay in maturity, counters and statistics after the step it was in."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import ARCHITECTURES, SCOPES, mixture_of, routers_of
from test_trainer import Rows, mixture, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moelora import MoELoraCallback
from moelora.forward.training_stats import pop_training_stats
from moelora.routing.training_sums import TrainingWindow
from moelora.training.guards import RoutingWarning

BATCH = ARCHITECTURES["llama"].batch(2, 5)
OPTIONS = {"router_type": "learned_with_maturity", "maturity_tokens": 300}


def counted(model):
    """Maturity and counters of every router."""
    return {
        name: (router["default"].maturity.clone(), router["default"].tokens_per_expert.clone())
        for name, router in routers_of(model).items()
    }


def assert_same_counts(actual, expected):
    assert actual.keys() == expected.keys()
    for name, pair in expected.items():
        for mine, theirs in zip(actual[name], pair, strict=True):
            assert torch.equal(mine, theirs), name


def spoil(model, value, where="model.layers.1"):
    """Put value into what enters a block, once."""

    def hook(block, args, kwargs):
        handle.remove()
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, 0, 0] = value
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    block = model.get_base_model().get_submodule(where)
    handle = block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


# ---- forwards that are not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_forward_that_is_not_finite_is_left_out(scope, value):
    model, healthy = (mixture_of("llama", router_scope=scope, **OPTIONS).train() for _ in range(2))
    for each in (model, healthy):
        each.base_model.routing.window = TrainingWindow()
        each(**BATCH)
    before = counted(model)
    spoil(model, value, "model.layers.0" if scope == "model" else "model.layers.1")
    for each in (model, healthy):
        each(**BATCH)
    spoilt = {name for name in before if scope == "model" or "layers.1" in name}
    expected = {name: (before if name in spoilt else counted(healthy))[name] for name in before}
    assert_same_counts(counted(model), expected)
    for stats in (model.routing_stats(), pop_training_stats(model.base_model.routing)):
        assert {name: router.non_finite for name, router in stats.items()} == {n: int(n in spoilt) for n in before}
        for name, router in stats.items():
            assert router.num_tokens == (10 if name in spoilt else 20)
            assert torch.tensor([router.entropy, router.balancing_loss, *router.expert_load]).isfinite().all()
    assert torch.isfinite(model.eval()(**BATCH).loss)


def test_the_balancing_loss_is_that_of_the_healthy_routers():
    model = mixture_of("llama", **OPTIONS).train()
    model.base_model.routing.window = TrainingWindow()
    spoil(model, float("nan"))
    output = model(**BATCH)
    stats = pop_training_stats(model.base_model.routing)
    assert output.loss.isnan()
    healthy = stats["model.layers.0"].balancing_loss
    assert healthy > 0.5 and output.balancing_loss.item() == pytest.approx(healthy / 2)


def test_evaluation_is_left_out_of_the_statistics():
    model = mixture_of("llama")
    spoil(model, float("nan"), "model.layers.0")
    with torch.no_grad():
        model(**BATCH)
        model(**BATCH)
    for router in model.routing_stats().values():
        assert router.non_finite == 1 and router.num_tokens == 10 and torch.tensor(router.entropy).isfinite()


def test_nothing_but_forwards_that_are_left_out():
    model = mixture_of("llama")
    spoil(model, float("nan"), "model.layers.0")
    with torch.no_grad():
        model(**BATCH)
    for router in model.routing_stats().values():
        assert router.non_finite == 1 and router.num_tokens == 0 and router.expert_load == [0.0] * 4


def test_a_run_says_that_forwards_were_left_out(tmp_path):
    model = mixture(router_type="learned")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.register_hook(torch.zeros_like)  # not even a learning rate of zero keeps weights from a NaN
    spoil(model, float("nan"))
    with pytest.warns(RoutingWarning, match=r"1 forwards.*model\.layers\.1.*left out") as caught:
        trainer, _ = train(model, Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()], max_steps=2, learning_rate=0.0)
    assert sum("left out" in str(warning.message) for warning in caught) == 1
    assert [entry["skipped_forwards"] for entry in trainer.state.log_history[:2]] == [1, 0]


def test_a_run_that_is_nothing_but_nan_is_logged(tmp_path):
    model = mixture(router_type="learned")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.warns(RoutingWarning, match=r"1 forwards.*model\.layers\.0, model\.layers\.1") as caught:
        trainer, _ = train(model, Rows(4, 8), tmp_path, callbacks=[MoELoraCallback(dead_after=1)], max_steps=3)
    texts = [str(warning.message) for warning in caught if warning.category is RoutingWarning]
    assert len(texts) == 1, "once until it recovers; and what counted no token is not dead"
    assert [entry["skipped_forwards"] for entry in trainer.state.log_history[:3]] == [1, 1, 1]


def worker(rank, path, job):
    torch.set_num_threads(1)
    # They meet in a file: a port that was free a moment ago may be a browser's by now.
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    try:
        torch.save(job(rank), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(tmp_path, job):
    mp.spawn(worker, args=(str(tmp_path), job), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def half_of_it_is_nan(rank):
    model = mixture_of("llama", expert_capacity_factor=None, **OPTIONS).train()
    if rank == 1:
        spoil(model, float("nan"), "model.layers.0")
    model(**BATCH)
    return counted(model), model.balancing_loss.item()


@pytest.mark.slow
def test_the_nan_of_one_rank_reaches_no_other(tmp_path):
    """Both count what the healthy one has, and so stay alike."""
    alone = mixture_of("llama", expert_capacity_factor=None, **OPTIONS).train()
    alone(**BATCH)
    for counts, loss in on_two_ranks(tmp_path, half_of_it_is_nan):
        assert_same_counts(counts, counted(alone))
        assert torch.tensor(loss).isfinite()


# ---- steps that a loss scaler skips ----


def scaled_step(model, scaler, optimizer, micro_batches=1, **zero):
    """Whether the scaler let the optimizer step."""
    optimizer.zero_grad(**zero)
    before = scaler.get_scale()
    for seed in range(micro_batches):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**ARCHITECTURES["llama"].batch(2, 5, seed=seed), use_cache=False).loss / micro_batches
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


def scaled(model, init_scale):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.amp.GradScaler("cpu", init_scale=init_scale), torch.optim.SGD(parameters, lr=1e-3)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_a_skipped_step_changes_nothing(checkpointing, micro_batches, set_to_none):
    model = mixture_of("llama", **OPTIONS).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    scaler, optimizer = scaled(model, 2.0**10)
    assert scaled_step(model, scaler, optimizer, micro_batches, set_to_none=set_to_none)
    grown = counted(model)
    assert all(maturity.max() > 0 for maturity, _ in grown.values())
    scaler.update(2.0**40)
    assert not scaled_step(model, scaler, optimizer, micro_batches, set_to_none=set_to_none)
    assert_same_counts(counted(model), grown)
    scaler.update(2.0**10)
    assert scaled_step(model, scaler, optimizer, micro_batches, set_to_none=set_to_none)
    for name, (maturity, tokens) in counted(model).items():
        assert (maturity > grown[name][0]).any() and (tokens.sum() == 2 * grown[name][1].sum())


def test_a_skipped_step_moves_no_bias():
    """Those that balance the load without a loss."""
    model = mixture_of("llama", **OPTIONS | {"load_balance_loss_type": "loss_free", "bias_update_speed": 0.5}).train()
    scaler, optimizer = scaled(model, 2.0**40)
    assert not scaled_step(model, scaler, optimizer)
    assert not any(router.selection_bias().any() for router in routers_of(model).values())
    scaler.update(2.0**10)
    assert scaled_step(model, scaler, optimizer)
    assert any(router.selection_bias().any() for router in routers_of(model).values())


def test_two_forwards_of_a_skipped_step():
    """As DPO makes them, before one backward."""
    model = mixture_of("llama", **OPTIONS).train()
    scaler, optimizer = scaled(model, 2.0**40)
    before = counted(model)
    with torch.autocast("cpu", dtype=torch.float16):
        losses = [model(**ARCHITECTURES["llama"].batch(2, 5, seed=seed)).loss for seed in range(2)]
    scaler.scale(sum(losses)).backward()
    scaler.step(optimizer)
    assert_same_counts(counted(model), before)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_skipped_step_whose_loss_comes_from_a_hidden_state(return_dict):
    model = mixture_of("llama", **OPTIONS, router_aux_loss_coef=0.0).train()
    before = counted(model)
    inputs = {"input_ids": BATCH["input_ids"], "use_cache": False}
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(**inputs, output_hidden_states=True, return_dict=return_dict)
    hidden = output.hidden_states if return_dict else output[1]
    (hidden[-1].float().square().mean() * 2.0**40).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert_same_counts(counted(model), before)


def test_a_float16_base_without_autocast():
    model = mixture_of("llama", **OPTIONS).train()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half()
    before = counted(model)
    (model(**BATCH).loss * 2.0**40).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert_same_counts(counted(model), before)


def test_no_hook_where_nothing_is_scaled():
    model = mixture_of("llama", **OPTIONS).train()
    (model(**BATCH).loss * float("inf")).backward()
    assert all(maturity.max() > 0 for maturity, _ in counted(model).values())


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def overflowing(rank, engine):
    model = mixture_of("llama", **OPTIONS).train()
    parallel = engine(model)
    with torch.autocast("cpu", dtype=torch.float16):
        parallel(**BATCH).loss.backward()
    grown = counted(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = parallel(**BATCH).loss
    (loss * (2.0**40 if rank == 1 else 1.0)).backward()  # one rank's gradients overflow, and are averaged
    return grown, counted(model)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [DistributedDataParallel, sharded], ids=["ddp", "fsdp2"])
def test_all_ranks_take_a_skipped_step_back(engine, tmp_path):
    """Where gradients are shards, a rank may not see what overflows on the other."""
    for grown, after in on_two_ranks(tmp_path, partial(overflowing, engine=engine)):
        assert all(maturity.max() > 0 for maturity, _ in grown.values())
        assert_same_counts(after, grown)


def test_the_guard_reads_no_device(monkeypatch):
    model = mixture_of("llama", **OPTIONS).train()
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, **k: (reads.append(1), _f(self, *a, **k))[1]
        )
    model(**BATCH).loss.backward()
    without = len(reads)
    with torch.autocast("cpu", dtype=torch.float16), warnings.catch_warnings():
        loss = model(**BATCH).loss
    loss.backward()
    assert len(reads) == 2 * without
