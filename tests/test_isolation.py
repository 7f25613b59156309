"""Routing state: never shared between models, never left over from another forward, whatever went wrong in it."""

import threading

import pytest
import torch
from helpers import ARCHITECTURES, HIDDEN, SCOPES, VOCAB, every_pair, mixture_of, train_step

E = 4


@pytest.mark.parametrize("scope", SCOPES)
def test_two_models_never_share(scope):
    one, other = mixture_of("llama", router_scope=scope), mixture_of("llama", router_scope=scope)
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    with torch.no_grad():
        expected = other(**inputs).logits
        inner = []
        hook = one.base_model.model.model.layers[0].mlp.register_forward_hook(
            lambda *_: inner.append(other(**inputs).logits)  # in the middle of the other's forward
        )
        one(**inputs, routing_weights=torch.zeros(3, E))
        hook.remove()
        torch.testing.assert_close(inner[0], expected, rtol=0, atol=0)
        torch.testing.assert_close(other(**inputs).logits, expected, rtol=0, atol=0)


def test_models_run_in_threads():
    models = [mixture_of("llama"), mixture_of("llama")]
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    weights = [torch.zeros(3, E), torch.ones(3, E)]
    with torch.no_grad():
        expected = [m(**inputs, routing_weights=w).logits for m, w in zip(models, weights, strict=True)]
    failures = []

    def work(index):
        for _ in range(10):
            with torch.no_grad():
                got = models[index](**inputs, routing_weights=weights[index]).logits
            if not torch.equal(got, expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@every_pair(scope=SCOPES, where=["layers.0.mlp", "layers.1.self_attn.q_proj", "norm"], how=["forward", "generate"])
def test_exception_leaves_nothing_behind(scope, where, how):
    model = mixture_of("llama", router_scope=scope)
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    with torch.no_grad():
        expected = model(**inputs).logits

    def fail(*_):
        raise KeyError("on purpose")

    hook = model.base_model.model.model.get_submodule(where).register_forward_hook(fail)
    run = model if how == "forward" else model.generate
    with pytest.raises(KeyError, match="on purpose"):
        run(**inputs, routing_weights=torch.zeros(3, E))
    hook.remove()
    state = model.base_model.routing
    assert state.in_force.context is None and state.in_force.entry is None and state.in_force.copies is None
    assert state.in_force.call.routing_weights is None
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
        other = ARCHITECTURES["llama"].batch(2, 3, labels=False, seed=8)
        assert model(**other).logits.shape == (2, 3, VOCAB)


@pytest.mark.parametrize("scope", SCOPES)
def test_layer_called_by_itself_reuses_nothing(scope):
    """A linear called outside any forward either routes for itself or says why it cannot."""
    model = mixture_of("llama", router_scope=scope)
    model(**ARCHITECTURES["llama"].batch(labels=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match=r"model.layers.0.self_attn.q_proj.*outside its block"):
        layer(torch.randn(3, 7, HIDDEN))


@pytest.mark.parametrize("scope", SCOPES)
def test_evaluation_inside_training(scope):
    """no_grad evaluation between a forward and its backward changes no gradient, no maturity and no count."""
    inputs, other = ARCHITECTURES["llama"].batch(), ARCHITECTURES["llama"].batch(2, 5, seed=7)
    options = {"router_scope": scope, "router_type": "learned_with_maturity", "maturity_tokens": 50}
    expected, model = mixture_of("llama", **options), mixture_of("llama", **options)
    _, expected_grads = train_step(expected, inputs)
    model.train()
    loss = model(**inputs).loss
    model.eval()
    with torch.no_grad():
        model(**other, routing_weights=torch.zeros(2, E))
        model(**other)
    model.train()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected_grads[name], rtol=0, atol=0, msg=name)
    torch.testing.assert_close(model.expert_maturity, expected.expert_maturity, rtol=0, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_two_forwards_before_one_backward(scope):
    """As contrastive losses and DPO do: gradients add up as if run one by one."""
    first, second = ARCHITECTURES["llama"].batch(seed=1), ARCHITECTURES["llama"].batch(2, 5, seed=2)
    model, reference = mixture_of("llama", router_scope=scope), mixture_of("llama", router_scope=scope)
    model.train()
    (model(**first).loss + model(**second).loss).backward()
    _, one = train_step(reference, first)
    _, two = train_step(reference, second)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, one[name] + two[name], rtol=1e-5, atol=1e-6, msg=name)


def test_interrupt_leaves_nothing_behind():
    """Ctrl-C in a notebook is no Exception, and torch calls no hook for it."""
    model = mixture_of("llama")
    block = model.base_model.model.model.layers[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = block.mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**ARCHITECTURES["llama"].batch(2, 5))
    hook.remove()
    with pytest.raises(RuntimeError, match="outside its block"):
        block.self_attn.q_proj(torch.randn(2, 5, HIDDEN))


def test_threads_of_data_parallel_are_refused():
    """They would share the routers of one GPU."""
    replica = mixture_of("llama").base_model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="accelerate launch"):
        replica(**ARCHITECTURES["llama"].batch(2, 5))
