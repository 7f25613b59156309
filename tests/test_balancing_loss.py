"""The balancing loss reaches the routers' gradient once, also where the loss is not the model's own.

Expected gradients are those of `task + coefficient * balancing loss`, put together by hand.
"""

import copy
import math
import pickle
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin
from datasets import Dataset as Rows
from helpers import (
    ARCHITECTURES,
    SCOPES,
    assert_same_grads,
    awaken,
    config_for,
    grads_of,
    llama,
    mixture_of,
    mlp,
    routers_of,
)
from peft import get_peft_model
from test_trainer import KeepGradients, mixture, train
from tiny import tiny_tokenizer
from transformers import (
    DefaultFlowCallback,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerControl,
    TrainerState,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_callback import CallbackHandler

from moelora import MoELoraCallback, MoELoraConfig

COEF = 3.0
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32: gradients of several paths are added up in another order
BATCH = ARCHITECTURES["llama"].batch(3, 7)
INPUTS = {"input_ids": BATCH["input_ids"], "use_cache": False}


def tiny_mixture(**options):
    return mixture_of("llama", **({"router_aux_loss_coef": COEF} | options)).train()


def task(output):
    """Some loss that is not the model's own."""
    logits = output[0] if isinstance(output, tuple) else output.logits
    return logits.log_softmax(-1)[..., 5].mean()


@contextmanager
def carrying_nothing(model):
    """Outputs that only hold the balancing loss, as they do where its coefficient is zero."""
    config = model.base_model.routing.config
    config.router_aux_loss_coef, before = 0.0, config.router_aux_loss_coef
    yield
    config.router_aux_loss_coef = before


def by_hand(model, task=task, share=1.0, **inputs):
    """Gradients of the task's loss and the balancing loss."""
    model.zero_grad()
    with carrying_nothing(model):
        output = model(**(INPUTS | inputs), return_dict=True)
    (task(output) + COEF * share * output.balancing_loss).backward()
    return grads_of(model)


def alone(model, task=task, **inputs):
    """Gradients of the task's loss, as a trainer takes them that knows nothing of the mixture."""
    model.zero_grad()
    task(model(**(INPUTS | inputs))).backward()
    return grads_of(model)


# ---- every output carries it, once ----

TASKS = {
    "logits": task,
    "last hidden state": lambda output: output.hidden_states[-1].square().mean(),
    "first hidden state": lambda output: output.hidden_states[1].square().mean(),
    "two outputs": lambda output: task(output) + output.hidden_states[-1].square().mean(),
    "changed in place": lambda output: output.logits.div_(0.5).log_softmax(-1)[..., 5].mean(),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_of_ones_own(scope, task):
    model = tiny_mixture(router_scope=scope)
    model.enable_input_require_grads()  # so that hidden states before the first adapted block have a gradient too
    expected = by_hand(model, task, output_hidden_states=True)
    assert_same_grads(alone(model, task, output_hidden_states=True), expected, **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name):
    model = mixture_of(name, router_aux_loss_coef=COEF).train()
    inputs = ARCHITECTURES[name].batch(labels=False)
    model(**inputs).logits.square().mean().backward()
    actual = grads_of(model)
    model.zero_grad()
    with carrying_nothing(model):
        output = model(**inputs)
    (output.logits.square().mean() + COEF * output.balancing_loss).backward()
    assert_same_grads(actual, grads_of(model), **CLOSE)


def test_a_tuple():
    model = tiny_mixture()
    assert_same_grads(alone(model, return_dict=False), by_hand(model), **CLOSE)


def test_a_tensor():
    """Of a model that is none of transformers'."""
    model, x = mlp_mixture(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    actual = grads_of(model)
    model.zero_grad()
    with carrying_nothing(model):
        loss = model(x).square().mean()
    (loss + COEF * model.base_model.balancing_loss).backward()
    assert_same_grads(actual, grads_of(model), **CLOSE)


def mlp_mixture():
    torch.manual_seed(1)
    options = {"target_modules": ["first", "second"], "router_scope": "module", "router_aux_loss_coef": COEF}
    return get_peft_model(mlp(), MoELoraConfig(r=2, num_experts=3, **options)).train()


def test_an_output_that_can_carry_nothing_is_said():
    model = mlp_mixture()
    model.get_base_model().forward = lambda x: SimpleNamespace(y=model.get_base_model().second(torch.zeros(2, 16)))
    with pytest.warns(UserWarning, match=r"cannot reach the routers.*SimpleNamespace.*model\.balancing_loss"):
        model(torch.zeros(2, 8))


def test_the_models_own_loss_is_taken_as_it_is():
    """Beside a loss from its logits too."""
    model, labels = tiny_mixture(), {"labels": BATCH["labels"]}
    for loss in (lambda output: output.loss, lambda output: output.loss + task(output)):
        expected = by_hand(model, loss, **labels)
        assert_same_grads(alone(model, loss, **labels), expected, **CLOSE)


@pytest.mark.parametrize("name", ["balancing_loss", "aux_loss"])
def test_a_loss_added_by_hand_counts_once(name):
    model = tiny_mixture()
    model.zero_grad()
    output = model(**INPUTS)
    (task(output) + 0.5 * output[name]).backward()
    actual = grads_of(model)
    plain = tiny_mixture(router_aux_loss_coef=0.0)
    output = plain(**INPUTS)
    (task(output) + 0.5 * output.balancing_loss).backward()
    assert_same_grads(actual, grads_of(plain), **CLOSE)


def test_two_backward_passes_bring_it_once():
    model = tiny_mixture()
    output = model(**INPUTS)
    for weight in (1.0, 2.0):
        (weight * task(output)).backward(retain_graph=True)
    actual = grads_of(model)
    assert_same_grads(actual, by_hand(model, lambda output: 3.0 * task(output)), **CLOSE)


def test_two_backward_passes_through_the_models_own_loss_are_two():
    model = tiny_mixture()
    output = model(**INPUTS, labels=BATCH["labels"])
    output.loss.backward(retain_graph=True)
    once = grads_of(model)
    task(output).backward(retain_graph=True)  # has come already
    output.loss.backward()
    actual = grads_of(model)
    plain = tiny_mixture(router_aux_loss_coef=0.0)
    expected = alone(plain)
    assert_same_grads(actual, {name: 2 * once[name] + grad for name, grad in expected.items()}, **CLOSE)


def test_the_gradient_is_zero_where_the_models_own_loss_is_multiplied_by_zero():
    """As some trainers do to keep engines content: the other output counts."""
    model = tiny_mixture()
    actual = alone(model, lambda output: 0.0 * output.loss + task(output), labels=BATCH["labels"])
    assert_same_grads(actual, by_hand(model), **CLOSE)


def test_not_a_number_stays_one():
    model = tiny_mixture()
    (model(**INPUTS).balancing_loss * float("nan")).backward()
    assert all(p.grad.isnan().all() for p in routers_of(model)["model.layers.1"].parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, plain = tiny_mixture(), tiny_mixture()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_grads(alone(model), by_hand(plain), rtol=1e-4, atol=5e-6)


def test_evaluation_carries_nothing():
    model, plain = tiny_mixture().eval(), tiny_mixture(router_aux_loss_coef=0.0).eval()
    assert_same_grads(alone(model), alone(plain), rtol=0, atol=0)
    with torch.no_grad():
        output = model.train()(**INPUTS)
    assert not output.logits.requires_grad and "aux_loss" not in output


# ---- outputs ----


def inner_output(model, **inputs):
    """What the base model made, as it was before the mixture saw it, and what became of it."""
    made = []
    base = model.get_base_model()
    handle = base.register_forward_hook(lambda module, args, output: made.append(dict(output)), prepend=True)
    try:
        return made, model(**(INPUTS | inputs))
    finally:
        handle.remove()


def test_without_a_coefficient_outputs_are_what_they_were():
    (before,), after = inner_output(tiny_mixture(router_aux_loss_coef=0.0), output_hidden_states=True)
    assert before and all(after[name] is value for name, value in before.items())


def test_what_has_no_gradient_is_what_it_was():
    (before,), after = inner_output(tiny_mixture(), output_hidden_states=True, use_cache=True)
    assert after.past_key_values is before["past_key_values"]
    assert after.hidden_states[0] is before["hidden_states"][0] and not after.hidden_states[0].requires_grad
    assert after.logits is not before["logits"] and torch.equal(after.logits, before["logits"])
    assert after.logits.data_ptr() == before["logits"].data_ptr()
    assert isinstance(after, CausalLMOutputWithPast) and after.aux_loss is after.balancing_loss
    assert torch.equal(pickle.loads(pickle.dumps(after.logits.detach())), after.logits)


def test_a_native_mixtures_own_aux_loss_stays():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=64, num_hidden_layers=1, num_local_experts=2, output_router_logits=True)
    )
    options = {"num_experts": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, MoELoraConfig(r=2, **options)).train()
    (before,), after = inner_output(model)
    assert torch.equal(after.aux_loss, before["aux_loss"])
    assert not torch.equal(after.aux_loss, after.balancing_loss)


# ---- trainers ----


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


@pytest.fixture(autouse=True)
def _alone_in_accelerate():
    """What an earlier Accelerator told is none of this test's."""
    state = GradientState()
    before = dict(state.plugin_kwargs), state.sync_gradients
    yield
    state.plugin_kwargs, state.sync_gradients = before


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


def base_of(cls):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
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


def test_a_reference_of_trls_does_not_join_the_mixture(tmp_path):
    """It copies parameters, not maturity, and expects the copy to stand aside."""
    model = ready_mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'ref'.*joins it.*`ref_model=copy\.deepcopy\(model\).*`peft_config`"):
        preference_trainer(tmp_path, model=model)
    assert model.active_adapters == ["default"] and model.state_dict().keys() == before.keys()


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


# ---- a loss scaler ----


def told(model, scaler):
    """The callback as a Trainer calls it, whose optimizer accelerate has given the scaler."""
    args = SimpleNamespace(gradient_accumulation_steps=1)
    handler = CallbackHandler(
        [DefaultFlowCallback(), MoELoraCallback()], model, None, SimpleNamespace(scaler=scaler), None
    )
    handler.on_train_begin(args, TrainerState(), TrainerControl())
    return handler


def scaled_step(model, scaler):
    """Gradients as an optimizer would see them, of a step whose loss the scaler multiplied."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = task(model(**INPUTS))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return grads_of(model)


def scaler_of(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_the_callback_tells_the_scale():
    model, scaler = tiny_mixture(), scaler_of(2.0**9)
    handler = told(model, scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = scaled_step(model, scaler)
    unscaled = scaled_step(tiny_mixture(), torch.amp.GradScaler("cpu", enabled=False))
    routers = [name for name in actual if "lora_router" in name]
    # float16 has 11 bits, and gradients through it are rounded anew for each scale.
    assert_same_grads({n: actual[n] for n in routers}, {n: unscaled[n] for n in routers}, rtol=2e-2, atol=5e-3)
    copied = pickle.loads(pickle.dumps(model))
    assert copied.base_model.routing.loop is None and model.base_model.routing.loop.scaler() is scaler
    handler.on_train_end(SimpleNamespace(), TrainerState(), TrainerControl())
    assert model.base_model.routing.loop is None


def test_a_scaler_that_nobody_tells_of_is_said_once():
    model, labelled, scaler = tiny_mixture(), tiny_mixture(), scaler_of(2.0**9)
    with pytest.warns(UserWarning, match=r"too small.*scaler.*MoELoraCallback.*bfloat16.*labels"):
        scaled_step(model, scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled_step(model, scaler_of(2.0**9))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = labelled(**INPUTS, labels=BATCH["labels"]).loss
        scaler.scale(loss).backward()


# ---- accumulation ----


def test_accumulation_by_accelerate():
    GradientState().plugin_kwargs = GradientAccumulationPlugin(num_steps=4).to_kwargs()
    model = tiny_mixture()
    assert_same_grads(alone(model), by_hand(model, share=0.25), **CLOSE)


def test_accumulation_that_nobody_tells_of_is_said_once():
    model = tiny_mixture()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # steps of one forward, and of two before one backward
            (task(model(**INPUTS)) + task(model(**INPUTS))).backward()
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(2):  # whose loss is the model's own
            model(**INPUTS, labels=BATCH["labels"]).loss.backward()
        model.zero_grad()
        task(model(**INPUTS)).backward()
    with pytest.warns(UserWarning, match=r"each of them adds the whole balancing loss.*accumulate"):
        task(model(**INPUTS)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(model(**INPUTS)).backward()


# ---- torch.compile ----


def test_a_compiled_model():
    """Its backward has zeros in place of the gradients that there are not."""
    torch.compiler.reset()
    config = config_for(ARCHITECTURES["llama"], target_modules=["q_proj", "up_proj"], router_aux_loss_coef=COEF)
    plain, model = (get_peft_model(llama(num_hidden_layers=1), config).train() for _ in range(2))
    for each in (plain, model):
        awaken(each)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = {"labels": BATCH["labels"]}
    for loss in (task, lambda output: output.loss, lambda output: output.loss + task(output)):
        model.zero_grad()
        loss(compiled(**INPUTS, **labels)).backward()
        expected = by_hand(plain) if loss is task else alone(plain, loss, **labels)
        assert_same_grads(grads_of(model), expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
