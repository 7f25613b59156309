"""Live monitoring: what the routers did reaches every logger, exactly and without synchronising at every step."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from helpers import LLAMA_TARGETS, VOCAB, llama, mixture_of
from peft import LoraConfig, get_peft_model
from test_trainer import LENGTH, Rows, mixture, train
from tiny import tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from moelora import MoELoraCallback, MoELoraConfig
from moelora.forward.training_stats import pop_training_stats
from moelora.routing.sums import RouterStats
from moelora.routing.training_sums import TrainingWindow
from moelora.training.guards import RoutingGuard, RoutingWarning, narrowness

ROUTERS = ["model.layers.0", "model.layers.1"]


class Recorder(TrainerCallback):
    """Stands where the Trainer puts TensorBoard, W&B, MLflow and Trackio: before the user's callbacks."""

    seen: list

    def on_log(self, args, state, control, logs=None, **kwargs):
        type(self).seen.append(dict(logs))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "seen", [], raising=False)
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [Recorder])
    return Recorder


def logged(recorder):
    return [logs for logs in recorder.seen if "loss" in logs]


# What the loggers get


def test_loggers_get_every_routers_values(tmp_path, recorder):
    train(mixture(router_type="learned"), Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()], max_steps=2)
    first, _ = logged(recorder)
    for name in ROUTERS:
        loads = [first[f"routers/{name}/expert_load/{expert}"] for expert in range(3)]
        assert sum(loads) == pytest.approx(1)
        assert len(set(loads)) > 1
        assert 0 < first[f"routers/{name}/entropy"] <= 1.0987
        assert 1 / 3 <= first[f"routers/{name}/top1_probability"] <= 1
        assert first[f"routers/{name}/dropped"] == 0
        assert first[f"routers/{name}/dead_experts"] == 0
        assert all(0 < first[f"routers/{name}/maturity/{expert}"] < 1 for expert in range(3))
    for overall, key in (("router_entropy", "entropy"), ("router_top1_probability", "top1_probability"),
                         ("balancing_loss", "balancing_loss"), ("expert_load/1", "expert_load/1")):  # fmt: skip
        mean = sum(first[f"routers/{name}/{key}"] for name in ROUTERS) / 2
        assert first[overall] == pytest.approx(mean), overall


def test_capacity_shows_as_dropped_assignments(tmp_path, recorder):
    model = mixture(router_type="learned", expert_capacity_factor=0.5)
    train(model, Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()])
    assert logged(recorder)[0]["dropped_assignments"] == pytest.approx(0.5, abs=0.1)


def test_tensorboard_shows_them(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"report_to": ["tensorboard"], "max_steps": 2}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        trainer, _ = train(mixture(), Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()], **options)
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    board = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = board.Scalars("train/routers/model.layers.1/expert_load/2")
    assert [event.step for event in shown] == [1, 2]
    kept = trainer.state.log_history[1]["routers"]["model.layers.1"]["expert_load"][2]
    assert shown[1].value == pytest.approx(kept, rel=1e-3)
    assert board.Scalars("train/balancing_loss")


def test_the_console_line_stays_short(tmp_path, recorder, capsys):
    trainer, _ = train(mixture(), Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()])
    printed = capsys.readouterr().out
    assert "balancing_loss" in printed and "dead_experts" in printed
    assert "routers/" not in printed and "expert_load/" not in printed
    late = Recorder()
    trainer.add_callback(late)  # after the printer: it must get the details all the same
    recorder.seen.clear()
    trainer.args.max_steps = 2
    trainer.train()
    with_details = [logs for logs in logged(recorder) if f"routers/{ROUTERS[0]}/entropy" in logs]
    assert len(with_details) == len(logged(recorder)) == 4


class Beginnings(TrainerCallback):
    count = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.count += 1


def test_callbacks_begin_once_wherever_it_was_added(tmp_path):
    """Adding it last makes the Trainer pass all others before it takes its place at their front."""
    others = [Beginnings(), Beginnings()]
    trainer, _ = train(mixture(), Rows(4, 8), tmp_path)
    for callback in (*others, MoELoraCallback()):
        trainer.callback_handler.callbacks.append(callback)  # `add_callback` warns of a class that is there already
    trainer.train()
    assert [other.count for other in others] == [1, 1]


def test_details_can_be_left_out(tmp_path, recorder):
    train(mixture(), Rows(4, 8), tmp_path, callbacks=[MoELoraCallback(per_router=False)])
    assert not [key for key in logged(recorder)[0] if key.startswith("routers/")]
    assert "router_entropy" in logged(recorder)[0]


def test_the_log_history_keeps_routers_as_json(tmp_path):
    trainer, _ = train(mixture(), Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()])
    entry = json.loads(json.dumps(trainer.state.log_history))[0]
    assert list(entry["routers"]) == ROUTERS
    assert len(entry["routers"][ROUTERS[0]]["maturity"]) == 3
    assert entry["routers"][ROUTERS[0]]["dead_experts"] == []


def test_a_mixture_that_is_none_logs_nothing(tmp_path, recorder):
    train(mixture(use_moe_routing=False, expert_capacity_factor=1.25, num_experts=4, router_aux_loss_coef=0.01),
          Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()])  # fmt: skip
    assert set(logged(recorder)[0]) <= {"loss", "grad_norm", "learning_rate", "epoch"}


def test_trl_logs_them_too(tmp_path, recorder):
    trl = pytest.importorskip("trl")
    texts = Dataset.from_dict({"text": ["hello world, this is text", "abc def", "a longer piece", "zzz yyy"]})
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         vocab_size=300, bos_token_id=None, eos_token_id=0)  # fmt: skip
    args = trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[],
                         logging_steps=1, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=MoELoraConfig(r=2, target_modules="all-linear", num_experts=3, task_type="CAUSAL_LM"),
        callbacks=[MoELoraCallback()],
    )
    trainer.train()
    (logs,) = logged(recorder)
    assert sum(logs[f"routers/model.layers.1/expert_load/{expert}"] for expert in range(3)) == pytest.approx(1)
    assert "routers" in trainer.state.log_history[0]


# What is counted


def batch(lengths, width=LENGTH, seed=3):
    ids = torch.randint(2, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def watched(**options):
    model = mixture_of("llama", **options).train()
    model.base_model.routing.window = TrainingWindow()
    return model


def stats_of(model):
    return pop_training_stats(model.base_model.routing)


def without_maturity(stats):
    """Maturity is a state of the model, which every training forward moves."""
    return {name: replace(router, maturity=[]) for name, router in stats.items()}


def test_padding_and_evaluation_do_not_count():
    model = watched()
    model(**batch([5, 2]))
    model.eval()
    model(**batch([9, 9]))
    with torch.no_grad():
        model.train()(**batch([9, 9]))
    padded = stats_of(model)
    assert {router.num_tokens for router in padded.values()} == {7}
    other = batch([5, 2])
    other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, 7)
    model(**other)
    assert without_maturity(stats_of(model)) == without_maturity(padded)
    assert stats_of(model) == {}, "popped"


def test_all_padding_and_one_token():
    model = watched()
    model(**batch([0, 0]) | {"labels": torch.full((2, LENGTH), -100)})
    assert stats_of(model) == {}
    model(**batch([1], width=1))
    assert {router.num_tokens for router in stats_of(model).values()} == {1}


def test_a_window_adds_up_over_micro_batches():
    model = watched()
    losses = [model(**batch(lengths, seed=seed)).balancing_loss.item() for seed, lengths in enumerate([[9, 9], [3, 1]])]
    stats = stats_of(model)
    assert {router.num_tokens for router in stats.values()} == {22}
    assert sum(router.balancing_loss for router in stats.values()) / 2 == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_mixture_that_grew_starts_counting_anew():
    model = watched(experts=True)
    model(**batch([9]))
    model.add_adapter("expert_4", model.peft_config["expert_0"])
    assert stats_of(model) == {}
    model(**batch([9]))
    assert {len(router.expert_load) for router in stats_of(model).values()} == {5}


def tensors_within(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "__dict__"):
        for inner in (value if isinstance(value, dict) else vars(value)).values():
            yield from tensors_within(inner)


def test_counting_goes_on_beyond_what_float32_can_count():
    """One token more than 2**24, which float32 takes for none."""
    model = watched()
    model(**batch([8]))
    routing = model.base_model.routing
    sums = [*tensors_within(routing.window)]
    for router in routing.routers.values():
        sums += tensors_within(router.totals)
    assert len(sums) == 3
    for total in sums:
        total.mul_(2**21)
    for _ in range(3):
        model(**batch([1], width=1))
    for stats in (stats_of(model), model.routing_stats()):
        assert {router.num_tokens for router in stats.values()} == {2**24 + 3}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: `.item()`, `bool(tensor)`, indices of a mask."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        return function(*args, **(kwargs or {}))


def reads_of_a_step(model, monkeypatch):
    with monkeypatch.context() as patch, Reads() as reads:
        for name in ("tolist", "numpy", "cpu"):  # which no dispatch tells of tensors that lie on the CPU
            patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a step calls {name}()"))
        patch.setattr("moelora.forward.state.without_nothing", lambda mask: mask)  # which reads masks on a CPU alone
        model(**batch([9, 4])).loss.backward()
    return reads.count


def test_no_step_reads_the_device_more_often_than_plain_lora_does(monkeypatch):
    """transformers itself looks whether a mask hides anything."""
    plain = get_peft_model(llama(), LoraConfig(r=2, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM")).train()
    assert reads_of_a_step(watched(), monkeypatch) == reads_of_a_step(plain, monkeypatch)


# Two data-parallel processes


def global_batch():
    return batch([2, 9, 4, 7])


def worker(rank, path):
    torch.set_num_threads(1)
    # They meet in a file: a port that was free a moment ago may be a browser's by now.
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    try:
        model = watched(expert_capacity_factor=None)
        model(**{name: tensor.chunk(2)[rank] for name, tensor in global_batch().items()})
        torch.save(stats_of(model), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_statistics_are_summed_over_ranks(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    model = watched(expert_capacity_factor=None)
    model(**global_batch())
    assert first == second
    for name, expected in stats_of(model).items():
        assert first[name].num_tokens == expected.num_tokens == 22
        for key in ("expert_load", "mean_probability", "entropy", "top1_probability", "balancing_loss", "maturity"):
            assert getattr(first[name], key) == pytest.approx(getattr(expected, key), rel=1e-5), key


# Warnings


def router(load, dead=(), probability=None):
    return RouterStats(100, load, probability or load, 0.5, 0.6, 0.0, [1.0] * len(load), list(dead), 1.0)


CONFIG = MoELoraConfig(num_experts=4, top_k_experts=1)


def test_a_dead_expert_is_reported_once_until_it_recovers():
    guard = RoutingGuard(dead_after=20, collapsed_after=1000, collapse_share=0.95)
    dead, alive = {"a": router([0.5, 0.3, 0.2, 0.0], [3])}, {"a": router([0.4, 0.3, 0.2, 0.1])}
    assert guard.check(dead, 10, CONFIG) == []
    (message,) = guard.check(dead, 10, CONFIG)
    assert "expert 3 of a for 20 steps" in message and "`router_aux_loss_coef` (0.01)" in message
    assert guard.check(dead, 10, CONFIG) == []
    assert guard.check(alive, 10, CONFIG) == []
    assert guard.check(dead, 10, CONFIG) == []
    assert len(guard.check(dead, 10, CONFIG)) == 1


def test_a_collapsed_router_is_reported():
    guard = RoutingGuard(dead_after=1000, collapsed_after=20, collapse_share=0.95)
    narrow = {"a": router([0.97, 0.01, 0.01, 0.01]), "b": router([0.3, 0.3, 0.2, 0.2])}
    assert guard.check(narrow, 10, CONFIG) == []
    (message,) = guard.check(narrow, 10, CONFIG)
    assert "router of a has collapsed" in message and "97%" in message and "lower the learning rate" in message


def test_narrowness_knows_dense_mixtures():
    assert narrowness(router([0.25] * 4), 4) == 0.25
    assert narrowness(router([0.25] * 4, probability=[0.99, 0.01, 0, 0]), 4) == 0.99
    assert narrowness(router([0.5, 0.5, 0, 0]), 2) == 1.0


def test_many_dead_experts_make_one_short_warning():
    guard = RoutingGuard(dead_after=1, collapsed_after=1000, collapse_share=0.95)
    stats = {f"layer.{i}": router([1.0, 0.0, 0.0, 0.0], [1, 2, 3]) for i in range(30)}
    (message,) = guard.check(stats, 5, CONFIG)
    assert "and 87 more" in message and len(message) < 600


def test_a_run_warns_and_goes_on(tmp_path):
    model = mixture(router_type="learned", top_k_experts=1, router_aux_loss_coef=0.0)
    with torch.no_grad():
        for module in model.base_model.routing.routers.values():
            module["default"].weight.zero_()  # all tied: top-k takes the first
    callback = MoELoraCallback(dead_after=2, collapsed_after=3)
    with pytest.warns(RoutingWarning) as caught:
        trainer, _ = train(model, Rows(4, 8), tmp_path, callbacks=[callback], max_steps=4, learning_rate=0.0)
    texts = [str(warning.message) for warning in caught if warning.category is RoutingWarning]
    assert len(texts) == 2
    assert "dead weight" in texts[0] and "collapsed" in texts[1]
    assert trainer.state.global_step == 4
    assert trainer.state.log_history[0]["dead_experts"] == 4


def test_a_healthy_run_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoutingWarning)
        callback = MoELoraCallback(dead_after=2, collapsed_after=2)
        train(mixture(), Rows(4, 8), tmp_path, callbacks=[callback], max_steps=3)


def test_a_trainer_that_hides_its_handler_is_told_where_to_put_the_callback(monkeypatch):
    monkeypatch.setattr("moelora.training.callback._calling_handler", lambda: None)
    with pytest.warns(RoutingWarning, match=r"callbacks\.insert\(0"):
        args = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True, max_steps=1, save_strategy="no",
                                 disable_tqdm=True)  # fmt: skip
        Trainer(model=mixture(), args=args, train_dataset=Rows(1, 8), callbacks=[MoELoraCallback()]).train()
