"""Plain LoRAs as experts: bit for bit themselves when alone, whatever their rank, alpha, targets and precision."""

import pytest
import torch
from helpers import ARCHITECTURES, awaken, mixture_of
from helpers import llama as llama_with
from loras import BATCH, KINDS, plain_output, save_kinds, save_lora
from peft import PeftModel
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from tiny import counting, shouting, tiny_tokenizer

import moelora.tuner.layer
from moelora.experts import build, from_lora, grow
from moelora.experts.scoring import score_by_prototype, top_right_singular_vector


def llama():
    return ARCHITECTURES["llama"].build()


def one_hot(model, name):
    experts = [expert for expert, _ in model.base_model.routing.pool]
    weights = torch.zeros(len(BATCH), len(experts))
    weights[:, experts.index(name)] = 1
    return weights


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=BATCH, **options).logits


@pytest.mark.parametrize("router", ["arrow", "uniform", "train"])
def test_an_expert_alone_is_the_plain_lora_bit_for_bit(tmp_path, router):
    folders = save_kinds(tmp_path)
    model = build(llama(), folders, router, top_k=2)
    mixture = list(folders)
    together = logits(model)
    for name, folder in folders.items():
        expected = plain_output(folder)
        assert not torch.equal(expected, logits(llama()))
        assert torch.equal(logits(model, routing_weights=one_hot(model, name)), expected), f"{name}, by hand"
        model.set_adapter(name)
        assert torch.equal(logits(model), expected), f"{name}, by set_adapter"
        model.set_adapter(mixture)
        assert not torch.equal(together, expected)
    assert torch.equal(logits(model), together)


def noted_calls(monkeypatch, form):
    """How many adapters each call of a linear computes in this form of the mixture, noted as it does."""
    noted = []
    original = getattr(moelora.tuner.layer, form)
    monkeypatch.setattr(
        moelora.tuner.layer, form, lambda x, *args: noted.append(len(args[0].pools)) or original(x, *args)
    )
    return noted


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_more_adapters_change_no_bit_of_a_text_that_a_few_serve(monkeypatch, dtype, rounding):
    """First tokens that go elsewhere do not make every adapter's factors part of every product."""
    model = mixture_of("llama", single_expert=True, top_k_experts=1)
    for _ in range(5):
        grow(model)
    awaken(model)
    model.to(dtype)
    names, noted = list(model.active_adapters), noted_calls(monkeypatch, "mixture_linear")
    weights = torch.zeros(*BATCH.shape, len(names))
    weights[:, :3, 1] = weights[:, 3:, 0] = 1
    found = []
    for count in (3, 4, 6):
        model.set_adapter(names[:count])
        found.append(logits(model, routing_weights=weights[..., :count]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and set(noted) == {2}
    noted.clear()
    model.set_adapter(names[:2])
    torch.testing.assert_close(logits(model, routing_weights=weights[..., :2]), found[0], rtol=0, atol=rounding)
    assert not noted, "where all adapters are used, linears that read the same tensor are computed together"


def test_used_adapters_alone_have_the_gradients_that_they_have_among_all():
    model = mixture_of("llama", single_expert=True, top_k_experts=1)
    grow(model)
    grow(model)
    awaken(model)
    names, weights, found = list(model.active_adapters), torch.zeros(*BATCH.shape, 3), []
    weights[..., :3, 1] = weights[..., 3:, 0] = 1
    for count in (3, 2):  # two of three alone; all of two in one product
        model.set_adapter(names[:count])
        factors = [p.requires_grad_() for n, p in model.named_parameters() if ".default." in n or ".grown_1." in n]
        factors = [p for p in factors if p.dim() == 2]
        loss = model(input_ids=BATCH, routing_weights=weights[..., :count]).logits.square().mean()
        found.append(torch.autograd.grad(loss, factors, allow_unused=True))
    assert any(gradient is not None and gradient.any() for gradient in found[0])
    for alone, among in zip(*found, strict=True):
        assert (alone is None) == (among is None)
        if among is not None:
            torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-6)


def test_routing_weights_have_gradients_where_they_are_zero():
    """Also in evaluation: whoever learns them starts from one expert."""
    model = mixture_of("llama", single_expert=True, top_k_experts=1)
    grow(model)
    grow(model)
    awaken(model)

    def loss(weights):
        return model(input_ids=BATCH, routing_weights=weights).logits.double().square().mean()

    weights = torch.tensor([[1.0, 0.0, 0.0]]).expand(len(BATCH), -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights), weights)
    step = torch.zeros_like(weights)
    step[0, 2] = 1e-3
    with torch.no_grad():
        slope = (loss(weights + step) - loss(weights - step)) / 2e-3
    assert gradient.all()
    torch.testing.assert_close(gradient[0, 2].double(), slope, rtol=1e-2, atol=1e-6)


def test_tokens_of_several_experts_run_in_the_fast_form(tmp_path, monkeypatch):
    """To agree to the last bit they would run expert by expert, every token through every expert."""
    folders = save_kinds(tmp_path, ["plain", "rslora", "patterns"])
    model, noted = build(llama(), folders, "train"), noted_calls(monkeypatch, "mixture_by_expert")
    outputs = {name: plain_output(folder) for name, folder in folders.items()}
    found = logits(model, routing_weights=torch.eye(3))  # sequence i of the batch belongs to expert i
    assert not noted
    for row, name in enumerate(folders):
        torch.testing.assert_close(found[row], outputs[name][row], rtol=1e-4, atol=1e-5)
    logits(model, routing_weights=one_hot(model, "rslora"))
    assert noted and set(noted) == {1}, "one expert is run, not all of them"


@pytest.mark.parametrize(("router", "top_k"), [("uniform", None), ("arrow", 1), ("train", 1)])
def test_mixtures_of_imports_run_in_the_fast_form(tmp_path, monkeypatch, router, top_k):
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}
    folders = {name: save_lora(tmp_path / name, seed=seed, **options) for seed, name in enumerate("xyz")}
    model, noted = build(llama(), folders, router, top_k=top_k), noted_calls(monkeypatch, "mixture_by_expert")
    for key, parameter in model.named_parameters():
        if "lora_router" in key:
            torch.nn.init.normal_(parameter)
    for name in folders:
        model.set_expert_maturity(name, 1.0)
    logits(model)
    assert not noted


def test_an_expert_that_was_trained_here_runs_in_the_fast_form(tmp_path, monkeypatch):
    model, noted = mixture_of("llama", router_type="learned"), noted_calls(monkeypatch, "mixture_by_expert")
    from_lora(model, save_lora(tmp_path / "new", **KINDS["plain"]), "new")
    logits(model, routing_weights=torch.eye(5)[[0, 0, 0]])
    assert not noted
    assert torch.equal(logits(model, routing_weights=torch.eye(5)[[4, 4, 4]]), plain_output(tmp_path / "new"))


def test_top_1_routing_gives_all_tokens_to_one_expert_bit_for_bit(tmp_path):
    folders = save_kinds(tmp_path, ["plain", "rslora"])
    model = build(llama(), folders, "train", top_k=1)  # equal scores: top-1 takes the same expert for every token
    for name in folders:
        model.set_expert_maturity(name, 1.0)
    found = logits(model)
    load = torch.tensor([stats.expert_load for stats in model.routing_stats().values()]).mean(dim=0)
    assert sorted(load.tolist()) == [0, 1]
    assert torch.equal(found, plain_output(list(folders.values())[int(load.argmax())]))


def test_an_attached_router_may_single_an_expert_out(tmp_path):
    folders = save_kinds(tmp_path, ["plain", "rslora"])
    model = build(llama(), folders, "train")
    model.attach_router(Always(1, 2))
    assert torch.equal(logits(model), plain_output(folders["rslora"]))


class Always(torch.nn.Module):
    """A router that gives every token to one expert."""

    def __init__(self, expert, count):
        super().__init__()
        self.expert, self.count = expert, count

    def forward(self, hidden):
        weights = hidden.new_zeros(*hidden.shape[:-1], self.count)
        weights[..., self.expert] = 1
        return weights


@pytest.mark.parametrize("case", ["bfloat16", "float16", "float64", "bfloat16 adapters", "autocast"])
def test_every_precision_is_bit_for_bit(tmp_path, case):
    folders = save_kinds(tmp_path, ["plain", "patterns"])
    dtype = torch.float32 if case == "autocast" else getattr(torch, case.partition(" ")[0])

    def base():
        return llama().to(dtype)

    model = build(base(), folders, "train")
    plain = {name: PeftModel.from_pretrained(base(), str(folder)).eval() for name, folder in folders.items()}
    if "adapters" in case:
        for one in (model, *plain.values()):
            one.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        for name, other in plain.items():
            assert torch.equal(logits(model, routing_weights=one_hot(model, name)), logits(other)), name


def test_conv1d_is_bit_for_bit(tmp_path):
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    gpt2 = ARCHITECTURES["gpt2"].build
    folders = {
        name: save_lora(tmp_path / name, seed=rank, base=gpt2(), r=rank, lora_alpha=5, **options)
        for name, rank in (("a", 2), ("b", 3))
    }
    model = build(gpt2(), folders, "uniform")
    for name, folder in folders.items():
        expected = plain_output(folder, gpt2())
        assert torch.equal(logits(model, routing_weights=one_hot(model, name)), expected)


def test_a_mixture_is_the_weighted_sum_of_its_loras(tmp_path):
    """One linear, so that what the experts add can be read off the outputs."""
    options = {"target_modules": r"model\.layers\.1\.mlp\.down_proj"}
    folders = {
        "a": save_lora(tmp_path / "a", seed=1, r=2, lora_alpha=3, **options),
        "b": save_lora(tmp_path / "b", seed=2, r=5, lora_alpha=1, use_rslora=True, **options),
    }
    model = build(llama().double(), folders, "train")
    caught = {}
    linear = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    linear.register_forward_hook(lambda module, args, output: caught.update(x=args[0], y=output))
    logits(model, routing_weights=torch.tensor([[0.25, 0.75]], dtype=torch.float64).expand(3, 2))
    expected = linear.base_layer(caught["x"])
    for name, weight in (("a", 0.25), ("b", 0.75)):
        factors = linear.lora_B[name].weight @ linear.lora_A[name].weight
        expected = expected + weight * linear.scaling[name] * caught["x"] @ factors.T
    torch.testing.assert_close(caught["y"], expected, rtol=1e-12, atol=1e-12)
    assert linear.scaling == pytest.approx({"a": 3 / 2, "b": 1 / 5**0.5})


def test_training_uses_the_fast_form_and_agrees_within_rounding(tmp_path):
    folders = save_kinds(tmp_path, ["plain", "rslora"])
    model = build(llama().double(), folders, "train")
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    exact = logits(model, routing_weights=weights)
    model.train()
    torch.testing.assert_close(logits(model, routing_weights=weights), exact, rtol=1e-9, atol=1e-9)


def test_adding_to_a_trained_mixture_leaves_its_experts_alone(tmp_path):
    model = mixture_of("llama", router_type="learned")
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" in name}
    old = list(model.active_adapters)
    expected = logits(model)
    folder = save_lora(tmp_path / "new", **KINDS["rslora"])
    from_lora(model, folder, "new")
    assert model.active_adapters == [*old, "new"]
    assert all(not p.requires_grad for name, p in model.named_parameters() if ".new" in name)
    assert any(p.requires_grad for name, p in model.named_parameters() if ".default." in name)
    assert model.base_model.routing.num_experts == 5
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    model.set_adapter(old)
    assert torch.equal(logits(model), expected)
    model.set_adapter("new")
    assert torch.equal(logits(model), plain_output(folder))


def test_a_mixture_of_imports_is_saved_and_restored(tmp_path):
    model = build(llama(), save_kinds(tmp_path), "arrow", top_k=2)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "mixture"))
    restored = PeftModel.from_pretrained(llama(), str(tmp_path / "mixture")).eval()
    assert restored.base_model.routing.pool == model.base_model.routing.pool
    assert torch.equal(logits(restored), expected)
    assert torch.equal(logits(restored, routing_weights=one_hot(restored, "rslora")), plain_output(tmp_path / "rslora"))


def test_imports_train_beside_other_experts(tmp_path):
    model = mixture_of("llama", router_type="learned_with_maturity")
    from_lora(model, save_lora(tmp_path / "new", **KINDS["one layer"]), "new", is_trainable=True)
    model.train()
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("o_proj.lora_B.new" in name for name in gradients)
    assert any("lora_router.new" in name for name in gradients)
    assert any("lora_A.default" in name for name in gradients)


def test_plain_lora_made_with_moelora_is_plain_lora(tmp_path):
    mixture_of("llama", use_moe_routing=False).save_pretrained(str(tmp_path))
    model = build(llama(), {"own": tmp_path})
    assert torch.equal(logits(model), plain_output(tmp_path))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    save_lora(tmp_path / "lora", **KINDS["plain"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(llama(), {"a": "~/lora"}).active_adapters == ["a"]


# ---- routers ---------------------------------------------------------------------------------------------------------


def test_the_arrow_direction_is_the_top_right_singular_vector():
    generator = torch.Generator().manual_seed(3)
    for r in (1, 3, 8):
        lora_A, lora_B = torch.randn(r, 6, generator=generator), torch.randn(9, r, generator=generator)
        found = top_right_singular_vector(lora_A, lora_B)
        expected = torch.linalg.svd((lora_B @ lora_A).double()).Vh[0]
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-5, atol=1e-6)
        assert found.norm() == pytest.approx(1)
    assert top_right_singular_vector(lora_A, torch.zeros(9, 8)).abs().max() == 0


def test_arrow_chooses_what_pefts_arrow_chooses(tmp_path):
    targets = ["q_proj", "down_proj"]
    folders = {
        f"e{seed}": save_lora(tmp_path / str(seed), seed=seed, r=4, lora_alpha=4, target_modules=targets)
        for seed in range(5)
    }
    model = build(llama(), folders, "arrow", top_k=2)
    chosen = {}

    def note(module, arguments, output):
        chosen[module.link.name] = arguments[0], module.weights_for(arguments[0])

    layers = [m for m in model.modules() if hasattr(m, "link")]
    for layer in layers:
        layer.register_forward_hook(note)
    logits(model)
    assert len(chosen) == 4
    for layer in layers:
        x, weights = chosen[layer.link.name]
        config = ArrowConfig(top_k=2, router_temperature=1.0)
        config.task_adapter_names = list(folders)
        arrow = ArrowLoraLinearLayer(layer.in_features, config)
        pairs = zip(layer.lora_A.values(), layer.lora_B.values(), strict=True)
        prototypes = torch.stack(
            [arrow.top_right_singular_vec_from_BA(A.weight, B.weight, iters=500) for A, B in pairs]
        )
        similarity = (x.flatten(0, -2) @ prototypes.T).abs()
        expected = similarity.topk(2).indices.sort().values
        assert torch.equal((weights.flatten(0, -2) > 0).nonzero()[:, 1].view(-1, 2), expected)


def test_prototypes_send_texts_to_their_experts(tmp_path):
    tokenizer = tiny_tokenizer()
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}

    def base():
        return llama_with(vocab_size=len(tokenizer))

    folders = {
        name: save_lora(tmp_path / name, seed=i, base=base(), **options) for i, name in enumerate(("count", "shout"))
    }
    texts = {"count": [row["text"] for row in counting(40)], "shout": [row["text"] for row in shouting(40)]}
    examples = {name: found[:20] for name, found in texts.items()}
    model = build(base(), folders, "prototype", top_k=1, examples=examples, tokenizer=tokenizer)
    assert model.active_adapters == ["count", "shout"]
    assert not any(p.requires_grad for p in model.parameters())
    for expert, name in enumerate(texts):
        model.routing_stats(reset=True)
        for text in texts[name][20:]:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
        loads = torch.tensor([stats.expert_load for stats in model.routing_stats().values()])
        assert loads.mean(dim=0)[expert] > 0.7, name
    with pytest.raises(ValueError, match="no example texts for 'shout'"):
        score_by_prototype(model, tokenizer, {"count": ["1"]})


def test_uniform_weighs_all_alike(tmp_path):
    folders = save_kinds(tmp_path)
    model = build(llama(), folders, "uniform")
    even = torch.full((3, 4), 0.25)
    assert torch.equal(logits(model), logits(model, routing_weights=even))
