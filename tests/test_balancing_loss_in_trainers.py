"""The balancing loss reaches the routers' gradient where a trainer computes the loss: transformers' and TRL's."""

import copy
import math

import pytest
import torch
import trl
from datasets import Dataset as Rows
from helpers import (
    assert_same_grads,
    awaken,
    grads_of,
)
from peft import get_peft_model
from test_balancing_loss import COEF, carrying_nothing
from test_trainer import KeepGradients, mixture, train
from tiny import tiny_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from moelora import MoELoraCallback, MoELoraConfig

pytestmark = pytest.mark.usefixtures("alone_in_accelerate")

# ---- transformers' Trainer ----


class Texts(torch.utils.data.Dataset):
    """Rows of unequal length: 3 to 8 tokens."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(2)
        self.rows = [torch.randint(1, 40, (9,), generator=generator) for _ in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        mask = (torch.arange(9) < 3 + 2 * index % 7).long()
        ids = self.rows[index] * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def smoothed(logits, labels, num_items):
    """transformers' LabelSmoother with epsilon 0.1."""
    log_probs = -logits[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    kept = labels != -100
    nll = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].sum()
    uniform = log_probs[kept].sum() / logits.shape[-1]
    return (0.9 * nll + 0.1 * uniform) / num_items


def own_loss(outputs, labels, num_items_in_batch=None):
    return smoothed(outputs.logits, labels, num_items_in_batch)


WAYS = {"label smoothing": {"label_smoothing_factor": 0.1}, "compute_loss_func": {"compute_loss_func": own_loss}}
SUMMED = {"rtol": 1e-4, "atol": 5e-6}  # over micro-batches, whose rows the Trainer's batches hold in another layout


def step_by_hand(rows, shares):
    """One optimizer step's gradients: micro-batches of one row, and the share of the balancing loss of each."""
    model = mixture(router_aux_loss_coef=0.0).train()
    num_items = sum((row["labels"][1:] != -100).sum() for row in rows)
    for row, share in zip(rows, shares, strict=True):
        inputs = {name: tensor[None] for name, tensor in row.items()}
        labels = inputs.pop("labels")
        output = model(**inputs)
        (smoothed(output.logits, labels, num_items) + COEF * share * output.balancing_loss).backward()
    return grads_of(model)


def steps_of(tmp_path, rows, way, micro_batches, callbacks, **options):
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": micro_batches, "learning_rate": 0.0}
    return train(mixture(router_aux_loss_coef=COEF), rows, tmp_path, callbacks, **options, **WAYS[way])[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_without_accumulation(tmp_path, way):
    rows = Texts(2)
    steps = steps_of(tmp_path, rows, way, 1, (), max_steps=2)
    for step, row in zip(steps, rows, strict=True):
        assert_same_grads(step, step_by_hand([row], [1.0]), **SUMMED)


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_accumulates(tmp_path, way):
    """The last step of the epoch is shorter, and its last micro-batch makes up for what is missing."""
    rows = Texts(5)
    steps = steps_of(tmp_path, rows, way, 3, [MoELoraCallback()], max_steps=-1, num_train_epochs=1)
    assert len(steps) == 2
    assert_same_grads(steps[0], step_by_hand([rows[i] for i in range(3)], [1 / 3] * 3), **SUMMED)
    assert_same_grads(steps[1], step_by_hand([rows[3], rows[4]], [1 / 3, 2 / 3]), **SUMMED)


def test_a_trainer_that_accumulates_and_tells_nothing(tmp_path):
    """The model sees which micro-batch is the last, not how many there are."""
    rows = Texts(5)
    with pytest.warns(UserWarning, match=r"only the last one.*MoELoraCallback") as caught:
        steps = steps_of(tmp_path, rows, "compute_loss_func", 3, (), max_steps=-1, num_train_epochs=1)
    assert sum("only the last one" in str(warning.message) for warning in caught) == 1
    assert_same_grads(steps[0], step_by_hand([rows[i] for i in range(3)], [0.0, 0.0, 1.0]), **SUMMED)
    assert_same_grads(steps[1], step_by_hand([rows[3], rows[4]], [0.0, 1.0]), **SUMMED)


# ---- TRL ----

PAIRS = {
    "rejected is longer": {"prompt": "ab ", "chosen": "c d", "rejected": "a much longer text"},
    "chosen is longer": {"prompt": "ab ", "chosen": "a much longer text", "rejected": "c d"},
}


def base_of(cls, **options):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | options
    return cls(LlamaConfig(**size, vocab_size=300, bos_token_id=None, eos_token_id=0, pad_token_id=0, num_labels=1))


def assert_trl_brings_it(trainer_class, config_class, base, task_type, pairs, tmp_path):
    """In one step of two micro-batches. B is zero, so the task gives the routers no gradient."""
    args = config_class(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_grad_norm=0.0, learning_rate=0.0, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, max_length=48,
    )  # fmt: skip
    config = MoELoraConfig(
        r=2, num_experts=4, target_modules=["q_proj", "up_proj"], router_aux_loss_coef=COEF, router_type="learned",
        task_type=task_type,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    keep, batches = KeepGradients(), []
    trainer = trainer_class(
        model=base, args=args, train_dataset=Rows.from_list(pairs), processing_class=tokenizer, peft_config=config,
        callbacks=[keep, MoELoraCallback()],
    )  # fmt: skip

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            batches.append({name: kwargs[name] for name in ("input_ids", "attention_mask")})

    trainer.model.get_base_model().register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    trainer.train()
    assert len(batches) == 2
    assert_balancing_term(keep.steps[0], list(batches), trainer.model)


def assert_balancing_term(gradients, batches, model):
    model.train().zero_grad()
    with carrying_nothing(model):
        for batch in batches:
            (COEF / len(batches) * model(**batch, use_cache=False).balancing_loss).backward()
    expected = {name: grad for name, grad in grads_of(model).items() if "router" in name}
    assert max(grad.abs().max() for grad in expected.values()) > 1e-3
    assert_same_grads({name: gradients[name] for name in expected}, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_dpo(tmp_path, pair):
    base = base_of(LlamaForCausalLM)
    assert_trl_brings_it(trl.DPOTrainer, trl.DPOConfig, base, "CAUSAL_LM", [pair] * 2, tmp_path)


def test_a_reward_model(tmp_path):
    pairs = [{name: text for name, text in pair.items() if name != "prompt"} for pair in PAIRS.values()]
    base = base_of(LlamaForSequenceClassification)
    assert_trl_brings_it(trl.RewardTrainer, trl.RewardConfig, base, "SEQ_CLS", pairs, tmp_path)


def preference_trainer(tmp_path, **options):
    """DPO on a mixture that has learned something already."""
    args = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=48,
        logging_steps=1,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pairs = Rows.from_list(list(PAIRS.values()))
    return trl.DPOTrainer(args=args, train_dataset=pairs, processing_class=tokenizer, **options)


def ready_mixture():
    config = MoELoraConfig(
        r=2, num_experts=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", expert_capacity_factor=None
    )
    model = get_peft_model(base_of(LlamaForCausalLM), config)
    awaken(model)
    model.set_expert_maturity("default", 1.0)
    return model


def test_a_reference_that_is_given(tmp_path):
    model = ready_mixture()
    reference = copy.deepcopy(model).get_base_model()
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    trainer = preference_trainer(tmp_path, model=model, ref_model=reference)
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert math.isclose(float(first["loss"]), math.log(2), abs_tol=1e-5), "policy and reference differ at the start"
    assert not math.isclose(float(second["loss"]), math.log(2), abs_tol=1e-4), "they are still the same"
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
