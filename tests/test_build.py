"""Registration with PEFT and transformers, and both ways of building a mixture."""

import copy
import importlib
import pickle
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from helpers import (
    ARCHITECTURES,
    LLAMA_TARGETS,
    SCOPES,
    assert_same_grads,
    awaken,
    config_for,
    every_pair,
    llama,
    mixture_of,
    mlp,
    routers_of,
    train_step,
)
from packaging.version import parse
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

import moelora
from moelora import MoELoraConfig, MoELoraModel

wants_pefts_release = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION), reason=f"transformers wants PEFT {MIN_PEFT_VERSION} for this"
)

# ---- registration ----


@pytest.mark.parametrize("module", ["peft", "peft.tuners", "peft.tuners.lora"])
def test_exported_beside_pefts_own(module):
    assert importlib.import_module(module).MoELoraConfig is MoELoraConfig
    assert importlib.import_module(module).MoELoraModel is MoELoraModel


@pytest.mark.parametrize(
    "first",
    [
        "import moelora",
        pytest.param("import peft; import moelora", marks=pytest.mark.slow),
        pytest.param("import transformers, peft; import moelora", marks=pytest.mark.slow),
    ],
)
def test_import_in_any_order_and_twice(first):
    """In a fresh interpreter, the import being what registers."""
    script = f"""
        {first}
        import importlib, pickle, copy
        import moelora; importlib.reload(moelora)
        from peft import MoELoraConfig, PeftType, get_peft_model
        from peft.tuners import MoELoraConfig as again
        assert MoELoraConfig is again is moelora.MoELoraConfig
        kind = MoELoraConfig().peft_type
        assert kind is PeftType.MOELORA is PeftType("MOELORA")
        assert kind is pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind)
        assert list(PeftType).count(kind) == 1 and kind == "MOELORA" and kind.value == "MOELORA"
        import torch
        class M(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = torch.nn.Linear(4, 4)
            def forward(self, x):
                return self.lin(x)
        model = get_peft_model(M(), MoELoraConfig(target_modules=["lin"], router_scope="module"))
        assert model(torch.ones(2, 4)).shape == (2, 4)
        print("fine")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


def test_peft_itself_is_unharmed():
    """Plain LoRA, made after the import, holds nothing of ours."""
    model = get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(model) is peft.PeftModelForCausalLM and type(model.base_model) is peft.LoraModel
    assert not [name for name, _ in model.named_modules() if "moe" in name.lower()]


def saved(tmp_path, **overrides):
    model = mixture_of("llama", **overrides)
    model.save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    model.base_model.model.config._name_or_path = str(tmp_path / "base")
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    with torch.no_grad():
        return tmp_path / "adapter", inputs, model(**inputs).logits


@every_pair(how=["PeftModel", "AutoPeft", "PeftConfig"], experts=[False, True], scope=SCOPES)
def test_pefts_loaders_know_it(tmp_path, how, experts, scope):
    path, inputs, expected = saved(tmp_path, router_scope=scope, experts=experts)
    if how == "PeftConfig":
        config = PeftConfig.from_pretrained(path)
        assert type(config) is MoELoraConfig and config.num_experts == 4 and config.router_scope == scope
        return
    model = PeftModel.from_pretrained(llama(), path) if how == "PeftModel" else None
    model = (model or AutoPeftModelForCausalLM.from_pretrained(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


@wants_pefts_release
@pytest.mark.parametrize("scope", SCOPES)
def test_transformers_load_adapter(tmp_path, scope):
    """transformers injects and throws the tuner away: routing must live on without it."""
    path, inputs, expected = saved(tmp_path, router_scope=scope)
    model = llama()
    model.load_adapter(str(path))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
        model.disable_adapters()
        torch.testing.assert_close(model(**inputs).logits, llama()(**inputs).logits, rtol=0, atol=0)
        model.enable_adapters()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)


def test_transformers_loads_an_adapter_directory(tmp_path):
    path, inputs, expected = saved(tmp_path)
    model = type(llama()).from_pretrained(path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)


@wants_pefts_release
def test_transformers_add_adapter_trains():
    model = llama()
    model.add_adapter(config_for(ARCHITECTURES["llama"]))
    _, grads = train_step(model, ARCHITECTURES["llama"].batch())
    assert any("lora_B" in name for name in grads) and all("lora_" in name for name in grads)


# ---- both ways of building ----


def build_both(**overrides):
    """The design's two listings, word for word, with the second's weights copied from the first's."""
    config = config_for(ARCHITECTURES["llama"], **overrides)
    torch.manual_seed(0)
    whole = get_peft_model(llama(), config)
    awaken(whole)

    config = config_for(ARCHITECTURES["llama"], **overrides)
    base = llama()
    model = get_peft_model(base, config, adapter_name="expert_0")
    for i in range(1, config.num_experts):
        model.add_adapter(f"expert_{i}", config)
    copy_experts(whole, model)
    return whole, model


def copy_experts(whole, model):
    source = whole.state_dict()
    for name, tensor in model.state_dict().items():
        if ".expert_" not in name:
            continue
        before, _, rest = name.partition(".expert_")
        number, _, suffix = rest.partition(".")
        i, theirs = int(number), source[f"{before}.default.{suffix}"]
        dim = 1 if "lora_B" in name else 0
        if suffix.endswith(("hidden_weight", "is_set")):  # not one row per expert
            tensor.copy_(theirs)
        else:
            tensor.copy_(theirs.chunk(whole.peft_config["default"].num_experts, dim=dim)[i])


@every_pair(scope=SCOPES, router_type=["learned", "learned_with_maturity", "fixed"], num_experts=[4, 7])
def test_same_weights_same_outputs_and_gradients(scope, router_type, num_experts):
    options = {"router_scope": scope, "router_type": router_type, "num_experts": num_experts, "maturity_tokens": 50}
    whole, pieces = build_both(**options)
    if router_type == "fixed":
        for model in (whole, pieces):
            model.set_routing_weights(torch.arange(num_experts) / 7)
    inputs = ARCHITECTURES["llama"].batch()
    for _ in range(2):  # the second time with grown maturity
        loss, grads = train_step(whole, inputs)
        loss2, grads2 = train_step(pieces, inputs)
        torch.testing.assert_close(loss2, loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pieces.expert_maturity, whole.expert_maturity, rtol=0, atol=1e-6)
        for name, grad in grads.items():
            dim = 1 if "lora_B" in name else 0
            parts = [grads2[name.replace("default", f"expert_{i}")] for i in range(num_experts)]
            torch.testing.assert_close(
                torch.cat(parts, dim=dim), grad, rtol=0, atol=1e-4 * grad.abs().max().item(), msg=name
            )  # float32
    whole.eval(), pieces.eval()
    with torch.no_grad():
        torch.testing.assert_close(pieces(**inputs).logits, whole(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole(**inputs).logits, llama()(**inputs).logits, atol=1e-2)


def test_expert_by_expert_needs_nothing_else():
    config = config_for(ARCHITECTURES["llama"])
    model = get_peft_model(llama(), config, adapter_name="expert_0")
    for i in range(1, 4):
        model.add_adapter(f"expert_{i}", config)
        assert model.active_adapters == [f"expert_{j}" for j in range(i + 1)]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.split(".expert_")[1][0] for name in trainable} == set("0123")
    _, grads = train_step(model, ARCHITECTURES["llama"].batch())
    assert set(grads) == trainable
    stats = model.routing_stats()
    assert all(len(s.expert_load) == 4 for s in stats.values())
    model.eval()
    assert model.generate(torch.tensor([[2, 3]]), max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("adapter_name", ["default", "mine", "expert", "expert_x", "my_expert_0", "router", "model"])
def test_any_adapter_name_holds_the_whole_mixture(adapter_name):
    config = config_for(ARCHITECTURES["llama"])
    model = get_peft_model(llama(), config, adapter_name=adapter_name)
    assert model.active_adapters == [adapter_name]
    assert model.base_model.routing.num_experts == 4
    _, grads = train_step(model, ARCHITECTURES["llama"].batch())
    assert len(grads) == 2 * 7 * 2 + 2
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    assert q_proj.lora_A[adapter_name].weight.shape == (8, 32) and q_proj.lora_B[adapter_name].weight.shape == (32, 8)
    assert q_proj.scaling[adapter_name] == 4.0


def test_adapters_of_several_experts_pool():
    """A mixture of 4, one of 3 and a single expert, which joins them: 8 experts in the order of the adapters."""
    model = mixture_of("llama")
    model.add_adapter("more", config_for(ARCHITECTURES["llama"], num_experts=3, r=5))
    model.set_adapter(["default", "more"])
    model.add_adapter("expert_9", config_for(ARCHITECTURES["llama"], target_modules=["q_proj", "up_proj"]))
    assert model.base_model.routing.num_experts == 8
    _, grads = train_step(model, ARCHITECTURES["llama"].batch())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(grads)
    assert all(len(s.expert_load) == 8 for s in model.routing_stats().values())
    model.eval()
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    with torch.no_grad():
        only = torch.zeros(3, 8)
        only[:, 7] = 1.0
        model.base_model.model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, args, output: torch.testing.assert_close(output, module.base_layer(args[0]))
        )  # not a target of expert_9: its delta is none
        model(**inputs, routing_weights=only)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k_experts", 1),
        ("router_temperature", 1.0),
        ("router_type", "fixed"),
        ("router_scope", "module"),
        ("load_balance_loss_type", "switch"),
        ("routing_scale", 2.0),
    ],
)
def test_adapter_that_disagrees_is_refused_and_leaves_the_mixture(field, value):
    model = mixture_of("llama", experts=True)
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    with torch.no_grad():
        expected = model(**inputs).logits
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=rf"`{field}`"):
        model.add_adapter("expert_4", config_for(ARCHITECTURES["llama"], **{field: value}))
    assert (
        model.active_adapters == [f"expert_{i}" for i in range(4)] and list(model.peft_config) == model.active_adapters
    )
    assert set(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_configs_are_not_changed_by_building():
    config = MoELoraConfig(r=2, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM")
    before = copy.deepcopy(config.to_dict())
    model = get_peft_model(llama(), config, adapter_name="expert_0")
    model.add_adapter("expert_1", config)
    assert config.r == before["r"] and config.lora_alpha == before["lora_alpha"]
    assert model.peft_config["expert_1"] is not model.peft_config["expert_0"]


# ---- identity ----


@every_pair(name=ARCHITECTURES, scope=SCOPES, experts=[False, True])
def test_fresh_mixture_is_the_identity(name, scope, experts):
    inputs = ARCHITECTURES[name].batch(labels=False)
    model = mixture_of(name, fresh=True, router_scope=scope, experts=experts, lora_dropout=0.3, expert_dropout=0.3)
    with torch.no_grad():
        expected = ARCHITECTURES[name].build()(**inputs).logits
        for training in (False, True):
            model.train(training)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-6)


def test_fresh_plain_model_is_the_identity():
    model = get_peft_model(mlp(), MoELoraConfig(target_modules=["first", "second"], router_scope="module"))
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), mlp()(x), rtol=0, atol=0)


@pytest.mark.parametrize("init", [True, "gaussian"], ids=["kaiming", "gaussian"])
def test_experts_start_as_lora_of_their_own_rank_does(init):
    """Stored at rank E * r, yet A has the spread of a LoRA of rank r."""
    options = {"r": 8, "init_lora_weights": init, "target_modules": ["q_proj"]}
    model = get_peft_model(llama(hidden_size=128), MoELoraConfig(num_experts=8, **options))
    lora = get_peft_model(llama(hidden_size=128), peft.LoraConfig(**options))
    spread, expected = (
        m.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.std() for m in (model, lora)
    )
    assert spread.item() == pytest.approx(expected.item(), rel=0.1)


def test_peft_type_on_the_model():
    model = mixture_of("llama")
    assert model.peft_type is PeftType.MOELORA and isinstance(model.base_model, moelora.MoELoraModel)
    assert routers_of(model).keys() == {"model.layers.0", "model.layers.1"}


def test_same_seed_same_mixture():
    torch.manual_seed(5)
    one = mixture_of("llama", fresh=True).state_dict()
    other = mixture_of("llama", fresh=True).state_dict()
    assert_same_grads(one, other, rtol=0, atol=0)


def test_a_tuner_made_by_itself_leaves_nothing_behind():
    """No hook of torch's is left waiting for a PeftModel that nobody makes, and another's modules are not touched."""
    hooks = torch.nn.modules.module._global_module_registration_hooks
    before = dict(hooks)
    tuner = MoELoraModel(llama(), {"default": config_for(ARCHITECTURES["llama"])}, "default")
    assert dict(hooks) == before

    class Wrapper(peft.PeftModel):
        def __init__(self, base_model):
            torch.nn.Module.__init__(self)
            self.base_model = base_model

    assert type(Wrapper(tuner)) is Wrapper
    assert type(get_peft_model(llama(), config_for(ARCHITECTURES["llama"]))).__name__ == "MoELoraPeftModelForCausalLM"
    assert dict(hooks) == before


class OwnPeftModel(peft.PeftModelForCausalLM):
    """Somebody's own wrapper, with an override and an argument of its own."""

    def __init__(self, model, config, note=""):
        super().__init__(model, config)
        self.note = note

    def generate(self, *args, **kwargs):
        self.note = "generated"
        return super().generate(*args, **kwargs)


def test_a_wrapper_of_ones_own_is_a_mixtures_too():
    config = config_for(ARCHITECTURES["llama"])
    model = OwnPeftModel(llama(), config, note="mine")
    model.add_adapter("other", config)
    model.set_adapter(["default", "other"])
    assert isinstance(model, OwnPeftModel) and model.active_adapters == ["default", "other"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model) and copied.note == "mine" and copied.active_adapters == ["default", "other"]
    batch = ARCHITECTURES["llama"].batch(1, 3, labels=False)
    weights = torch.eye(8)[:1].expand(1, 8)
    model.eval().generate(**batch, routing_weights=weights, max_new_tokens=1)
    assert model.note == "generated", "the override was passed over"


def test_a_constructor_that_another_library_has_wrapped(monkeypatch):
    made = peft.PeftModel.__init__
    monkeypatch.setattr(peft.PeftModel, "__init__", lambda self, *args, **kwargs: made(self, *args, **kwargs))
    config = config_for(ARCHITECTURES["llama"])
    model = get_peft_model(llama(), config)
    model.add_adapter("expert_0", config)
    assert model.active_adapters == ["default", "expert_0"]
