"""Gradient checkpointing runs a block twice: the loss, the gradients and the counts must not notice."""

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    SCOPES,
    RandomRouter,
    assert_clean,
    assert_same_grads,
    awaken,
    config_for,
    every_pair,
    mixture_of,
    routers_of,
    train_step,
)
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

WAYS = [pytest.param(True, id="reentrant"), pytest.param(False, id="non-reentrant")]

# float32: recomputation adds gradients up in another order. Another routing is off by 1e-2 and more.
TOLERANCE = {"rtol": 1e-4, "atol": 5e-6}


def mixtures(name, scope, use_reentrant, **options):
    """The same mixture with and without checkpointing."""
    defaults = {
        "router_scope": scope,
        "router_type": "learned_with_maturity",
        "maturity_tokens": 40,
        # A balancing loss is impossible inside a reentrant checkpoint, which is where "module" routers run.
        "router_aux_loss_coef": 0.0 if scope == "module" and use_reentrant else 0.3,
    }
    plain, checkpointed = (mixture_of(name, **(defaults | options)) for _ in range(2))
    for model in (plain, checkpointed):
        model.set_expert_maturity(0, 0.7)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return plain, checkpointed


def count_runs(model):
    """How often each adapted block has run, to prove that checkpointing is on."""
    runs = []
    layer = next(
        module for name, module in model.named_modules() if name.endswith(("q_proj", ".c_attn", ".q", "query"))
    )
    layer.register_forward_hook(lambda *_: runs.append(1))
    return runs


def same_counts(actual, expected):
    assert actual.routing_stats().keys() == expected.routing_stats().keys()
    for name, stats in expected.routing_stats().items():
        theirs = actual.routing_stats()[name]
        assert theirs.num_tokens == stats.num_tokens, name
        assert theirs.expert_load == pytest.approx(stats.expert_load, abs=1e-6), name
    torch.testing.assert_close(actual.expert_maturity, expected.expert_maturity, rtol=0, atol=1e-6)
    for name, router in routers_of(expected).items():
        counted = routers_of(actual)[name].lora_router["default"].tokens_per_expert
        assert counted.tolist() == router.lora_router["default"].tokens_per_expert.tolist(), name


@every_pair(name=ARCHITECTURES, scope=SCOPES, use_reentrant=[True, False])
def test_same_loss_gradients_and_counts(name, scope, use_reentrant):
    """Two steps, the second with grown maturity; padding where the model knows it."""
    plain, checkpointed = mixtures(name, scope, use_reentrant)
    runs = count_runs(checkpointed)
    for seed in (1, 2):
        inputs = ARCHITECTURES[name].batch(seed=seed)
        if ARCHITECTURES[name].mask:
            inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7])
        runs.clear()
        expected_loss, expected_grads = train_step(plain, inputs)
        loss, grads = train_step(checkpointed, inputs)
        assert len(runs) == 2, "checkpointing did not recompute"
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
        assert_same_grads(grads, expected_grads, **TOLERANCE)
        same_counts(checkpointed, plain)


@every_pair(name=["llama", "t5"], scope=SCOPES, use_reentrant=[True, False])
def test_expert_dropout_is_drawn_once(name, scope, use_reentrant):
    """The recomputed block must drop what the first run dropped, or gradients belong to another network."""
    plain, checkpointed = mixtures(name, scope, use_reentrant, expert_dropout=0.5)
    inputs = ARCHITECTURES[name].batch()
    torch.manual_seed(3)
    expected_loss, expected = train_step(plain, inputs)
    torch.manual_seed(3)
    loss, grads = train_step(checkpointed, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert_same_grads(grads, expected, **TOLERANCE)


@every_pair(name=["llama", "t5"], scope=SCOPES, use_reentrant=[True, False])
def test_two_forwards_before_one_backward(name, scope, use_reentrant):
    """The second forward's routing must not be used when the first is recomputed."""
    plain, checkpointed = mixtures(name, scope, use_reentrant)
    first, second = ARCHITECTURES[name].batch(seed=1), ARCHITECTURES[name].batch(batch=2, length=5, seed=2)
    for model in (plain, checkpointed):
        model.train()
        (model(**first).loss + 2 * model(**second).loss).backward()
    grads = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (checkpointed, plain))
    assert_same_grads(*grads, **TOLERANCE)
    same_counts(checkpointed, plain)


@every_pair(scope=SCOPES, per=["token", "sequence"], use_reentrant=[True, False])
def test_user_weights_and_their_gradient(scope, per, use_reentrant):
    grads = []
    for model in mixtures("llama", scope, use_reentrant):
        weights = torch.rand(*((3, 7, 4) if per == "token" else (3, 4)), generator=torch.Generator().manual_seed(1))
        weights.requires_grad_()
        _, parameters = train_step(model, ARCHITECTURES["llama"].batch() | {"routing_weights": weights})
        grads.append(parameters | {"weights": weights.grad})
    grads = [{n: g for n, g in some.items() if "lora_router" not in n} for some in grads]
    assert grads[0]["weights"].abs().max() > 0
    assert_same_grads(grads[1], grads[0], **TOLERANCE)


@every_pair(name=["llama", "t5"], scope=SCOPES, use_reentrant=[True, False])
def test_attached_router(name, scope, use_reentrant):
    grads = []
    for model in mixtures(name, scope, use_reentrant):
        torch.manual_seed(4)
        model.attach_router(RandomRouter())
        grads.append(train_step(model, ARCHITECTURES[name].batch())[1])
    grads = [{n: g for n, g in some.items() if "lora_router" not in n} for some in grads]
    assert any(n.endswith("router.linear.weight") for n in grads[0])
    assert_same_grads(grads[1], grads[0], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_module_scope_in_a_reentrant_checkpoint_is_refused(name):
    """Its balancing loss would be lost without a word."""
    _, model = mixtures(name, "module", use_reentrant=True, router_aux_loss_coef=0.1)
    model.train()
    with pytest.raises(RuntimeError, match=r"q.*reentrant.*use_reentrant.*False.*router_aux_loss_coef"):
        model(**ARCHITECTURES[name].batch())
    model.eval()
    assert model(**ARCHITECTURES[name].batch()).loss > 0, "a refusal must not break the model"


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("scope", SCOPES)
def test_no_grad_forward_in_training_mode(scope, use_reentrant):
    """No backward will come, so there is nothing to lose and nothing to refuse (reference models, generation)."""
    plain, checkpointed = mixtures("llama", scope, use_reentrant, router_aux_loss_coef=0.3)
    inputs = ARCHITECTURES["llama"].batch()
    with torch.no_grad():
        expected, actual = plain.train()(**inputs).logits, checkpointed.train()(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("scope", SCOPES)
def test_evaluation_between_forward_and_backward(scope, use_reentrant):
    plain, checkpointed = mixtures("llama", scope, use_reentrant)
    inputs = ARCHITECTURES["llama"].batch()
    _, expected = train_step(plain, inputs)
    checkpointed.train()
    loss = checkpointed(**inputs).loss
    checkpointed.eval()
    with torch.no_grad():
        checkpointed(**ARCHITECTURES["llama"].batch(2, 4, seed=5), routing_weights=torch.zeros(2, 4))
    checkpointed.train()
    loss.backward()
    grads = {n: p.grad for n, p in checkpointed.named_parameters() if p.grad is not None}
    assert_same_grads(grads, expected, **TOLERANCE)


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("scope", ["block", "model"])
def test_switching_adapters_before_backward(scope, use_reentrant):
    """The recomputation belongs to the mixture of its forward; another active set must fail or not matter, not lie."""
    models = []
    for checkpointing in (False, True):
        model = mixture_of("llama", experts=True, router_scope=scope)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        models.append(model)
    inputs = ARCHITECTURES["llama"].batch()
    _, expected = train_step(models[0], inputs)
    model = models[1].train()
    loss = model(**inputs).loss
    with model.disable_adapter():
        model(**inputs)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_grads(grads, expected, **TOLERANCE)


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("scope", SCOPES)
def test_changing_the_mixture_before_backward_fails_loudly(scope, use_reentrant):
    """The recomputation would run other experts than the forward did: wrong gradients, without a word."""
    model = mixture_of("llama", experts=True, router_scope=scope, router_aux_loss_coef=0.0)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss = model.train()(**ARCHITECTURES["llama"].batch()).loss
    model.set_adapter(["expert_0", "expert_1"])
    with pytest.raises(RuntimeError, match="the mixture changed between forward and backward"):
        loss.backward()


def test_eval_mode_ignores_checkpointing():
    plain, checkpointed = mixtures("llama", "block", use_reentrant=False)
    runs = count_runs(checkpointed)
    inputs = ARCHITECTURES["llama"].batch()
    with torch.no_grad():
        torch.testing.assert_close(checkpointed(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0)
    assert len(runs) == 1


def test_foreign_checkpoint_is_refused():
    """A checkpoint within a block that does not pass routing on would recompute it with another routing."""
    model = mixture_of("llama").train()
    for block in model.base_model.model.model.layers:
        original = block.forward
        block.forward = lambda *args, original=original, **kwargs: checkpoint(
            original, *args, use_reentrant=False, **kwargs
        )
    loss = model(**ARCHITECTURES["llama"].batch()).loss
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn\.q_proj` was called outside its block"):
        loss.backward()


def test_checkpoint_around_the_whole_block_is_refused():
    model = mixture_of("llama").train()
    inputs = ARCHITECTURES["llama"].batch()
    layers = model.base_model.model.model.layers
    call = type(layers[0]).__call__

    class Wrapped(type(layers[0])):
        def __call__(self, *args, **kwargs):
            return checkpoint(lambda *a: call(self, *a, **kwargs), *args, use_reentrant=False)

    for block in layers:
        block.__class__ = Wrapped
    loss = model(**inputs).loss
    with pytest.raises(RuntimeError, match=r"model.layers.\d.*gradient_checkpointing_enable"):
        loss.backward()


@pytest.mark.parametrize("router_type", ["learned", "fixed"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_unloading_takes_the_routing_off_the_checkpoints(name, router_type):
    model = mixture_of(name, router_type=router_type)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_step(model, ARCHITECTURES[name].batch())
    for embedding in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
        embedding._forward_hooks.clear()  # transformers' own, for inputs that require a gradient
    assert_clean(model.unload() if router_type == "learned" else model.merge_and_unload())


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_second_mixture_on_the_unloaded_base_routes_for_itself(scope, use_reentrant):
    inputs = ARCHITECTURES["llama"].batch()
    config = config_for(ARCHITECTURES["llama"], router_scope=scope, router_aux_loss_coef=0.0)
    models = []
    for first in mixtures("llama", scope, use_reentrant, router_aux_loss_coef=0.0):
        train_step(first, inputs)
        models.append(get_peft_model(first.unload(), config))
        awaken(models[-1])
    (expected_loss, expected), (loss, grads) = (train_step(model, inputs) for model in models)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert_same_grads(grads, expected, **TOLERANCE)


def test_a_checkpoint_left_by_another_mixture_is_taken_over():
    """As where the tuner was discarded and not unloaded."""
    inputs = ARCHITECTURES["llama"].batch()
    plain, model = mixtures("llama", "block", use_reentrant=False)
    _, other = mixtures("llama", "block", use_reentrant=False)
    train_step(other, inputs)
    for ours, theirs in zip(*(m.base_model.model.model.layers for m in (model, other)), strict=True):
        ours._gradient_checkpointing_func = theirs._gradient_checkpointing_func
    _, expected = train_step(plain, inputs)
    assert_same_grads(train_step(model, inputs)[1], expected, **TOLERANCE)
