"""attach_router, detach_router, get_routing_weights, maturity, statistics, set_routing_weights."""

import math

import pytest
import torch
from helpers import ARCHITECTURES, HIDDEN, SCOPES, RandomRouter, mixture_of, routers_of, train_step
from torch import nn

from moelora.experts import grow

E = 4
INPUTS = ARCHITECTURES["llama"].batch(3, 7)
NO_LABELS = {"input_ids": INPUTS["input_ids"]}


# ---- a router by hand ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit"])
def test_attached_router_is_called_once_on_embeddings_and_obeyed(name, scope):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(labels=False)
    router = RandomRouter()
    with torch.no_grad():
        before = model(**inputs).logits
        model.attach_router(router)
        seen = []
        router.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        routed = model(**inputs).logits
        assert len(seen) == 1
        if name == "llama":
            torch.testing.assert_close(seen[0][0], model.get_input_embeddings()(inputs["input_ids"]))
        by_hand = model(**inputs, routing_weights=seen[0][1]).logits
        assert len(seen) == 1, "weights by hand take precedence and call no router"
        torch.testing.assert_close(routed, by_hand, rtol=0, atol=0)
        assert (routed - before).abs().max() > 1e-3
        assert model.detach_router() is router
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_attached_router_serves_encoder_and_decoder(name):
    """Once for each stack; generate, which calls the encoder by itself, routes it alike."""
    model = mixture_of(name)
    model.attach_router(router := RandomRouter())
    ids = ARCHITECTURES[name].batch(2, 6)["input_ids"]
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=start).logits[:, -1]
    result = model.generate(
        input_ids=ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(result.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.Size([2, 6, HIDDEN]) in router.calls and torch.Size([2, 1, HIDDEN]) in router.calls


@pytest.mark.parametrize("use_cache", [True, False])
def test_attached_router_in_generate(use_cache):
    model = mixture_of("llama")
    model.attach_router(RandomRouter())
    tokens, logits = NO_LABELS["input_ids"], []
    for _ in range(4):
        with torch.no_grad():
            logits.append(model(input_ids=tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    result = model.generate(
        **NO_LABELS, max_new_tokens=4, do_sample=False, use_cache=use_cache, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_attached_router_learns_and_is_part_of_the_model(scope):
    model = mixture_of("llama", router_scope=scope)
    model.attach_router(router := RandomRouter())
    _, grads = train_step(model, INPUTS)
    assert router.linear.weight.grad.abs().max() > 0
    assert not any("lora_router" in name for name in grads)
    assert "router.linear.weight" in model.base_model.state_dict()
    assert any(parameter is router.linear.weight for parameter in model.parameters())
    model.to(torch.float64)
    assert router.linear.weight.dtype == torch.float64
    model.detach_router()
    assert not any("router.linear" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="attach_router"):
        model.detach_router()


@pytest.mark.parametrize("shape", ["too few experts", "no sequence", "another length"])
def test_attached_router_of_wrong_shape(shape):
    class Wrong(nn.Module):
        def forward(self, hidden):
            sizes = {"too few experts": (3, 7, 3), "no sequence": (3, 4), "another length": (3, 6, 4)}
            return torch.ones(sizes[shape])

    model = mixture_of("llama")
    model.attach_router(Wrong())
    with pytest.raises(ValueError, match=r"attached router returned shape \[3.*expected \[3, 7, 4\]"):
        model(**NO_LABELS)


def test_an_attached_router_that_returns_no_tensor():
    class Pair(nn.Module):
        def forward(self, hidden):
            return hidden, hidden

    model = mixture_of("llama")
    model.attach_router(Pair())
    with pytest.raises(TypeError, match="attached router returned tuple"):
        model(**NO_LABELS)


def test_only_modules_attach():
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        mixture_of("llama").attach_router(lambda hidden: hidden)


def test_one_router_may_serve_two_models():
    router = RandomRouter()
    one, other = mixture_of("llama"), mixture_of("llama")
    one.attach_router(router), other.attach_router(router)
    torch.testing.assert_close(one(**NO_LABELS).logits, other(**NO_LABELS).logits)
    one.detach_router()
    assert (one(**NO_LABELS).logits - other(**NO_LABELS).logits).abs().max() > 1e-3


# ---- looking at routing ----


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (1, 63)], ids=str)
def test_get_routing_weights(shape):
    hidden = torch.randn(*shape, HIDDEN, requires_grad=True)
    model = mixture_of("llama", router_scope="model", routing_scale=3.0)
    weights = model.get_routing_weights(hidden)
    assert weights.shape == (*shape, E)
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape))
    assert (weights > 0).sum(-1).eq(2).all()
    (weights * torch.rand(E)).sum().backward()
    assert hidden.grad.abs().max() > 0
    assert model.routing_stats() == {}, "looking is not routing"


def test_get_routing_weights_names_the_routers():
    model = mixture_of("llama")
    hidden = torch.randn(1, 2, HIDDEN)
    with pytest.raises(ValueError, match=r"several routers fit.*'model.layers.0', 'model.layers.1'"):
        model.get_routing_weights(hidden)
    with pytest.raises(ValueError, match=r"no router fits.*5.*'model.layers.0', 'model.layers.1'"):
        model.get_routing_weights(hidden, block=5)
    by_index, by_name = (model.get_routing_weights(hidden, block=block) for block in (1, "model.layers.1"))
    torch.testing.assert_close(by_index, by_name, rtol=0, atol=0)
    assert not torch.allclose(by_index, model.get_routing_weights(hidden, block=0))
    model.attach_router(router := RandomRouter())
    torch.testing.assert_close(model.get_routing_weights(hidden), router(hidden))
    torch.testing.assert_close(model.get_routing_weights(hidden, block=1), by_index)


def test_get_routing_weights_refuses_another_width():
    with pytest.raises(ValueError, match=rf"{HIDDEN + 1}.*{HIDDEN}|{HIDDEN}.*{HIDDEN + 1}"):
        mixture_of("llama").get_routing_weights(torch.randn(1, 2, HIDDEN + 1), block=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_statistics(scope):
    model = mixture_of("llama", router_scope=scope)
    with torch.no_grad():
        model(**NO_LABELS)
    stats = model.routing_stats()
    assert stats.keys() == routers_of(model).keys()
    for name, value in stats.items():
        assert value.num_tokens == 21, name
        assert sum(value.expert_load) == pytest.approx(1) and sum(value.mean_probability) == pytest.approx(1)
        assert 0 <= value.entropy <= math.log(E) and 0 < value.top1_probability <= 1 and value.dropped == 0
        assert value.dead_experts == [e for e in range(E) if value.expert_load[e] == 0]
    with torch.no_grad():
        model(**NO_LABELS)
    doubled = model.routing_stats(reset=True)
    assert {s.num_tokens for s in doubled.values()} == {42}
    for name in stats:
        assert doubled[name].expert_load == pytest.approx(stats[name].expert_load)
    assert model.routing_stats() == {}


def test_statistics_match_the_weights():
    """Against weights recomputed from the hidden states that entered the first block."""
    model = mixture_of("llama", router_scope="model")
    with torch.no_grad():
        model(**NO_LABELS)
        weights = model.get_routing_weights(model.get_input_embeddings()(NO_LABELS["input_ids"]))
    (stats,) = model.routing_stats().values()
    assert stats.expert_load == pytest.approx(((weights > 0).float().mean((0, 1)) / 2).tolist())


def test_capacity_drops_in_training_only():
    model = mixture_of("llama", expert_capacity_factor=0.5, router_scope="model")
    with torch.no_grad():
        model.train()(**NO_LABELS)
    (stats,) = model.routing_stats(reset=True).values()
    # Room for ceil(0.5 * 21 * 2 / 4) = 6 per expert, of 42 assignments.
    kept = sum(min(round(load * 42), 6) for load in stats.expert_load)
    assert stats.dropped == pytest.approx((42 - kept) / 42)
    assert stats.dropped > 0.4
    with torch.no_grad():
        model.eval()(**NO_LABELS)
    assert next(iter(model.routing_stats().values())).dropped == 0


# ---- maturity ----


@pytest.mark.parametrize("scope", SCOPES)
def test_maturity_grows_with_routing_mass(scope):
    """A new mixture is dense: over T tokens an expert gains the sum of its weights; together they gain T."""
    model = mixture_of("llama", router_scope=scope, router_type="learned_with_maturity", maturity_tokens=100)
    assert model.expert_maturity.tolist() == [0] * E
    train_step(model, INPUTS)
    grown = model.expert_maturity
    assert grown.sum().item() == pytest.approx(21 / 100, rel=1e-5)
    for name, stats in model.routing_stats().items():
        assert stats.maturity == pytest.approx([21 * p / 100 for p in stats.mean_probability], rel=1e-4), name
    model.eval()
    with torch.no_grad():
        model(**INPUTS)
        model.train()(**INPUTS)
    torch.testing.assert_close(model.expert_maturity, grown, rtol=0, atol=0, msg="only training grows it")
    for _ in range(60):
        train_step(model, INPUTS)
    assert model.expert_maturity.max() <= 1


def test_mature_is_top_k_and_new_is_dense():
    model = mixture_of("llama", router_scope="model", router_type="learned_with_maturity")
    hidden = torch.randn(2, 5, HIDDEN)
    assert (model.get_routing_weights(hidden) > 0).all()
    for expert in range(3):
        model.set_expert_maturity(expert, 1.0)
    weights = model.get_routing_weights(hidden)
    assert (weights[..., 3] > 0).all(), "a new expert acts on every token"
    assert (weights[..., :3] > 0).sum(-1).max() <= 2
    model.set_expert_maturity("default", 1.0)
    learned = mixture_of("llama", router_scope="model").get_routing_weights(hidden)
    torch.testing.assert_close(model.get_routing_weights(hidden), learned)
    assert model.expert_maturity.tolist() == [1.0] * E


@pytest.mark.parametrize(
    ("expert", "value", "match"),
    [
        (4, 0.5, r"`expert` \(4\).*0 to 3"),
        (-1, 0.5, r"`expert` \(-1\).*0 to 3"),
        ("nobody", 0.5, r"`expert` \('nobody'\).*default"),
        (0, 1.5, r"`value` \(1.5\)"),
        (0, -0.1, r"`value` \(-0.1\)"),
        (0, float("nan"), r"`value` \(nan\)"),
    ],
)
def test_maturity_refuses(expert, value, match):
    with pytest.raises(ValueError, match=match):
        mixture_of("llama").set_expert_maturity(expert, value)


WITHOUT_EXPERTS = {
    "routing_stats": lambda model: model.routing_stats(),
    "expert_maturity": lambda model: model.base_model.expert_maturity,
    "set_expert_maturity": lambda model: model.set_expert_maturity(0, 1.0),
    "set_expert_maturity by name": lambda model: model.set_expert_maturity("default", 1.0),
    "set_routing_weights": lambda model: model.set_routing_weights([1.0] * 4),
    "get_routing_weights": lambda model: model.get_routing_weights(torch.randn(1, 2, HIDDEN), block=0),
    "check_merge": lambda model: model.base_model.check_merge(),
    "grow": grow,
}


@pytest.mark.parametrize("control", WITHOUT_EXPERTS)
def test_without_an_adapter_controls_say_so(control):
    model = mixture_of("llama", router_type="fixed" if control == "set_routing_weights" else "learned")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"no active adapter.*`add_adapter`"):
        WITHOUT_EXPERTS[control](model)


def test_maturity_by_adapter():
    model = mixture_of("llama", experts=True, router_type="learned_with_maturity")
    model.set_expert_maturity("expert_2", 0.25)
    model.set_expert_maturity(3, 0.75)
    assert model.expert_maturity.tolist() == [0, 0, 0.25, 0.75]
    model.set_adapter(["expert_3", "expert_2"])
    assert model.expert_maturity.tolist() == [0.75, 0.25]


def test_maturity_set_between_forward_and_backward():
    """In place on a buffer that the graph must not depend on."""
    model, reference = (mixture_of("llama", router_type="learned_with_maturity") for _ in range(2))
    _, expected = train_step(reference, INPUTS)
    loss = model.train()(**INPUTS).loss
    model.set_expert_maturity(0, 1.0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0, msg=name)


# ---- fixed routing ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("experts", [False, True], ids=["whole", "expert-by-expert"])
def test_fixed_weights(scope, experts):
    model = mixture_of("llama", router_scope=scope, router_type="fixed", experts=experts).double()
    vector = torch.tensor([0.125, 0.0, 2.0, -0.5], dtype=torch.float64)  # exact in float32, which stores them
    with torch.no_grad():
        uniform = model(**NO_LABELS, routing_weights=torch.full((3, E), 0.25).double()).logits
        torch.testing.assert_close(model(**NO_LABELS).logits, uniform, rtol=0, atol=1e-10)
        model.set_routing_weights(vector.tolist())
        by_hand = model(**NO_LABELS, routing_weights=vector.expand(3, E)).logits
        torch.testing.assert_close(model(**NO_LABELS).logits, by_hand, rtol=0, atol=1e-10)
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    output = model.train()(**INPUTS)
    assert getattr(output, "balancing_loss", None) is None


def test_expert_dropout_applies_to_fixed_routing():
    """The field says a contribution is dropped in training, whatever decided its weight."""
    model = mixture_of("llama", router_type="fixed", expert_dropout=0.9)
    with torch.no_grad():
        evaluated = model(**NO_LABELS).logits
        assert (model.train()(**NO_LABELS).logits - evaluated).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [[1.0] * 3, [[1.0] * 4], [1, 2, 3, float("nan")], 1.0], ids=str)
def test_fixed_weights_refuse(weights):
    with pytest.raises(ValueError, match="must be 4 finite numbers"):
        mixture_of("llama", router_type="fixed").set_routing_weights(weights)
    with pytest.raises(ValueError, match="router_type='fixed'"):
        mixture_of("llama").set_routing_weights([1, 1, 1, 1])
