"""The balancing loss reaches the routers' gradient once, also where the loss is not the model's own.

Expected gradients are those of `task + coefficient * balancing loss`, put together by hand.
"""

import pickle
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin
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
from transformers import (
    DefaultFlowCallback,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerControl,
    TrainerState,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_callback import CallbackHandler

from moelora import MoELoraCallback, MoELoraConfig
from moelora.forward.caches import kv_cache

pytestmark = pytest.mark.usefixtures("alone_in_accelerate")

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
    assert kv_cache(before) is not None and kv_cache(after) is kv_cache(before)
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
