"""Linears that read something else than the [B, S, H] that enters their block: latents, windows, native experts.

Each has a router of its own. What stands in padded positions reaches no real token either way.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import SCOPES, awaken, every_pair, llama, routers_of
from peft import PeftModel, get_peft_model
from transformers.models.llama import modeling_llama
from wide import CASES, PADDED_ONLY, ids, noise

from moelora import MoELoraConfig
from moelora.data.texts import TextBlock
from moelora.report.observe import reading_routers, undisturbed
from moelora.serving.mixture import read_served_mixture
from moelora.tuner import placement, probe
from moelora.tuner.probe import Readings

CASE = {case.name.partition("For")[0]: case for case in reversed([*PADDED_ONLY, *CASES])}
TIGHT = {"r": 2, "num_experts": 4, "top_k_experts": 1, "router_type": "learned", "expert_capacity_factor": 1.0}
"""Experts are full at once in training: a token too many throws others out."""


def mixture_on(name: str, **options):
    torch.manual_seed(1)
    case = CASE[name]
    model = get_peft_model(case.build(), MoELoraConfig(target_modules=case.targets, **(TIGHT | options)))
    awaken(model)
    return model


def own_linears(model) -> set[str]:
    """The last two parts of the names of linears that have routers of their own."""
    return {".".join(name.split(".")[-2:]) for name in model.peft_config["default"].own_routers}


# ---- latents ---------------------------------------------------------------------------------------------------------

LATENT = ["DeepseekV2", "DeepseekV3", "DeepseekV32", "Glm4MoeLite", "GlmMoeDsa", "MiniCPM3"]


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("name", LATENT)
def test_what_reads_latents_has_a_router_of_its_own(name, scope):
    """kv_b_proj reads [B, 1, S, R], of all tokens in the cache: its router decides on the latents, when they come again
    as when they came first. The others follow their block."""
    model = mixture_on(name, router_scope=scope)
    assert own_linears(model) == {"self_attn.kv_b_proj"}
    assert len(routers_of(model)) == (1 if scope == "model" else 2) + 2


def test_latents_count_as_tokens_where_padding_is_known():
    model = mixture_on("MiniCPM3").train()
    model(**CASE["MiniCPM3"].inputs())
    assert {stats.num_tokens for stats in model.routing_stats().values()} == {12}


def test_a_latents_weights_by_hand_are_those_of_its_token():
    """They single out one expert for each token: kv_b_proj adds that expert's delta, token by token."""
    model = mixture_on("MiniCPM3").eval()
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.kv_b_proj"))
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    chosen = torch.randint(0, 4, (2, 7), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model(input_ids=ids(), use_cache=False, routing_weights=torch.nn.functional.one_hot(chosen, 4).float())
        x, A, B = seen["x"].reshape(2, 7, -1), layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A, B = A.view(4, 2, -1)[chosen], B.view(-1, 4, 2).permute(1, 0, 2)[chosen]  # [B, S, r, D], [B, S, O, r]
        delta = (B @ (A @ x[..., None])).squeeze(-1) * layer.scaling["default"]
        expected = layer.base_layer(seen["x"]) + delta.view_as(seen["y"])
    torch.testing.assert_close(seen["y"], expected)


@pytest.mark.parametrize("given", ["routers", "attached", "by hand", "by hand, by sequence"])
@pytest.mark.parametrize("name", ["DeepseekV3", "MiniCPM3"])
def test_latents_decode_with_a_cache_as_without(name, given):
    model = mixture_on(name).eval()
    arguments = {"input_ids": ids(), "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    if given == "attached":
        model.attach_router(torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Softmax(-1)))
    elif given != "routers":
        weights = noise(2, 9, 4).softmax(-1)
        arguments["routing_weights"] = weights if given == "by hand" else weights[:, 0]
    arguments |= {"output_logits": True, "attention_mask": torch.tensor([[1] * 7, [0] * 2 + [1] * 5])}
    cached, uncached = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)


# ---- what has routers of its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Longformer", {"self.query", "self.key", "self.value", "classifier.dense", "classifier.out_proj"}),
        ("LED", {"longformer_self_attn.query", "longformer_self_attn.key", "longformer_self_attn.value"}),
        ("Swin", {"attention.q_proj", "attention.k_proj", "attention.v_proj", "downsample.reduction"}),
        ("Segformer", {"attention.k_proj", "attention.v_proj"}),
        ("SamModel", {"attn.qkv", "attn.proj"}),
        ("Funnel", {"attention.k_head", "attention.v_head"}),
        ("PatchTST", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}),
        ("Bert", {"pooler.dense", "classifier"}),
        ("Llava", {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}),
    ],
)  # fmt: skip
def test_linears_that_read_other_tokens_have_routers_of_their_own(name, expected):
    assert expected <= own_linears(mixture_on(name))


@pytest.mark.parametrize("name", ["Longformer", "Swin", "Segformer", "DeepseekV3", "Llava", "Bert"])
@pytest.mark.parametrize("scope", ["block", "model"])
def test_the_folder_decides_on_loading(name, scope, tmp_path, monkeypatch):
    """Which linears had routers of their own is in the configuration: no probe has to find it again."""
    model = mixture_on(name, router_scope=scope).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(placement, "_is_likely_alike", lambda *_: True)
    inputs = CASE[name].inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        loaded = PeftModel.from_pretrained(CASE[name].build(), tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs)[0], expected, rtol=1e-5, atol=1e-6)
    assert loaded.peft_config["default"].own_routers == model.peft_config["default"].own_routers
    assert list(routers_of(loaded)) == list(routers_of(model))


def as_from_before(folder):
    """Make a save what it was before configurations had `own_routers`, which is returned."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    own = settings.pop("own_routers")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return own


def test_adapters_from_before_load_with_the_routers_that_they_have(tmp_path):
    """Their configurations say nothing of routers of linears. In "model" scope the head obeyed the last block."""
    options = {"target_modules": ["q_proj", "lm_head"], "router_scope": "model", "own_routers": []}
    model = get_peft_model(llama(), MoELoraConfig(**(TIGHT | options)))
    awaken(model)
    assert list(routers_of(model)) == [""]
    model.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    assert as_from_before(tmp_path) == []
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert list(routers_of(loaded)) == [""]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids() % 64).logits, model(ids() % 64).logits, rtol=0, atol=0)


def test_what_cannot_be_seen_is_told_when_it_runs(monkeypatch):
    """By name, with the fix: to leave it out, or the scope that works."""
    monkeypatch.setattr(placement, "readings_of", lambda model: Readings())
    inputs = CASE["Longformer"].inputs()
    with pytest.raises(ValueError, match=r"`longformer.encoder.layer.0.attention.self.query`.*router_scope=\"module\""):
        mixture_on("Longformer")(**inputs)
    assert torch.isfinite(mixture_on("Longformer", router_scope="module")(**inputs)[0]).all()


def test_making_an_adapter_draws_no_random_numbers_for_the_probe():
    base = CASE["Swin"].build()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probe._readings_of.cache_clear()
    assert probe.readings_of(base).leads
    assert torch.equal(torch.rand(3), expected)
    assert not any(parameter.is_meta for parameter in base.parameters())


def test_kernels_in_place_of_a_models_own_functions_are_not_started_by_the_probe(monkeypatch):
    """Liger and others patch transformers' modules; on a GPU a kernel would write to where a tensor without data is."""
    started = []

    class JITFunction:
        def run(self, *args, **options):
            started.append(args)

    def rotated(q, k, cos, sin, *args, **options):
        JITFunction().run(q, k, grid=(1,))
        return q, k

    real = torch.ones(1)
    run = JITFunction.run
    base = CASE["Llama"].build()
    probe._readings_of.cache_clear()
    expected = probe.readings_of(base)
    assert expected.complete
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", SimpleNamespace(JITFunction=JITFunction))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
    with probe._without_kernels():
        JITFunction().run(real)
    probe._readings_of.cache_clear()
    assert probe.readings_of(base) == expected
    assert started == [(real,)]
    assert JITFunction.run is run


def test_plain_lora_loads_without_a_word_of_routers(tmp_path, recwarn):
    get_peft_model(llama(), MoELoraConfig(r=2, use_moe_routing=False)).save_pretrained(tmp_path)
    as_from_before(tmp_path)
    PeftModel.from_pretrained(llama(), tmp_path)
    assert not [warning for warning in recwarn if "own_routers" in str(warning.message)]


def test_a_configuration_serves_for_another_model():
    """Names of one model's linears do not stick: the other's are found anew, and the first model keeps its own."""
    config = MoELoraConfig(target_modules=["query", "dense", "k_proj", "linear_1"], **TIGHT)
    first, second, again = (get_peft_model(CASE[name].build(), config) for name in ("Bert", "Llava", "Bert"))
    assert first.peft_config["default"] is config
    assert own_linears(first) == own_linears(again) == {"pooler.dense"}
    assert own_linears(second) == {"multi_modal_projector.linear_1"}


def test_adapters_that_disagree_are_refused(tmp_path):
    mixture_on("Llava").save_pretrained(tmp_path)
    config = MoELoraConfig.from_pretrained(tmp_path)
    model = mixture_on("Llava")
    config.own_routers = config.own_routers[1:]
    with pytest.raises(ValueError, match=r"`model.multi_modal_projector.linear_1` has a router of its own in this"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["Longformer", "Llava"])
def test_weights_by_hand_and_attached_routers(name):
    """What weights by hand say nothing about is refused by name; an attached router leaves it its own router."""
    model, inputs = mixture_on(name).eval(), CASE[name].inputs()
    model.attach_router(torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Softmax(-1)))
    with torch.no_grad():
        assert torch.isfinite(model(**inputs)[0]).all()
    model.detach_router()
    if name == "Longformer":
        with pytest.raises(ValueError, match=r"self\.query` reads other tokens.*exclude_modules"):
            model(**inputs, routing_weights=torch.full((2, 4), 0.25))


# ---- padding ---------------------------------------------------------------------------------------------------------


def text(padded: Ellipsis, length: int = 7, batch: int = 2) -> dict:
    """Two texts, of which the second ends in two padded positions that hold this token."""
    found, mask = ids(length), torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    found[1, -2:] = padded
    return {"input_ids": found, "attention_mask": mask}


def answered(inputs: dict) -> dict:
    return inputs | {"decoder_input_ids": ids(5, seed=2), "use_cache": False}


def sound(padded: float) -> dict:
    wave, mask = noise(2, 4000), torch.ones(2, 4000, dtype=torch.long)
    mask[1, -1500:] = 0
    wave[1, -1500:] = padded
    return {"input_values": wave, "attention_mask": mask}


PADDED = {
    "Longformer": lambda token: text(token),
    "Longformer, a whole window": lambda token: text(token, length=8),
    "Longformer, as many texts as tokens": lambda token: {
        name: value.repeat(2, 1) for name, value in text(token, length=4).items()
    },
    "LED": lambda token: answered(text(token)),
    "SwitchTransformers": lambda token: answered(text(token)),
    "Funnel": lambda token: text(token),
    "XLNet": lambda token: {name: value.flip(1) for name, value in text(token).items()},
    "DeepseekV3": lambda token: text(token) | {"use_cache": False},
    "MiniCPM3": lambda token: text(token) | {"use_cache": False},
    "Llama": lambda token: text(token) | {"use_cache": False},
    "Wav2Vec2": sound,
    "Rwkv": lambda token: text(token) | {"use_cache": False},
}


@every_pair(name=PADDED, training=[True, False], scope=SCOPES)
def test_padding_reaches_no_real_token(name, training, scope):
    """In training too, where experts are full: what is padded may not take a real token's place."""
    results = []
    for token in (0, 50):
        inputs = PADDED[name](token)
        model = mixture_on(name.partition(",")[0], router_scope=scope).train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with torch.set_grad_enabled(training):
            output = model(**inputs)[0].detach()
        real = inputs["attention_mask"].bool()
        results.append(output[real] if output.shape[:2] == real.shape else output)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_texts_mask_says_nothing_of_patches():
    """Not even where there are as many of the ones as of the others: 16 patches and a class token."""
    model = mixture_on("Llava").train()
    inputs = CASE["Llava"].inputs()
    inputs["input_ids"] = ids(1, image=16)
    inputs["attention_mask"] = torch.tensor([[1] * 17, [0] + [1] * 16])
    model(**inputs)
    stats = {name: found.num_tokens for name, found in model.routing_stats().items()}
    assert {count for name, count in stats.items() if "vision" in name} == {34}
    assert {count for name, count in stats.items() if "language" in name} == {33}
    assert {count for name, count in stats.items() if "projector" in name} == {32}


# ---- what is built on routers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Longformer", "MiniCPM3", "Llava"])
def test_gradient_checkpoints_change_nothing(name):
    gradients = []
    for is_checkpointed in (False, True):
        model = mixture_on(name, router_aux_loss_coef=0.5).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
        model(**CASE[name].inputs())[0].float().pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], expected, rtol=1e-4, atol=1e-6, msg=parameter)


def test_a_mixture_merges_under_fixed_weights():
    """Each linear by its router, which may be its own."""
    model = mixture_on("Bert", router_type="fixed").eval()
    inputs = CASE["Bert"].inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        torch.testing.assert_close(model.merge_and_unload()(**inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_one_more_expert_joins_with_routers_in_the_same_places():
    config = MoELoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(CASE["Llava"].build(), config, adapter_name="expert_0")
    model.add_adapter("expert_1", config)
    assert model.peft_config["expert_1"].own_routers == model.peft_config["expert_0"].own_routers
    assert all(len(router.pool) == 2 for router in routers_of(model).values())


def test_no_server_is_given_a_router_of_a_linear(tmp_path):
    mixture_on("MiniCPM3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"kv_b_proj` has a router of its own .*exclude_modules"):
        read_served_mixture(tmp_path)


def test_a_report_leaves_out_routers_that_read_no_tokens():
    model = mixture_on("Llama")  # for classification: its head reads tokens too
    block = TextBlock(token_ids=ids(8)[0].tolist(), domain=0, document=0, unit=0)
    with undisturbed(model):
        assert reading_routers(model, block) == list(routers_of(model))
    model = mixture_on("Longformer")
    with undisturbed(model):
        assert not [name for name in reading_routers(model, block) if "query" in name]
