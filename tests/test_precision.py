"""Low-precision bases, autocast, .to(dtype): routing decisions stay those of float32."""

import pytest
import torch
from helpers import ARCHITECTURES, SCOPES, awaken, config_for, every_pair, llama, mixture_of, routers_of, train_step
from peft import get_peft_model

INPUTS = ARCHITECTURES["llama"].batch(3, 7)
NO_LABELS = {"input_ids": INPUTS["input_ids"]}
LOW = [torch.bfloat16, torch.float16]


def low_mixture(dtype, autocast_adapter_dtype, **overrides):
    torch.manual_seed(1)
    config = config_for(ARCHITECTURES["llama"], router_type="learned_with_maturity", **overrides)
    model = get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    awaken(model)
    return model.eval()


@every_pair(dtype=[*LOW, torch.float32], autocast_adapter_dtype=[True, False], scope=SCOPES)
def test_parameters_follow_peft_and_outputs_the_base(dtype, autocast_adapter_dtype, scope):
    model = low_mixture(dtype, autocast_adapter_dtype, router_scope=scope)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    kinds = {name: p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert {kind for name, kind in kinds.items() if "lora_A" in name} == {expected}
    assert {kind for name, kind in kinds.items() if "lora_router" in name} == {expected}
    with torch.no_grad():
        output = model(**NO_LABELS).logits
    assert output.dtype == dtype
    exact = mixture_of("llama", router_scope=scope, router_type="learned_with_maturity")
    with torch.no_grad():
        reference = exact(**NO_LABELS).logits
    tolerance = 1e-5 if dtype == torch.float32 else 30 * torch.finfo(dtype).eps
    assert (output.float() - reference).norm() / reference.norm() < tolerance
    loss, grads = train_step(model, INPUTS)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert {grads[name].dtype for name in kinds} == {expected}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_routing_maths_is_float32(dtype, scope, monkeypatch):
    """What route() is given and returns, under a low-precision base and inside autocast."""
    from moelora.tuner import router as module

    seen = []

    def spy(logits, **kwargs):
        seen.append(logits.dtype)
        routing = original(logits, **kwargs)
        seen.extend([routing.weights.dtype, routing.probs.dtype])
        return routing

    original = module.route
    monkeypatch.setattr(module, "route", spy)
    model = low_mixture(dtype, False, router_scope=scope)
    with torch.no_grad():
        model(**NO_LABELS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixture_of("llama", router_scope=scope)(**NO_LABELS)
    assert len(seen) > 0 and set(seen) == {torch.float32}


@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_routes_like_float32(scope):
    """The first decision reads float32 embeddings: autocast must not change it."""
    model = mixture_of("llama", router_scope=scope if scope != "module" else "model")
    with torch.no_grad():
        model(**NO_LABELS)
        expected = next(iter(model.routing_stats(reset=True).values()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**NO_LABELS)
        actual = next(iter(model.routing_stats().values()))
    assert actual.mean_probability == expected.mean_probability and actual.expert_load == expected.expert_load


@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_trains(scope):
    plain, cast = mixture_of("llama", router_scope=scope), mixture_of("llama", router_scope=scope)
    expected, _ = train_step(plain, INPUTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = train_step(cast, INPUTS)
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_casting_the_whole_model(dtype, scope):
    model = mixture_of("llama", router_scope=scope, router_type="learned_with_maturity", maturity_tokens=1000)
    model.set_expert_maturity(1, 0.1234567)
    model.to(dtype)
    for router in routers_of(model).values():
        state = router.lora_router["default"]
        assert state.weight.dtype == dtype
        assert state.maturity.dtype == torch.float32 and state.tokens_per_expert.dtype == torch.int64
    before = model.expert_maturity
    torch.testing.assert_close(before[1], torch.tensor(0.1234567), rtol=0, atol=1e-8)
    train_step(model, INPUTS)
    gained = model.expert_maturity - before
    assert gained.sum().item() == pytest.approx(21 / 1000, rel=1e-3), "small steps must not round to nothing"


def test_balancing_loss_is_float32():
    model = low_mixture(torch.bfloat16, False).train()
    output = model(**INPUTS)
    assert output.balancing_loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_attached_and_given_weights_take_any_dtype(dtype):
    model = low_mixture(dtype, True)
    with torch.no_grad():
        for given in (torch.float32, torch.float64, dtype):
            assert model(**NO_LABELS, routing_weights=torch.rand(3, 4).to(given)).logits.dtype == dtype
        model.attach_router(torch.nn.Linear(32, 4).to(dtype))
        assert model(**NO_LABELS).logits.dtype == dtype
