"""transformers' and TRL's trainers on a mixture, beside plain LoRA: routers, balancing loss, reference, checkpoints.

Each takes steps with its own defaults (gradient checkpointing among them) on a tiny random model. "fresh": it is given
the base model and a configuration; "loaded": a mixture that has learned something, of which TRL's preference and RL
trainers make a frozen copy, `ref`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from helpers import awaken
from peft import LoraConfig, PeftModel, get_peft_model
from test_balancing_loss import carrying_nothing
from test_balancing_loss_in_trainers import Texts
from test_balancing_loss_in_trainers import base_of as small_base
from test_trainer import KeepGradients
from tiny import tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainingArguments
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from moelora import MoELoraConfig

pytestmark = pytest.mark.usefixtures("alone_in_accelerate")
COEF = 0.5
TARGETS = ["q_proj", "up_proj"]
TEXTS = [{"text": text} for text in ("hello world", "abc def", "a longer piece of text than the one before", "zzz yyy")]
PROMPTS = [{"prompt": "hello "}, {"prompt": "a longer prompt "}] * 2
PAIRS = [
    {"prompt": "ab ", "chosen": "c d", "rejected": "a much longer text"},
    {"prompt": "cd ", "chosen": "a text of some length", "rejected": "e"},
    {"prompt": "what ", "chosen": "yes", "rejected": "no, and for many reasons"},
    {"prompt": "x ", "chosen": "y", "rejected": "z"},
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS
    for kind in ("chosen", "rejected")
]
WITHOUT_PROMPTS = [{name: pair[name] for name in ("chosen", "rejected")} for pair in PAIRS]


def sum_of_letters(completions, **_):
    """A reward that is hardly ever the same for two answers."""
    return [float(sum(map(ord, completion)) % 97) for completion in completions]


def own_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@dataclass
class Case:
    """A trainer, its arguments, and what its loss compares the policy with."""

    trainer: type
    arguments: type
    rows: Any
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # of the trainer itself
    base: type = LlamaForCausalLM

    @property
    def is_trls(self) -> bool:
        return self.trainer is not transformers.Trainer


ROLL_OUT = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
TOGETHER = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
}
CASES = {
    "Trainer": Case(transformers.Trainer, TrainingArguments, Texts(4)),
    "SFT": Case(trl.SFTTrainer, trl.SFTConfig, TEXTS),
    "SFT with label smoothing": Case(trl.SFTTrainer, trl.SFTConfig, TEXTS, {"label_smoothing_factor": 0.1}),
    "SFT with dft": Case(trl.SFTTrainer, trl.SFTConfig, TEXTS, {"loss_type": "dft"}),
    "SFT with compute_loss_func": Case(trl.SFTTrainer, trl.SFTConfig, TEXTS, extra={"compute_loss_func": own_loss}),
    "DPO": Case(trl.DPOTrainer, trl.DPOConfig, PAIRS),
    "KTO": Case(trl.KTOTrainer, trl.KTOConfig, JUDGED),
    "ORPO": Case(ORPOTrainer, ORPOConfig, PAIRS),
    "CPO": Case(CPOTrainer, CPOConfig, PAIRS),
    "GRPO": Case(trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, ROLL_OUT, {"reward_funcs": sum_of_letters}),
    "GRPO, continuous batching": Case(
        trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, ROLL_OUT | TOGETHER, {"reward_funcs": sum_of_letters}
    ),
    "RLOO": Case(trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, ROLL_OUT, {"reward_funcs": sum_of_letters}),
    "Reward": Case(trl.RewardTrainer, trl.RewardConfig, WITHOUT_PROMPTS, base=LlamaForSequenceClassification),
}
ROLLING_OUT = ("GRPO", "GRPO, continuous batching", "RLOO")
WITH_REFERENCE = ("DPO", "KTO", *ROLLING_OUT)


def in_stages(names):
    """The trainers by name; continuous batching is for the second stage but for one test of its own."""
    return [pytest.param(name, marks=[pytest.mark.slow] if "batching" in name else []) for name in names]


def base_of(cls):
    """Its weights are large, so that its log-probabilities tell adapters, and routes, apart."""
    return small_base(cls, initializer_range=0.3)


def configuration(case, method, coef):
    task = "CAUSAL_LM" if case.base is LlamaForCausalLM else "SEQ_CLS"
    if method == "LoRA":
        return LoraConfig(r=4, target_modules=TARGETS, task_type=task)
    return MoELoraConfig(r=2, target_modules=TARGETS, task_type=task, router_aux_loss_coef=coef)


def loaded(case, folder, method="mixture", coef=COEF):
    """An adapter that has learned something, as it comes from its folder."""
    model = get_peft_model(base_of(case.base), configuration(case, method, coef))
    awaken(model)
    if method == "mixture":
        model.set_expert_maturity("default", 1.0)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base_of(case.base), folder, is_trainable=True)


def trainer_of(name, folder, start="loaded", method="mixture", coef=COEF, model=None, callbacks=None, **options):
    case = CASES[name]
    defaults = {
        "output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    if case.is_trls:
        defaults |= {"bf16": False}
    if "max_length" in case.arguments.__dataclass_fields__:
        defaults |= {"max_length": 48}
    config = configuration(case, method, coef)
    if start == "loaded" and model is None:
        model = loaded(case, folder / "start", method, coef)
    if model is not None:
        given = {"model": model}
    elif case.is_trls:
        given = {"model": base_of(case.base), "peft_config": config}
    else:
        given = {"model": get_peft_model(base_of(case.base), config)}
    if case.is_trls:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        given |= {"processing_class": tokenizer}
    arguments = case.arguments(**(defaults | case.options | options))
    rows = Dataset.from_list(case.rows) if case.is_trls else case.rows
    return case.trainer(args=arguments, train_dataset=rows, callbacks=callbacks, **given, **case.extra)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state_of(model, adapter="default"):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if adapter in name.split(".")}


# ---- routers, and their balancing loss -------------------------------------------------------------------------------


class Watch(KeepGradients):
    """The gradients of every step, and the batches of the policy's forwards in it."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.batches, self.now = trainer, [], []
        trainer.add_callback(self)
        trainer.model.get_base_model().register_forward_pre_hook(self.note, with_kwargs=True, prepend=True)

    def note(self, module, args, kwargs):
        if torch.is_grad_enabled() and self.trainer.model.active_adapter == "default":
            self.now.append({name: kwargs[name] for name in ("input_ids", "attention_mask")})

    def on_pre_optimizer_step(self, *args, **kwargs):
        super().on_pre_optimizer_step(*args, **kwargs)
        self.batches.append(self.now)
        self.now = []


def router_gradient(gradients):
    return torch.cat([gradient.flatten() for name, gradient in gradients.items() if "moe_router" in name])


def balancing_gradient(model, batches):
    model.train().zero_grad()
    with carrying_nothing(model):
        for batch in batches:
            (COEF * model(**batch, use_cache=False).balancing_loss).backward()
    return router_gradient({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("name", in_stages(CASES))
def test_routers_learn_and_the_balancing_loss_comes_once(tmp_path, name):
    gradients = {}
    for coef in (COEF, 0.0):
        transformers.set_seed(1)
        trainer = trainer_of(name, tmp_path / str(coef), coef=coef, max_grad_norm=0.0)
        before = state_of(trainer.model)
        router_weights = [key for key in before if "moe_router" in key and key.endswith(".weight")]
        watch = Watch(trainer)
        trainer.train()
        assert len(router_weights) == 2 and [len(batches) for batches in watch.batches] == [1, 1]
        assert len(watch.steps) == 2 and all(math.isfinite(loss) for loss in losses(trainer))
        assert all(router_gradient(step).abs().max() > 0 for step in watch.steps)
        after = state_of(trainer.model)
        assert all(not torch.equal(after[key], before[key]) for key in router_weights)
        gradients[coef] = router_gradient(watch.steps[0])
    model = loaded(CASES[name], tmp_path / "again")
    model.base_model.routing.is_dropless = trainer.model.base_model.routing.is_dropless
    expected = balancing_gradient(model, watch.batches[0])
    added = gradients[COEF] - gradients[0.0]
    assert expected.abs().max() > 1e-3
    assert (added @ expected / (expected @ expected)).item() == pytest.approx(1.0, abs=1e-3)
    rounding = 1e-5 * gradients[0.0].abs().max().item()
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=max(rounding, 1e-5))


# ---- the reference ---------------------------------------------------------------------------------------------------


def spy_on_log_probs(trainer):
    """(whether with gradients, the adapter that is active, log-probabilities) of every forward of an RL trainer.

    Rows are sorted, as the trainer shuffles them after the roll-out.
    """
    compute, seen = trainer._get_per_token_logps_and_entropies, []

    def note(*args, **kwargs):
        result = compute(*args, **kwargs)
        log_probs = result[0].detach()
        seen.append((torch.is_grad_enabled(), trainer.model.active_adapter, log_probs[log_probs[:, 0].argsort()]))
        return result

    trainer._get_per_token_logps_and_entropies = note
    return seen


@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("method", ["mixture", "LoRA"])
@pytest.mark.parametrize("start", ["fresh", "loaded"])
@pytest.mark.parametrize("when", ["in the step", "before"])
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_the_first_loss_is_that_of_a_policy_that_equals_its_reference(tmp_path, name, when, start, method):
    trainer = trainer_of(name, tmp_path, start, method, seed=2, precompute_ref_log_probs=when == "before")
    assert ("ref" in trainer.model.peft_config) == (start == "loaded")
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx({"DPO": math.log(2), "KTO": 0.5}[name], abs=1e-5)
    assert second != pytest.approx(first, abs=1e-4), "the policy has moved"


@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("method", ["mixture", "LoRA"])
@pytest.mark.parametrize("start", ["fresh", "loaded"])
@pytest.mark.parametrize("name", in_stages(ROLLING_OUT))
def test_what_was_rolled_out_is_trained_with_the_ratio_one(tmp_path, name, start, method):
    """The policy has the same log-probabilities before its first step and in it, and so has the reference."""
    trainer = trainer_of(name, tmp_path, start, method, num_iterations=2, max_steps=3)
    seen = spy_on_log_probs(trainer)
    trainer.train()
    old, reference, new, again = seen[:4]
    assert [grad for grad, _, _ in seen[:4]] == [False, False, True, True]
    assert reference[1] == ("ref" if start == "loaded" else "default")
    for _, _, log_probs in (new, reference):
        torch.testing.assert_close(log_probs, old[2], rtol=1e-5, atol=1e-5)
    assert (again[2] - old[2]).abs().max() > 1e-5, "the policy has moved"


@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("name", in_stages(WITH_REFERENCE))
def test_the_reference_stands_still_with_the_maturity_that_it_had(tmp_path, name):
    """TRL copies parameters; maturity is a buffer."""
    trainer = trainer_of(name, tmp_path)
    start = {key.replace("default", "ref"): tensor for key, tensor in state_of(trainer.model).items()}
    trainer.train()
    reference = state_of(trainer.model, "ref")
    assert reference.keys() == start.keys() and all(torch.equal(reference[key], start[key]) for key in start)
    assert trainer.model.active_adapters == ["default"]
    assert not any(p.requires_grad for key, p in trainer.model.named_parameters() if "ref" in key.split("."))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("start", ["fresh", "loaded"])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_ends_as_the_one_that_went_on(tmp_path, name, start):
    whole = trainer_of(name, tmp_path / "whole", start, save_strategy="steps", save_steps=1)
    whole.train()
    again = trainer_of(name, tmp_path / "again", start)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-1"))
    assert losses(again)[-1] == losses(whole)[-1] and again.state.global_step == 2
    for adapter in whole.model.peft_config:
        expected, actual = state_of(whole.model, adapter), state_of(again.model, adapter)
        assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in actual)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("name", CASES)
def test_what_was_trained_is_saved_loaded_and_trained_on(tmp_path, name):
    """A save of a training with a reference holds that too; the next training makes its own."""
    first = trainer_of(name, tmp_path / "first")
    first.train()
    first.save_model(str(tmp_path / "saved"))
    model = PeftModel.from_pretrained(base_of(CASES[name].base), tmp_path / "saved", is_trainable=True)
    assert model.active_adapters == ["default"]
    expected, actual = state_of(first.model), state_of(model)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in actual)
    second = trainer_of(name, tmp_path / "second", model=model)
    second.train()
    after = state_of(second.model, "ref")
    assert bool(after) == (name in WITH_REFERENCE)
    assert all(torch.equal(tensor, expected[key.replace("ref", "default")]) for key, tensor in after.items())


# ---- beside plain LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
@pytest.mark.parametrize("name", CASES)
def test_a_fresh_mixture_begins_as_plain_lora_does(tmp_path, name):
    """Neither has changed the base model yet: all that the first step logs of the task is the same."""
    logs = {}
    for method in ("mixture", "LoRA"):
        transformers.set_seed(1)
        trainer = trainer_of(name, tmp_path / method, "fresh", method, coef=0.0)
        trainer.train()
        logs[method] = trainer.state.log_history[0]
    assert logs["mixture"].keys() == logs["LoRA"].keys()
    for key, value in logs["LoRA"].items():
        if key not in ("grad_norm", "step_time"):
            assert logs["mixture"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


# ---- the page --------------------------------------------------------------------------------------------------------


def support_table():
    """The rows of docs/support.md about trainers."""
    file = "tests/test_trainers.py"
    no_reference = "not tested because its loss has none"
    references = {
        **dict.fromkeys(("DPO", "KTO"), test_the_first_loss_is_that_of_a_policy_that_equals_its_reference.__name__),
        **dict.fromkeys(ROLLING_OUT, test_what_was_rolled_out_is_trained_with_the_ratio_one.__name__),
    }
    columns = {
        "what": lambda name: name,
        "routers learn; the balancing loss is in their gradient once": lambda name: (
            f"tested by `{file}::{test_routers_learn_and_the_balancing_loss_comes_once.__name__}`[{name}]"
        ),
        "the reference is right": lambda name: (
            f"tested by `{file}::{references[name]}`[{name}]" if name in references else no_reference
        ),
        "resumes exactly; loads and trains on": lambda name: (
            f"tested by `{file}::{test_a_resumed_training_ends_as_the_one_that_went_on.__name__}`[{name}], "
            f"`{file}::{test_what_was_trained_is_saved_loaded_and_trained_on.__name__}`[{name}]"
        ),
    }
    lines = [list(columns), ["---"] * len(columns), *([cell(name) for cell in columns.values()] for name in CASES)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


def test_the_page_has_this_table():
    table = support_table()
    page = Path(__file__).parents[1] / "docs" / "support.md"
    assert table in page.read_text(encoding="utf-8"), f"put this table into {page}:\n{table}"
