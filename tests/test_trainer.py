"""The balancing loss under an unmodified transformers Trainer."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from moelora import MoELoraConfig
from moelora.training.callback import MoELoraCallback

VOCAB, LENGTH = 40, 9


def mixture(vocab_size=VOCAB, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=vocab_size,
    )
    fields = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "num_experts": 3,
        "task_type": "CAUSAL_LM",
        "router_aux_loss_coef": 0.5,
        "expert_capacity_factor": None,
    }
    model = get_peft_model(LlamaForCausalLM(config), MoELoraConfig(**(fields | options)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


class Rows(Dataset):
    def __init__(self, num_distinct, num_rows):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, VOCAB, (num_distinct, LENGTH), generator=generator)
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        ids = self.ids[index % len(self.ids)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def train(model, dataset, tmp_path, callbacks=(), compute_loss_func=None, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    keep = KeepGradients()
    args = TrainingArguments(**(defaults | options))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        callbacks=[keep, *callbacks],
        compute_loss_func=compute_loss_func,
    )
    trainer.train()
    return trainer, keep.steps


def test_optimises_task_plus_coefficient_times_balance(tmp_path):
    dataset = Rows(4, 4)
    model = mixture()
    batch = {key: torch.stack([dataset[i][key] for i in range(4)]) for key in dataset[0]}
    model.train()
    output = model(**batch)
    task_loss = model.get_base_model().loss_function(output.logits, batch["labels"], VOCAB)
    expected_loss = task_loss + 0.5 * output.balancing_loss
    torch.testing.assert_close(output.loss, expected_loss)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    expected = dict(zip(names, torch.autograd.grad(expected_loss, parameters), strict=True))

    _, (gradients,) = train(mixture(), dataset, tmp_path)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("loss_type", ["aux_loss", "switch", "z_loss"])
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity"])
def test_accumulated_gradients_equal_one_large_batch(tmp_path, loss_type, router_type):
    # Every micro-batch holds the same two rows: the load f, which multiplies P, is then that of the large batch.
    options = {"load_balance_loss_type": loss_type, "router_type": router_type, "maturity_tokens": 50}
    dataset = Rows(2, 8)
    _, (large,) = train(mixture(**options), dataset, tmp_path, per_device_train_batch_size=8)
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    _, (accumulated,) = train(mixture(**options), dataset, tmp_path, **accumulation)
    for name, gradient in large.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_z_loss_is_exact_for_different_micro_batches(tmp_path):
    # z_loss is a mean over tokens, so equal micro-batches add up whatever they hold.
    options = {"load_balance_loss_type": "z_loss", "router_aux_loss_coef": 2.0}
    dataset = Rows(8, 8)
    _, (large,) = train(mixture(**options), dataset, tmp_path, per_device_train_batch_size=8)
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    _, (accumulated,) = train(mixture(**options), dataset, tmp_path, **accumulation)
    for name, gradient in large.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_reports_task_loss_alone(tmp_path):
    dataset = Rows(4, 4)
    model = mixture(router_aux_loss_coef=100.0)
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=args, eval_dataset=dataset)
    batch = {key: torch.stack([dataset[i][key] for i in range(4)]) for key in dataset[0]}
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    task_loss = model.get_base_model().loss_function(logits, batch["labels"], VOCAB)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task_loss.item(), rel=1e-5)
    assert trainer.predict(dataset).predictions.shape == (4, LENGTH, VOCAB)


def test_balancing_loss_is_logged_by_its_own_name(tmp_path):
    model = mixture()
    trainer, _ = train(model, Rows(4, 8), tmp_path, callbacks=[MoELoraCallback()], max_steps=2)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["balancing_loss"] == pytest.approx(1.0, abs=0.5)
    assert second["balancing_loss"] == pytest.approx(model.balancing_loss.item(), rel=1e-6)


def test_maturity_grows_once_per_optimizer_step(tmp_path):
    one = mixture(maturity_tokens=1000)
    train(one, Rows(2, 8), tmp_path, per_device_train_batch_size=8)
    four = mixture(maturity_tokens=1000)
    train(four, Rows(2, 8), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(four.expert_maturity, one.expert_maturity)
    assert one.expert_maturity.sum().item() == pytest.approx(8 * LENGTH / 1000, rel=1e-4)  # all mass, once


@pytest.mark.parametrize("adapter_names", [["default"], ["expert_0", "expert_1", "expert_2"]], ids=["whole", "single"])
@pytest.mark.parametrize("load_best", [False, True])
def test_resume_equals_the_uninterrupted_run(tmp_path, adapter_names, load_best):
    options = {"maturity_tokens": 300, "expert_dropout": 0.1}
    schedule = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    if load_best:
        schedule |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}

    def build():
        if adapter_names == ["default"]:
            return mixture(**options)
        fields = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "num_experts": 3, "task_type": "CAUSAL_LM"}
        config = MoELoraConfig(**(fields | options))
        torch.manual_seed(0)
        base = mixture().unload()
        model = get_peft_model(base, config, adapter_name=adapter_names[0])
        for name in adapter_names[1:]:
            model.add_adapter(name, config)
        return model

    def run(folder, **extra):
        model = build()
        plain = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        args = TrainingArguments(output_dir=str(folder), **plain, **schedule)
        trainer = Trainer(model=model, args=args, train_dataset=Rows(8, 8), eval_dataset=Rows(2, 2))
        trainer.train(**extra)
        return model

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.active_adapters == adapter_names
    expected = {n: t for n, t in whole.state_dict().items() if "lora_" in n}
    actual = resumed.state_dict()
    assert any(n.endswith("maturity") for n in expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    trainable = [n for n, p in whole.named_parameters() if p.requires_grad]
    assert [n for n, p in resumed.named_parameters() if p.requires_grad] == trainable
