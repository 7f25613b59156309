"""routing_weights= by hand, in forward and generate, and what layers really do with weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ARCHITECTURES,
    CAUSAL,
    ENCODER_DECODER,
    IN_SCOPES,
    SCOPES,
    VOCAB,
    every_pair,
    mixture_of,
    mlp,
    train_step,
)
from peft import get_peft_model
from torch import nn
from transformers import GenerationConfig

from moelora import MoELoraConfig
from moelora.forward.state import ForwardContext, kv_cache
from moelora.tuner.router import MoELoraRouter

E = 4


WRONG_SHAPES = [
    (3, 7, E + 1), (3, 7, E - 1), (2, 7, E), (3, 6, E), (3, 1, E), (2, E), (1, E), (3, E + 1), (E,), (3, 7, 1, E),
]  # fmt: skip


def weights_like(*shape, seed=4):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- what a layer computes, from first principles ----


class Recorder:
    """Inputs and output of a module's forward."""

    def __init__(self, module):
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.input = (args[0] if args else kwargs["hidden_states"]).detach()
        self.output = output[0] if isinstance(output, tuple) else output


def routed_by_hand(router, hidden_BSH, top_k, temperature):
    """[B, S, E] one token at a time, from the definition in docs and design; router is a moelora Router."""
    result = torch.zeros(*hidden_BSH.shape[:2], router.weight.shape[0], dtype=torch.float64)
    for b in range(hidden_BSH.shape[0]):
        for s in range(hidden_BSH.shape[1]):
            h = hidden_BSH[b, s].double()
            h = h / (h.square().mean() + 1e-6).sqrt()
            if router.hidden_weight is not None:
                h = F.silu(router.hidden_weight.double() @ h)
            p = torch.softmax(router.weight.double() @ h / temperature, dim=0)
            chosen = sorted(range(len(p)), key=lambda e, p=p: -p[e])[:top_k]
            for e in chosen:
                result[b, s, e] = p[e] / sum(p[c] for c in chosen)
    return result


def linear_by_hand(layer, x, weights, scaling, rank):
    """Base output plus sum_e w_e * scaling * B_e A_e x, an expert and a token at a time, float64."""
    base = layer.base_layer
    factor_A, factor_B = (factors["default"].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
    output = F.linear(x.double(), base.weight.double(), None if base.bias is None else base.bias.double())
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            for e in range(weights.shape[-1]):
                block = slice(e * rank, (e + 1) * rank)
                delta = factor_B[:, block] @ (factor_A[block] @ x[b, s].double())
                output[b, s] += weights[b, s, e] * scaling * delta
    return output


@every_pair(scope=SCOPES, target=["self_attn.q_proj", "mlp.down_proj"], router_hidden_size=[None, 5])
def test_layer_computes_the_definition(scope, target, router_hidden_size):
    """The second block's linear, from the router's parameters and the hidden states its scope names."""
    model = mixture_of(
        "llama", router_scope=scope, router_temperature=1.7, router_hidden_size=router_hidden_size, routing_scale=1.3,
        r=3, lora_alpha=6,
    )  # fmt: skip
    llama = model.base_model.model
    block = llama.model.layers[1]
    layer = block.get_submodule(target)
    first, this, linear = Recorder(llama.model.layers[0]), Recorder(block), Recorder(layer)
    with torch.no_grad():
        model(**ARCHITECTURES["llama"].batch(2, 5, labels=False))
    read = {"block": (block, this.input), "model": (llama, first.input), "module": (layer, linear.input)}[scope]
    router = read[0].moe_router.lora_router["default"]
    with torch.no_grad():
        weights = routed_by_hand(router, read[1], top_k=2, temperature=1.7) * 1.3
        expected = linear_by_hand(layer, linear.input, weights, scaling=2.0, rank=3)
    torch.testing.assert_close(linear.output.double(), expected, rtol=1e-5, atol=1e-5)
    named = {"block": 1, "model": None, "module": f"layers.1.{target}"}[scope]
    with torch.no_grad():
        chosen = model.get_routing_weights(read[1], block=named)
    torch.testing.assert_close(chosen.double() * 1.3, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("scope", SCOPES)
def test_user_weights_are_used_as_given(scope, per):
    """Times scaling only: not normalised, not cut to top-k, not multiplied by routing_scale."""
    model = mixture_of("llama", router_scope=scope, routing_scale=3.0, r=3, lora_alpha=6)
    linear = Recorder(layer := model.base_model.model.model.layers[1].self_attn.v_proj)
    given = weights_like(2, 5, E) * 4 - 1 if per == "token" else weights_like(2, E) * 4 - 1
    with torch.no_grad():
        model(**ARCHITECTURES["llama"].batch(2, 5, labels=False), routing_weights=given)
        weights = given if per == "token" else given[:, None].expand(2, 5, E)
        expected = linear_by_hand(layer, linear.input, weights.double(), scaling=2.0, rank=3)
    torch.testing.assert_close(linear.output.double(), expected, rtol=1e-5, atol=1e-5)


# ---- equivalences ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_rows_per_sequence_equal_rows_per_token(name, scope):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(3, 4, labels=False)
    rows = weights_like(3, E)
    with torch.no_grad():
        short = model(**inputs, routing_weights=rows).logits
        long = model(**inputs, routing_weights=rows[:, None].expand(3, 4, E)).logits
        routed = model(**inputs).logits
        none = model(**inputs, routing_weights=None).logits
    torch.testing.assert_close(short, long, rtol=0, atol=0)
    torch.testing.assert_close(none, routed, rtol=0, atol=0)
    assert (short - routed).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "scope"), IN_SCOPES)
def test_zero_weights_are_the_base_model(name, scope):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(labels=False)
    with torch.no_grad():
        zero = model(**inputs, routing_weights=torch.zeros(3, E)).logits
        base = ARCHITECTURES[name].build()(**inputs).logits
        one_hot = model(**inputs, routing_weights=torch.eye(E)[:3]).logits
    torch.testing.assert_close(zero, base, rtol=0, atol=1e-6)
    assert (one_hot - base).abs().max() > 1e-3


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_gradients_reach_the_user(scope, per):
    """Against a finite difference, in a model that computes in float64 throughout."""
    model = mixture_of("gpt2", router_scope=scope).double()
    inputs = ARCHITECTURES["gpt2"].batch(2, 3, labels=False)
    shape = (2, 3, E) if per == "token" else (2, E)
    weights = weights_like(*shape).double().requires_grad_()
    probe = torch.randn(2, 3, VOCAB, dtype=torch.float64)

    def objective(given):
        return (model(**inputs, routing_weights=given).logits * probe).sum()

    objective(weights).backward()
    for index in range(weights.numel()):
        step = torch.zeros(shape, dtype=torch.float64)
        step.view(-1)[index] = 1e-5
        with torch.no_grad():
            difference = (objective(weights + step) - objective(weights - step)) / 2e-5
        assert weights.grad.view(-1)[index].item() == pytest.approx(difference.item(), rel=1e-4, abs=1e-5)


def test_user_weights_train_experts_and_leave_routers_alone():
    model = mixture_of("llama", router_aux_loss_coef=0.5)
    inputs = ARCHITECTURES["llama"].batch()
    _, grads = train_step(model, inputs | {"routing_weights": weights_like(3, E)})
    assert any("lora_A" in name for name in grads)
    assert not any("lora_router" in name and grad.abs().max() > 0 for name, grad in grads.items())
    assert model.expert_maturity.max() == 0, "nothing was routed, so nothing matures"


@pytest.mark.parametrize(
    ("shape", "scope"),
    [(shape, "block") for shape in WRONG_SHAPES] + [((2, 7, E), "model"), ((3, 6, E), "module"), ((2, E), "module")],
    ids=str,
)
def test_wrong_shape_names_both(shape, scope):
    model = mixture_of("llama", router_scope=scope)
    inputs = ARCHITECTURES["llama"].batch(3, 7)
    with pytest.raises(ValueError) as raised:
        model(**inputs, routing_weights=torch.ones(shape))
    for named in (str(list(shape)), "[3, 7, 4]", "[3, 4]"):
        assert named in str(raised.value)
    assert model.base_model.routing.in_force.call.routing_weights is None


def test_tokens_of_an_encoder_decoder_are_refused():
    model = mixture_of("t5")
    with pytest.raises(ValueError, match=r"\[3, 7, 4\].*expected \[3, 4\].*encoder and decoder"):
        model(**ARCHITECTURES["t5"].batch(3, 7), routing_weights=torch.ones(3, 7, E))


# ---- generate ----


def generate(model, inputs, steps=4, **kwargs):
    result = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return result.sequences, torch.stack(result.logits)


def by_hand(model, inputs, steps, weights_BTE):
    """Greedy decoding by full forwards, each token with its own row of weights; the last row holds on."""
    ids, logits = inputs["input_ids"], []
    for _ in range(steps):
        rows = weights_BTE[:, torch.arange(ids.shape[1]).clamp(max=weights_BTE.shape[1] - 1)]
        with torch.no_grad():
            logits.append(model(input_ids=ids, routing_weights=rows, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, torch.stack(logits)


@every_pair(name=CAUSAL, rows=[5, 7, 9, 12], use_cache=[True, False])
def test_generate_gives_each_token_its_row(name, rows, use_cache):
    model = mixture_of(name)
    inputs = ARCHITECTURES[name].batch(2, 5, labels=False)
    weights = weights_like(2, rows, E)
    expected_ids, expected = by_hand(model, inputs, 4, weights)
    ids, logits = generate(model, inputs, routing_weights=weights, use_cache=use_cache)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert ids.tolist() == expected_ids.tolist()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_counts_whatever_it_is_called(name):
    """transformers renamed it in 5.24; one release has one name alone."""
    model = mixture_of("llama")
    with torch.no_grad():
        output = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True)
    cache = kv_cache(output)
    assert kv_cache({name: cache}) is cache and kv_cache((cache,)) is None
    inputs = {name: cache, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])}
    state = next(module.state for module in model.modules() if isinstance(module, MoELoraRouter))
    context = ForwardContext(state, inputs, training=False)
    assert context.past_length == 5
    assert context.mask(torch.zeros(2, 1, 8), is_decoder=False).tolist() == [[True], [False]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generate_with_a_row_per_sequence(scope, use_cache):
    model = mixture_of("llama", router_scope=scope)
    inputs = ARCHITECTURES["llama"].batch(2, 5, labels=False)
    weights = weights_like(2, E)
    expected_ids, expected = by_hand(model, inputs, 4, weights[:, None])
    ids, logits = generate(model, inputs, routing_weights=weights, use_cache=use_cache)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert ids.tolist() == expected_ids.tolist()


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("batch", [1, 2])
def test_all_beams_share_the_rows_of_their_sequence(batch, per):
    model = mixture_of("llama")
    inputs = ARCHITECTURES["llama"].batch(batch, 5, labels=False)
    weights = weights_like(batch, 5, E) if per == "token" else weights_like(batch, E)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(**inputs, routing_weights=weights, **options)
    alone = [
        model.generate(input_ids=ids[None], routing_weights=rows[None], **options)
        for ids, rows in zip(inputs["input_ids"], weights, strict=True)
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    scores = {"return_dict_in_generate": True, "output_scores": True}
    routed = model.generate(**inputs, **options, **scores).sequences_scores
    weighted = model.generate(**inputs, routing_weights=weights, **options, **scores).sequences_scores
    assert not torch.allclose(routed, weighted)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_weights_expanded_for_beams_are_taken_as_they_are(options, per, use_cache):
    model = mixture_of("llama")
    inputs = ARCHITECTURES["llama"].batch(2, 5, labels=False)
    weights = weights_like(2, 7, E) if per == "token" else weights_like(2, E)
    expected = generate(model, inputs, routing_weights=weights, use_cache=use_cache, **options)
    expanded = generate(model, inputs, routing_weights=weights.repeat_interleave(3, 0), use_cache=use_cache, **options)
    assert expanded[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(expanded[1], expected[1], rtol=0, atol=0)


def test_every_answer_can_have_weights_of_its_own():
    model = mixture_of("llama")
    inputs = ARCHITECTURES["llama"].batch(2, 5, labels=False)
    weights = weights_like(6, E)
    options = {"max_new_tokens": 3, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    answers = model.generate(**inputs, routing_weights=weights, num_return_sequences=3, **options)
    with torch.no_grad():
        forced = model(input_ids=answers.sequences[:, :-1], routing_weights=weights).logits[:, -3:]
    torch.testing.assert_close(torch.stack(answers.logits, dim=1), forced, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_weights_expanded_for_beams_of_an_encoder_decoder_are_refused(name):
    model = mixture_of(name)
    ids = ARCHITECTURES[name].batch(2, 6)["input_ids"]
    with pytest.raises(ValueError, match=r"\[6, 4\], expected .*\[2, 4\].*one row per prompt"):
        model.generate(input_ids=ids, routing_weights=weights_like(6, E), num_beams=3, max_new_tokens=2)


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("own", [{"num_beams": 3}, {}], ids=["in the call's", "in the model's"])
def test_beams_of_a_generation_config_count(own, by):
    """One that leaves them open takes the model's."""
    model = mixture_of("llama")
    ids = ARCHITECTURES["llama"].batch(2, 5)["input_ids"]
    weights = weights_like(2, E)
    expected = model.generate(ids, num_beams=3, max_new_tokens=3, do_sample=False, routing_weights=weights)
    model.generation_config.num_beams = 3 if not own else None
    config = GenerationConfig(max_new_tokens=3, do_sample=False, **own)
    given = ([config], {}) if by == "position" else ([], {"generation_config": config})
    assert model.generate(ids, *given[0], **given[1], routing_weights=weights).tolist() == expected.tolist()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoder_generates_under_user_weights(name, num_beams):
    model = mixture_of(name)
    ids = ARCHITECTURES[name].batch(2, 6)["input_ids"]
    options = {"num_beams": num_beams, "max_new_tokens": 4, "do_sample": False}
    zero = model.generate(input_ids=ids, routing_weights=torch.zeros(2, E), **options)
    assert zero.tolist() == ARCHITECTURES[name].build().generate(input_ids=ids, **options).tolist()
    weights = weights_like(2, E) * 3
    ids_out, logits = generate(model, {"input_ids": ids}, routing_weights=weights)
    with torch.no_grad():
        forced = model(input_ids=ids, decoder_input_ids=ids_out[:, :-1], routing_weights=weights).logits
    torch.testing.assert_close(forced.transpose(0, 1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, E), (1, E), (1, 5, E), (2, 5, E + 1), (3, 5, E), (E,)], ids=str)
def test_wrong_shape_in_generate_names_both(shape):
    model = mixture_of("llama")
    inputs = ARCHITECTURES["llama"].batch(2, 5, labels=False)
    with pytest.raises(ValueError) as raised:
        model.generate(**inputs, max_new_tokens=2, routing_weights=torch.ones(shape))
    assert str(list(shape)) in str(raised.value) and "[2, 4]" in str(raised.value)


def test_rows_shorter_than_the_prompt_are_refused_in_generate():
    """The last row may hold on for the answer, never silently for part of the prompt."""
    model = mixture_of("llama")
    inputs = ARCHITECTURES["llama"].batch(2, 5, labels=False)
    with pytest.raises(ValueError, match=r"\[2, 3, 4\].*expected \[2, 5, 4\]"):
        model.generate(**inputs, max_new_tokens=2, routing_weights=weights_like(2, 3, E))


def test_a_forward_within_generate_leaves_the_weights_in_force():
    """As a logits processor or a streamer may make one, to score what was generated so far."""
    model = mixture_of("llama")
    inputs = ARCHITECTURES["llama"].batch(2, 5, labels=False)
    weights = weights_like(2, 7, E)

    def look(ids, scores):
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            model(input_ids=ids, use_cache=False, routing_weights=weights_like(2, E, seed=5))
        return scores

    expected, watched = (
        generate(model, inputs, routing_weights=weights, logits_processor=processors) for processors in ([], [look])
    )
    torch.testing.assert_close(watched[1], expected[1], rtol=0, atol=0)


# ---- without blocks or task type ----


def test_plain_model_takes_rows_per_sample():
    model = get_peft_model(mlp(), MoELoraConfig(r=2, target_modules=["first", "second"], router_scope="module"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    zero = model(x, routing_weights=torch.zeros(3, E))
    torch.testing.assert_close(zero, mlp()(x))
    rows = torch.cat([model(x, routing_weights=torch.eye(E)[e].expand(3, E))[e : e + 1] for e in range(3)])
    torch.testing.assert_close(model(x, routing_weights=torch.eye(E)[:3]), rows)
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[3, 4\]"):
        model(x, routing_weights=torch.ones(2, E))


def test_wrong_rows_per_sample_are_named_on_the_first_forward():
    model = get_peft_model(mlp(), MoELoraConfig(r=2, target_modules=["first", "second"], router_scope="module"))
    with pytest.raises(ValueError, match=r"\[2, 4\], expected \[3, 4\]$"):
        model(torch.randn(3, 8), routing_weights=torch.ones(2, E))


def test_weights_that_are_no_tensor_are_named():
    with pytest.raises(TypeError, match=r"`routing_weights` \(list\) must be a tensor"):
        mixture_of("llama")(input_ids=torch.ones(1, 3, dtype=torch.long), routing_weights=[[0.25] * 4])


def test_adapters_that_change_within_a_forward_route_from_there_on():
    """As a forward that was interrupted leaves it, too: what is looked up for all blocks at once does not go stale."""
    model = mixture_of("llama", expert_capacity_factor=None).eval()
    model.add_adapter("loud", copy.copy(model.peft_config["default"]))
    model.peft_config["loud"].routing_scale = 4.0
    model.set_adapter("default")
    layers, seen = model.get_base_model().model.layers, []
    layers[1].register_forward_pre_hook(lambda *_: model.base_model.set_adapter("loud"), prepend=True)
    for layer in layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(m.weights_for(args[0])))
    model(**ARCHITECTURES["llama"].batch(2, 5))
    for weights, scale in zip(seen, (1.0, 4.0), strict=True):
        torch.testing.assert_close(weights.sum(-1), torch.full((2, 5), scale))


def test_a_merged_layer_still_tells_its_weights():
    model = mixture_of("llama", router_type="fixed").eval()
    model.merge_adapter()
    seen = []
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda m, args: seen.append(m.weights_for(args[0])))
    model(**ARCHITECTURES["llama"].batch(2, 5))
    torch.testing.assert_close(seen[0], torch.full((2, 5, E), 1 / E))


def test_adapters_disabled_within_a_forward_are_not_routed_from_there_on():
    model = mixture_of("llama").eval()
    layers = model.get_base_model().model.layers
    layers[1].register_forward_pre_hook(lambda *_: model.base_model.disable_adapter_layers(), prepend=True)
    model(**ARCHITECTURES["llama"].batch(2, 5))
    assert list(model.base_model.routing_stats()) == ["model.layers.0"]
