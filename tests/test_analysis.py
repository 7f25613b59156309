"""What a report measures, against the same computed outright: no padding, no side effects, exact removal of experts."""

import math
import sys

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, RandomRouter, mixture_of, routers_of
from peft import get_peft_model
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import MoELoraConfig
from moelora.data.texts import Domain, TextBlock, cut, read_domain, sample, tokenise
from moelora.report.advice import Thresholds, suggest
from moelora.report.history import history_of
from moelora.report.measure import mean_and_error
from moelora.report.observe import look, losses_without, undisturbed, weights_without
from moelora.report.specialisation import mutual_information, specialisation

TEXTS = {
    "small": [f"some words of text {i}" for i in range(8)],
    "LOUD": [f"HELLO {i} WORLD!" * (1 + i % 3) for i in range(8)],
}
TOKENIZER = tiny_tokenizer()


def tiny(experts=False, **options):
    """A model over the byte tokenizer, with experts and routers far apart."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=64, bos_token_id=None, eos_token_id=0)
    )  # fmt: skip
    fields = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "num_experts": 4, "task_type": "CAUSAL_LM",
              "router_type": "learned"}  # fmt: skip
    config = MoELoraConfig(**(fields | options))
    if experts:
        model = get_peft_model(base, config, adapter_name="expert_0")
        for i in range(1, config.num_experts):
            model.add_adapter(f"expert_{i}", config)
    else:
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 0.5 if "lora_router" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def analyze(model, texts=TEXTS, **options):
    return moelora.analyze(model, texts, TOKENIZER, **({"permutations": 50} | options))


# Against the model itself


def reference(model, document):
    """Weights by router and losses of one document alone, from the model's public means."""
    ids = torch.tensor([tokenise(document, TOKENIZER).token_ids])
    seen = {}
    hooks = [
        router.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out[0]))
        for name, router in routers_of(model).items()
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return seen, losses


@pytest.mark.parametrize(
    "options", [{}, {"experts": True}, {"router_type": "learned_with_maturity", "routing_scale": 3.0}]
)
def test_shares_are_those_of_every_document_alone(options):
    model = tiny(**options)
    found = analyze(model)
    scale = model.peft_config[model.active_adapters[0]].routing_scale
    for d, documents in enumerate(TEXTS.values()):
        results = [reference(model, document) for document in documents]
        for r, name in enumerate(routers_of(model)):
            weights = torch.cat([seen[name] for seen, _ in results]) / scale
            np.testing.assert_allclose(found.weight[d, r], weights.mean(0), rtol=1e-4)
            chosen = torch.zeros_like(weights).scatter(1, weights.topk(2).indices, 1).mean(0) / 2
            np.testing.assert_allclose(found.load[d, r], chosen, rtol=1e-4)
            np.testing.assert_allclose(found.tokens[d].weights[r] / 255, weights, atol=0.003)
        losses = torch.cat([losses for _, losses in results])
        assert found.loss[d] == pytest.approx(losses.mean().item(), rel=1e-5)
        predicted = found.tokens[d].losses[~np.isnan(found.tokens[d].losses)]
        np.testing.assert_allclose(predicted, losses, rtol=1e-3)
        assert found.num_tokens[d] == len(found.tokens[d].pieces) == sum(len(losses) + 1 for _, losses in results)


def test_entropy_and_confidence_are_the_statistics_of_each_domain():
    model = tiny()
    found = analyze(model)
    assert model.routing_stats() == {}, "the model's own statistics are left alone"
    for document in TEXTS["LOUD"]:
        with torch.no_grad():
            model(torch.tensor([tokenise(document, TOKENIZER).token_ids]))
    for r, stats in enumerate(model.routing_stats().values()):
        assert found.entropy[1, r] == pytest.approx(stats.entropy, rel=1e-4)
        assert found.top1_probability[1, r] == pytest.approx(stats.top1_probability, rel=1e-4)
        np.testing.assert_allclose(found.load[1, r], stats.expert_load, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    model.base_model.model.model.layers[0].eval()
    before = {name: buffer.clone() for name, buffer in model.state_dict().items()}
    analyze(model)
    assert model.training and not model.base_model.model.model.layers[0].training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(router._forward_hooks for router in routers_of(model).values())


def test_a_failing_forward_leaves_nothing_behind(monkeypatch):
    model = tiny().train()
    monkeypatch.setattr(model.base_model.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analyze(model)
    assert model.training
    assert not any(router._forward_hooks for router in routers_of(model).values())


# Removing an expert


def test_with_nobody_removed_it_is_the_routers_own_decision():
    for options in ({}, {"router_type": "learned_with_maturity"}, {"router_hidden_size": 5}, {"experts": True}):
        model = tiny(**options)
        router = next(iter(routers_of(model).values()))
        for adapter in router.lora_router.values():
            adapter.maturity.uniform_()
        hidden = torch.randn(2, 3, 32)
        torch.testing.assert_close(weights_without(router, hidden, None), router.decide(hidden))


def test_removing_equals_a_mixture_that_never_had_the_expert():
    model = tiny(experts=True)
    blocks = [TextBlock(0, i, i, tokenise(text, TOKENIZER).token_ids) for i, text in enumerate(TEXTS["LOUD"])]
    with undisturbed(model):
        without = losses_without(model, blocks, 0, 2)
        with_all = look(model, blocks, 0).losses
    model.delete_adapter("expert_2")
    expected = look(model.eval(), blocks, 0).losses
    for got, wanted, before in zip(without, expected, with_all, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, before, rtol=1e-3)


def test_worth_is_the_loss_without_minus_the_loss_with():
    model = tiny(experts=True)
    found = analyze(model, worth_tokens=10**6)
    model.delete_adapter("expert_1")
    smaller = analyze(model, worth_tokens=0)
    np.testing.assert_allclose(found.worth[:, 1], smaller.loss - found.loss, rtol=1e-3, atol=1e-5)
    assert smaller.worth is None and (found.worth_error > 0).all()
    assert found.worth_tokens == found.num_tokens


@pytest.mark.parametrize("options", [{"router_scope": "model"}, {"router_scope": "module"}, {"router_type": "fixed"}])
def test_every_kind_of_router_is_observed(options):
    model = tiny(**options)
    found = analyze(model)
    assert found.routers == [name or "model" for name in routers_of(model)]
    np.testing.assert_allclose(found.weight.sum(-1), 1)
    assert np.abs(found.worth).max() > 0
    if options == {"router_type": "fixed"}:
        np.testing.assert_allclose(found.weight, 0.25)
        assert np.isnan(found.entropy).all() and np.isnan(found.sharpness).all()
        np.testing.assert_allclose(found.specialisation.observed, 0, atol=1e-9)


def with_image_tower(**options):
    """The tiny model, routed, with a tower of blocks that text does not pass."""
    base = tiny().unload()
    vars(base).pop("peft_config", None)
    base.tower = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(32, 32))])
    config = MoELoraConfig(r=2, target_modules=options.pop("target_modules", "all-linear"), num_experts=4, **options)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("scope", ["block", "module"])
def test_routers_that_text_does_not_pass_are_left_out(scope):
    model = with_image_tower(router_scope=scope)
    found = analyze(model)
    running = [name for name in routers_of(model) if "tower" not in name]
    assert found.routers == list(found.by_router) == running and len(running) < len(routers_of(model))
    assert found.weight.shape == (2, len(running), 4) and len(found.maturity) == len(running)
    np.testing.assert_allclose(found.weight.sum(-1), 1)


def test_without_a_router_that_runs_there_is_nothing_to_analyze():
    with pytest.raises(ValueError, match=r"none of the routers \(tower\.0\.0\) runs when the model reads text"):
        analyze(with_image_tower(target_modules=r"tower\.0\.0"))


def test_an_attached_router_is_the_only_one():
    model = tiny()
    model.attach_router(RandomRouter())
    found = analyze(model)
    assert found.routers == ["attached router"]
    assert found.weight.shape == (2, 1, 4) and np.isfinite(found.worth).all()


def test_a_lone_expert_can_be_looked_at():
    model = tiny(experts=True)
    for i in (1, 2, 3):
        model.delete_adapter(f"expert_{i}")
    found = analyze(model)
    assert found.worth is None and found.suggestions == []
    np.testing.assert_allclose(found.weight, 1)


# Texts


def test_pieces_join_to_the_text_whatever_the_characters():
    text = "naïve 🙂🙃 <script>\n\t日本 é ́x"
    document = tokenise(text, TOKENIZER)
    assert "".join(document.pieces) == text + "<end>"
    assert len(document.pieces) == len(document.token_ids) == len(text.encode()) + 1
    assert document.pieces[document.pieces.index("🙂") + 1] == ""


def test_blocks_are_of_one_document_and_units_are_documents():
    domains = [read_domain(name, texts, TOKENIZER) for name, texts in TEXTS.items()]
    blocks, by_document = cut(domains, 10)
    assert by_document and max(len(block.token_ids) for block in blocks) == 10
    assert len({block.unit for block in blocks}) == 16
    assert sum(len(block.token_ids) for block in blocks) == sum(domain.num_tokens for domain in domains)
    few = [Domain("one", domains[0].documents[:2]), domains[1]]
    blocks, by_document = cut(few, 10)
    assert not by_document and len({block.unit for block in blocks}) == len(blocks)


def test_the_limit_on_tokens_cuts_and_counts_what_is_left_out():
    domain = read_domain("small", TEXTS["small"], TOKENIZER, max_tokens=30)
    assert domain.num_tokens == 30
    assert (len(domain.documents), domain.left_out) == (2, 6)


def test_a_sample_is_spread_over_the_domain():
    blocks = [TextBlock(i % 2, i, i, [1] * 10) for i in range(40)]
    assert sample(blocks, 0, 1000) == list(range(0, 40, 2))
    chosen = sample(blocks, 1, 50)
    assert len(chosen) == 5 and chosen[0] < 8 and chosen[-1] > 30
    assert sample([TextBlock(0, 0, 0, [1])], 0, 50) == [], "one token predicts nothing"


def test_one_token_and_one_document():
    found = analyze(tiny(), ["a"], worth_tokens=10)
    assert found.num_tokens == [2] and found.specialisation is None
    assert found.tokens[0].pieces == ["a", "<end>"]
    assert np.isnan(found.worth_error).all() and found.suggestions == []


# Refusals


def test_what_cannot_be_analyzed_is_refused():
    model = tiny()
    refused = [([], "no text"), ({}, "no text"), (["  "], "no text"), ({"a": ["x"], "b": []}, "no text for b")]
    for texts, words in (*refused, ("text", "put the text in a list"), ({"a": "text"}, "put the text in a list")):
        with pytest.raises(ValueError, match=words):
            analyze(model, texts)
    with pytest.raises(ValueError, match="holds no mixture"):
        analyze(LlamaForCausalLM(model.get_base_model().config))
    for name in ("t5", "bert"):
        with pytest.raises(ValueError, match="no causal language model"):
            analyze(mixture_of(name))
    with pytest.raises(ValueError, match="`tokenizer` is missing"):
        moelora.analyze(model, ["text"])
    assert ARCHITECTURES["t5"].is_encoder_decoder


# Statistics


def test_mutual_information_by_hand():
    shares = np.array([[[0.9, 0.1]], [[0.2, 0.8]]])
    mean = shares.mean(0)
    expected = sum(0.5 * p * math.log2(p / m) for row in shares for p, m in zip(row[0], mean[0], strict=True))
    assert mutual_information(shares * [[[3.0]], [[500.0]]]) == pytest.approx([expected])
    assert mutual_information(np.zeros((2, 1, 3))).tolist() == [0.0]


def test_chance_is_visible_and_a_signal_stands_out():
    generator = np.random.default_rng(0)
    noise = generator.dirichlet([1.0] * 4, size=(40, 2))  # documents differ, domains do not
    domains = np.arange(40) % 2
    chance = specialisation(noise, domains, 2, permutations=200)
    assert (chance.low <= chance.observed).all() and (chance.observed <= chance.high).all()
    assert (chance.p_value > 0.025).all() and (chance.chance > 0).all()
    noise[domains == 1, 0] = noise[domains == 1, 0] * 0.2 + [0.8, 0, 0, 0]
    signal = specialisation(noise, domains, 2, permutations=200)
    assert signal.observed[0] > signal.high[0] and signal.p_value[0] == pytest.approx(1 / 201)
    assert signal.observed[1] == pytest.approx(chance.observed[1])
    assert signal.observed[2] == pytest.approx(signal.observed[:2].mean())
    assert signal.maximum == 1.0


def test_errors_count_documents_not_blocks():
    mean, error = mean_and_error([1.0, 1.0, 3.0, 3.0], [1, 1, 1, 1], [0, 0, 1, 1])
    assert (mean, error) == (2.0, 1.0)
    assert mean_and_error([1.0, 1.0, 3.0, 3.0], [1, 1, 1, 1], [0, 1, 2, 3])[1] < 0.6
    assert math.isnan(mean_and_error([1.0], [2], [0])[1])


def test_suggestions_state_their_reasons():
    share = np.array([[0.4, 0.3, 0.28, 0.02], [0.1, 0.3, 0.58, 0.02]])
    alike = np.eye(4)
    alike[0, 1] = alike[1, 0] = 0.9
    worth = np.array([[0.1, 0.2, -0.05, 0.001], [0.3, 0.1, 0.1, 0.0]])
    error = np.full((2, 4), 0.001)
    found = suggest(share, alike, worth, error, ["code", "prose"])
    assert [(s.action, s.experts) for s in found] == [("prune", (3,)), ("look", (2,)), ("merge", (0, 1))]
    assert "0.0030" in found[0].reason and "code would do better" in found[1].reason and "0.90" in found[2].reason
    unsure = suggest(share, alike, worth, np.full((2, 4), np.nan), ["code", "prose"])
    assert [s.action for s in unsure] == ["merge"], "what is unknown is not pruned"
    unmeasured = suggest(share, np.eye(4), None, None, ["code", "prose"])
    assert [(s.action, s.experts) for s in unmeasured] == [("look", (3,))]
    assert suggest(share, np.eye(4), worth, error, ["code", "prose"], Thresholds(worth=0.0005))[0].action == "look"


def test_a_history_keeps_what_fits_the_last_mixture():
    def entry(step, count):
        values = {"expert_load": [1 / count] * count, "maturity": [0.0] * count, "entropy": 1.0,
                  "top1_probability": 0.5, "dropped": 0.0, "balancing_loss": 1.0}  # fmt: skip
        return {"step": step, "loss": 2.0, "routers": {"": values}}

    log = [entry(1, 2), entry(2, 3), {"step": 2, "eval_loss": 1.0}, entry(3, 3)]
    history = history_of(log)
    assert history.steps == [2, 3] and list(history.routers) == ["model"]
    assert len(history.routers["model"]["expert_load"]) == 2
    assert history_of([{"step": 1, "loss": 2.0}]) is None


# Frames and figures


def test_frames_hold_the_same_numbers():
    pytest.importorskip("pandas")
    model = tiny()
    found = analyze(model)
    loads = found.loads()
    assert len(loads) == 2 * 2 * 4
    row = loads[(loads.domain == "LOUD") & (loads.router == "model.layers.1") & (loads.expert == 3)]
    assert row.weight.item() == found.weight[1, 1, 3]
    assert found.router_table().mutual_information[3] == found.specialisation.observed[1]
    assert found.expert_table().worth_LOUD[2] == found.worth[1, 2]
    assert found.similarity("model.layers.0").shape == (4, 4)
    tokens = found.token_table("small")
    assert "".join(tokens[tokens.router == "model.layers.0"].text) == "".join(text + "<end>" for text in TEXTS["small"])
    assert found.training_table().empty
    with pytest.raises(ValueError, match=r"did you mean `model\.layers\.1`"):
        found.similarity("model.layer.1")
    with pytest.raises(ValueError, match="there are small, LOUD"):
        found.token_table("loud")


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    log = [{"step": 1, "loss": 2.0, "routers": {"model.layers.0": {
        "expert_load": [0.25] * 4, "maturity": [0.0] * 4, "entropy": None, "top1_probability": 0.5, "dropped": 0.0,
        "balancing_loss": 1.0}}}]  # fmt: skip
    found = analyze(tiny(), log_history=log)
    figures = [found.plot_loads(), found.plot_loads("load"), found.plot_specialisation(), found.plot_similarity(),
               found.plot_worth(), found.plot_training(), found.plot_training("model.layers.0")]  # fmt: skip
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert [axis.get_title() for axis in figures[0].axes[:2]] == ["small", "LOUD"]
    image = figures[0].axes[1].images[0].get_array()
    np.testing.assert_allclose(image, found.weight[1])
    with pytest.raises(ValueError, match="two domains"):
        analyze(tiny(), ["a text"]).plot_specialisation()
    with pytest.raises(ValueError, match="'weight' or 'load'"):
        found.plot_loads("mass")


def test_figures_without_matplotlib_name_the_extra(monkeypatch):
    found = analyze(tiny(), worth_tokens=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "moelora\[report\]"'):
        found.plot_loads()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "moelora\[report\]"'):
        found.loads()
