"""Routing on every architecture: padding of every kind, generation with and without a cache, refused targets."""

import re

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    CAUSAL,
    ENCODER_DECODER,
    IN_SCOPES,
    PAD,
    SCOPES,
    VOCAB,
    bert_classifier,
    every_pair,
    llama,
    mixture_of,
    mlp,
    routers_of,
    train_step,
)
from peft import get_peft_model

from moelora import MoELoraConfig

PADDED = ["llama", "gpt2", "opt", "bert", "t5", "bart"]


def padding_of(side: str, batch: int, length: int) -> torch.Tensor:
    """[B, S] int64: no padding in the first row, then 1, 2, ... tokens on one side."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        pads = slice(0, row) if side == "left" else slice(length - row, length)
        mask[row, pads] = 0
    return mask


def four_dimensional(mask: torch.Tensor, kind: str) -> torch.Tensor:
    """[B, 1, S, S] causal mask of booleans or additive floats; rows of padded queries are open, as in transformers."""
    length = mask.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & (mask[:, None, None, :] > 0)
    visible = visible | ~visible.any(dim=-1, keepdim=True)
    return visible if kind == "4d-bool" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo().min)


def padded_pair(name, kind, side):
    """The same batch twice, other tokens in its padded positions; and which positions of the logits are real."""
    architecture = ARCHITECTURES[name]
    inputs = architecture.batch(batch=3, length=7)
    mask = padding_of(side, 3, 7)
    real = mask.bool()
    given = mask if kind == "2d" else four_dimensional(mask, kind)
    if not architecture.is_encoder_decoder:
        # A real token behind padding is predicted from a padded position, base model or not: no target.
        behind_padding = torch.nn.functional.pad(~real[:, :-1], (1, 0))
        inputs["labels"] = inputs["labels"].masked_fill(~real | behind_padding, -100)
    inputs["attention_mask"] = given
    other = dict(inputs)
    noise = torch.randint(2, VOCAB, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(9))
    other["input_ids"] = torch.where(real, inputs["input_ids"], noise)
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    return inputs, other, real


@every_pair(
    masked=[*((name, "2d") for name in PADDED), ("llama", "4d-bool"), ("llama", "4d-float")],
    side=["left", "right"],
    scope=SCOPES,
)
def test_padded_content_changes_nothing_else(masked, side, scope):
    name, kind = masked
    inputs, other, real = padded_pair(name, kind, side)
    is_seq2seq = ARCHITECTURES[name].is_encoder_decoder
    results = []
    for variant in (inputs, other):
        model = mixture_of(
            name, router_scope=scope, router_type="learned_with_maturity", maturity_tokens=50, top_k_experts=1,
            router_aux_loss_coef=0.5, expert_capacity_factor=1.0,
        )  # fmt: skip
        for expert in (0, 1):
            model.set_expert_maturity(expert, 0.9)
        loss, grads = train_step(model, variant)
        stats, maturity = model.routing_stats(), model.expert_maturity
        model.eval()
        with torch.no_grad():
            logits = model(**variant).logits
        results.append((loss, stats, maturity, logits if is_seq2seq else logits[real], grads))
    (loss, stats, maturity, logits, grads), (loss2, stats2, maturity2, logits2, grads2) = results
    torch.testing.assert_close(loss2, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(maturity2, maturity, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits2, logits, rtol=1e-5, atol=1e-5)
    assert stats.keys() == stats2.keys()
    for router in stats:
        assert stats2[router].num_tokens == stats[router].num_tokens
        assert stats2[router].expert_load == pytest.approx(stats[router].expert_load, abs=1e-6), router
        assert stats2[router].dropped == pytest.approx(stats[router].dropped, abs=1e-6), router
    for parameter in grads:
        torch.testing.assert_close(grads2[parameter], grads[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


@every_pair(kind=["2d", "4d-bool", "4d-float"], side=["left", "right"], scope=SCOPES)
def test_only_real_tokens_are_counted(kind, side, scope):
    inputs, _, real = padded_pair("llama", kind, side)
    model = mixture_of("llama", router_scope=scope)
    train_step(model, inputs)
    for router, stats in model.routing_stats().items():
        assert stats.num_tokens == int(real.sum()), router


@pytest.mark.parametrize("name", ENCODER_DECODER)
@pytest.mark.parametrize("scope", SCOPES)
def test_encoder_and_decoder_count_their_own_tokens(name, scope):
    """Cross-attention reads the encoder's tokens in the decoder's blocks; only "module" routers see them there."""
    inputs = ARCHITECTURES[name].batch(batch=3, length=7)
    inputs["attention_mask"] = padding_of("right", 3, 7)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][1, 3:] = -100
    encoder_tokens = 7 + 6 + 5
    decoder_tokens = 5 + 4 + 5  # the first -100 is the last position the decoder reads a real token at
    model = mixture_of(name, router_scope=scope)
    train_step(model, inputs)
    stats = model.routing_stats()
    if scope == "model":
        assert [s.num_tokens for s in stats.values()] == [encoder_tokens + decoder_tokens]
        return
    for router, value in stats.items():
        reads_encoder = re.search(r"encoder\.(block|layers)|EncDecAttention\.[kv]$|encoder_attn\.[kv]_proj$", router)
        assert value.num_tokens == (encoder_tokens if reads_encoder else decoder_tokens), router


@pytest.mark.parametrize("scope", SCOPES)
def test_all_padding_row(scope):
    """A row without a single real token counts for nothing and yields finite numbers."""
    model = mixture_of("llama", router_scope=scope, router_type="learned_with_maturity")
    inputs = ARCHITECTURES["llama"].batch(batch=2, length=5)
    inputs["attention_mask"] = torch.tensor([[1] * 5, [0] * 5])
    inputs["labels"][1] = -100
    loss, grads = train_step(model, inputs)
    assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads.values())
    assert {stats.num_tokens for stats in model.routing_stats().values()} == {5}


def test_no_real_token_at_all():
    model = mixture_of("llama", router_type="learned_with_maturity")
    inputs = ARCHITECTURES["llama"].batch(batch=2, length=5)
    inputs["attention_mask"] = torch.zeros(2, 5, dtype=torch.int64)
    model.train()
    output = model(**inputs)
    output.loss.backward()
    assert output.balancing_loss.item() == 0
    assert model.routing_stats() == {}
    assert model.expert_maturity.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["2d", "4d-bool", "4d-float"])
def test_every_form_of_mask_means_the_same(kind, scope):
    """Without padding, no mask, a 2-D mask of ones and a causal 4-D mask give one result."""
    model = mixture_of("llama", router_scope=scope)
    inputs = ARCHITECTURES["llama"].batch()
    expected, expected_grads = train_step(model, inputs)
    expected_stats = model.routing_stats(reset=True)
    mask = torch.ones(3, 7, dtype=torch.int64)
    inputs["attention_mask"] = mask if kind == "2d" else four_dimensional(mask, kind)
    loss, grads = train_step(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name in expected_grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-4, atol=1e-6, msg=name)
    stats = model.routing_stats()
    assert [s.expert_load for s in stats.values()] == [s.expert_load for s in expected_stats.values()]


# ---- generation ----


def greedy_by_hand(model, inputs: dict, steps: int, prefix: str = "") -> torch.Tensor:
    """Greedy decoding by a full forward per token, no cache: what generate must reproduce."""
    ids = inputs[f"{prefix}input_ids"]
    for _ in range(steps):
        given = dict(inputs) | {f"{prefix}input_ids": ids}
        if not prefix and "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            ones = mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])
            given["attention_mask"] = torch.cat([mask, ones], dim=1)
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**given, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def margin_scores(model, **arguments):
    return model.generate(**arguments, do_sample=False, return_dict_in_generate=True, output_logits=True)


@every_pair(name=CAUSAL, scope=SCOPES, use_cache=[True, False])
def test_generate_equals_full_forwards(name, scope, use_cache):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(batch=2, length=5, labels=False)
    inputs["attention_mask"] = padding_of("left", 2, 5)
    expected = greedy_by_hand(model, inputs, steps=5)
    actual = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_logits_equal_uncached(name, scope):
    """Tokens may agree by luck; the logits of every step may not."""
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(batch=2, length=5, labels=False)
    inputs["attention_mask"] = padding_of("left", 2, 5)
    cached = margin_scores(model, **inputs, max_new_tokens=4, use_cache=True)
    uncached = margin_scores(model, **inputs, max_new_tokens=4, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)


@every_pair(name=ENCODER_DECODER, scope=SCOPES, use_cache=[True, False])
def test_encoder_decoder_generate_equals_full_forwards(name, scope, use_cache):
    """generate calls the encoder by itself, outside the model's forward: it must route as within."""
    model = mixture_of(name, router_scope=scope)
    ids = ARCHITECTURES[name].batch(batch=2, length=6)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": padding_of("right", 2, 6)}
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    logits, tokens = [], start
    for _ in range(4):
        with torch.no_grad():
            logits.append(model(**inputs, decoder_input_ids=tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    actual = margin_scores(model, **inputs, max_new_tokens=4, use_cache=use_cache)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(logits), rtol=1e-4, atol=1e-4)
    assert actual.sequences.tolist() == tokens.tolist()


@pytest.mark.parametrize("name", ENCODER_DECODER)
@pytest.mark.parametrize("scope", SCOPES)
def test_precomputed_encoder_outputs_change_nothing(name, scope):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(batch=2, length=6, labels=False)
    with torch.no_grad():
        expected = model(**inputs).logits
        encoded = model.get_encoder()(inputs["input_ids"])
        decoder = {"decoder_input_ids": inputs["decoder_input_ids"]}
        actual = model(encoder_outputs=encoded, **decoder).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_beam_search_cached_equals_uncached(name, scope):
    model = mixture_of(name, router_scope=scope)
    ids = ARCHITECTURES[name].batch(batch=2, length=6)["input_ids"]
    mask = padding_of("right" if name != "llama" else "left", 2, 6)
    arguments = {"input_ids": ids, "attention_mask": mask, "num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    cached, uncached = model.generate(**arguments, use_cache=True), model.generate(**arguments, use_cache=False)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-4, atol=1e-4)
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    base = model.unload()
    without = base.generate(**arguments)
    assert not torch.allclose(without.sequences_scores, cached.sequences_scores), "the experts changed nothing"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_and_decoder_of_equal_length(name, scope):
    """The cross-attention must tell encoder tokens from decoder tokens when both have the same shape.

    Reference: a longer, padded encoder input whose real part is the same.
    """
    model = mixture_of(name, router_scope=scope)
    architecture = ARCHITECTURES[name]
    ids = architecture.batch(batch=2, length=5)["input_ids"]
    decoder = torch.randint(2, VOCAB, (2, 5), generator=torch.Generator().manual_seed(5))
    padded = torch.cat([ids, torch.full((2, 3), PAD)], dim=1)
    mask = torch.cat([torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        equal = model(input_ids=ids, attention_mask=mask[:, :5], decoder_input_ids=decoder).logits
        longer = model(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder).logits
    torch.testing.assert_close(equal, longer, rtol=1e-4, atol=1e-4)


# ---- shapes ----


@pytest.mark.parametrize(("name", "scope"), IN_SCOPES)
def test_every_parameter_learns(name, scope):
    """All experts and routers get a gradient; the base gets none."""
    model = mixture_of(name, router_scope=scope, router_type="learned_with_maturity")
    _, grads = train_step(model, ARCHITECTURES[name].batch())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(grads)
    assert all("lora_" in n for n in trainable)
    assert not [n for n, grad in grads.items() if not grad.abs().max() > 0]
    blocks = ARCHITECTURES[name].num_routers
    if scope != "module":
        assert len(routers_of(model)) == (blocks if scope == "block" else 1)


@every_pair(name=CAUSAL, scope=SCOPES, shape=[(1, 1), (1, 63), (3, 2)])
def test_batching_changes_no_row(name, scope, shape):
    """Evaluation is dropless and per token: a row alone gives what it gives in a batch."""
    model = mixture_of(name, router_scope=scope, num_experts=7, top_k_experts=3)
    inputs = ARCHITECTURES[name].batch(*shape, labels=False)
    with torch.no_grad():
        together = model(**inputs).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in inputs["input_ids"]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_embeddings_as_input():
    model = mixture_of("llama", router_scope="model")
    ids = ARCHITECTURES["llama"].batch(labels=False)["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


# ---- refused targets ----


@pytest.mark.parametrize(
    ("build", "targets", "scope", "match"),
    [
        (llama, ["embed_tokens"], "block", r"`model.embed_tokens` is a Embedding"),
        (llama, ["embed_tokens"], "module", r"`model.embed_tokens` is a Embedding"),
    ],
    ids=["embedding-block", "embedding-module"],
)
def test_unroutable_target_is_named(build, targets, scope, match):
    base = build()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, MoELoraConfig(target_modules=targets, router_scope=scope))
    assert {name: type(module) for name, module in base.named_modules()} == before, "the model was changed"


OUTSIDE = {
    "mlp": (mlp, ["first", "second"], {"x": torch.ones(5, 8)}),
    "llama": (llama, ["lm_head", "q_proj"], {"input_ids": torch.arange(2, 9)[None]}),
    "bert": (bert_classifier, ["query", "pooler.dense"], {"input_ids": torch.arange(2, 9)[None]}),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", OUTSIDE)
def test_what_lies_outside_blocks_has_a_router_of_its_own(case, scope):
    build, targets, inputs = OUTSIDE[case]
    model = get_peft_model(build(), MoELoraConfig(r=2, target_modules=targets, router_scope=scope))
    output = model(**inputs)
    output = getattr(output, "logits", output)
    torch.testing.assert_close(output, getattr(build()(**inputs), "logits", build()(**inputs)))
    outside = {mlp: ["first", "second"], llama: ["lm_head"], bert_classifier: ["bert.pooler.dense"]}[build]
    inside = 0 if build is mlp else 1 if scope == "model" else 2
    assert len(routers_of(model)) == len(outside) + inside
    assert set(outside) <= set(routers_of(model))


class _Block(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm, torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class _Stack(torch.nn.Module):
    """A model without a configuration, whose blocks begin with a norm without weights, or with none."""

    def __init__(self, norm):
        super().__init__()
        self.blocks = torch.nn.ModuleList(_Block(norm) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8, elementwise_affine=False), torch.nn.Identity()])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_routers_width_is_taken_from_the_block(norm, scope):
    model = get_peft_model(_Stack(norm), MoELoraConfig(r=2, target_modules=["linear"], router_scope=scope))
    assert {router.hidden_size for router in routers_of(model).values()} == {8}
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 8)
