"""Linears that read one input are computed together, and never with anything but what they read."""

from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from helpers import ARCHITECTURES, SCOPES, assert_same_grads, awaken, mixture_of, train_step
from peft import get_peft_model
from torch import nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.modeling_layers import GradientCheckpointingLayer

from moelora import MoELoraConfig
from moelora.forward import shared_input as module
from moelora.forward.shared_input import readers_of
from moelora.tuner.layer import MoELoraLayer

IDS = torch.arange(1, 43).view(3, 14)
INPUTS = {"input_ids": IDS, "labels": IDS}
EXACT = {"rtol": 0, "atol": 1e-10}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture
def groups(monkeypatch):
    """Sizes of the groups that were computed together."""
    sizes, original = [], module.FusedGroup.__call__

    def noted(self, x, *args):
        if self.num_readers > 1:
            sizes.append(self.num_readers)
        return original(self, x, *args)

    monkeypatch.setattr(module.FusedGroup, "__call__", noted)
    return sizes


@pytest.fixture
def alone(monkeypatch):
    """Call it, and every linear is computed by itself."""
    return lambda: monkeypatch.setattr(MoELoraLayer, "_shared_input", staticmethod(lambda routing: None))


# ---- who reads the same, by the source ----


class Sources(nn.Module):
    def straight(self, x, y):
        return self.a(x) + self.b(y) + self.c(x) + self.d(y)

    def reassigned(self, x):
        q = self.a(x)
        x = x + 1
        return q + self.b(x) + self.c(x)

    def augmented(self, x):
        q = self.a(x)
        x += 1
        return q + self.b(x)

    def branch(self, x, flag):
        q = self.a(x)
        if flag:
            return q + self.b(x) + self.c(x)
        return q + self.d(x)

    def early_return(self, x, flag):
        q = self.a(x)
        if flag:
            return q
        return q + self.b(x) + self.c(x)

    def either(self, x, flag):
        return (self.a(x) if flag else self.b(x)) + self.c(x) + self.d(x)

    def tried(self, x):
        try:
            q = self.a(x)
        finally:
            self.b(x)
        return q + self.c(x) + self.d(x)

    def with_arguments(self, x):
        return self.a(x) + self.b(x, 2) + self.c(x, scale=2) + self.d(x)

    def assigned_in_a_branch(self, x, flag):
        q = self.a(x)
        if flag:
            x = x + 1
        return q + self.b(x)

    def other_calls(self, x):
        return self.a(x + 1) + self.b(x[0]) + torch.relu(x) + self.inner.c(x) + self.d(x)

    def twice(self, x):
        return self.a(x) + self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "straight": (("a", "c"), ("b", "d")),
        "reassigned": (("b", "c"),),
        "augmented": (),
        "branch": (("b", "c"),),
        "early_return": (("b", "c"),),
        "either": (("c", "d"),),
        "tried": (("a", "b"), ("c", "d")),
        "with_arguments": (("a", "d"),),
        "assigned_in_a_branch": (),
        "other_calls": (),
        "twice": (("a", "b"),),
    }.items(),
)
def test_readers_are_found_in_the_source(name, expected):
    assert readers_of(getattr(Sources, name)) == expected


def test_a_forward_without_source_has_no_readers():
    namespace = {}
    exec("def forward(self, x):\n    return self.a(x) + self.b(x)", namespace)
    assert readers_of(namespace["forward"]) == readers_of(torch.relu) == ()


# ---- what is computed together ----


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_each_linear_by_itself(scope, checkpointing, groups, alone):
    model = mixture_of("llama", router_scope=scope, router_aux_loss_coef=0.0, expert_capacity_factor=None).double()
    model.base_model.set_expert_maturity("default", 0.5)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    loss, grads = train_step(model, INPUTS)
    runs = 2 if checkpointing is not None else 1
    assert groups == ([] if scope == "module" else [3, 2, 3, 2] * runs)  # q, k, v and gate, up of two blocks
    model.base_model.set_expert_maturity("default", 0.5)
    alone()
    expected_loss, expected_grads = train_step(model, INPUTS)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    assert_same_grads(grads, expected_grads, **EXACT)


def in_the_same_order(mlp, x):
    """As Liger's kernels do."""
    return mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def in_another_order(mlp, x):
    up = mlp.up_proj(x)
    return mlp.down_proj(silu(mlp.gate_proj(x)) * up)


def of_two_tensors(mlp, x):
    return mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x.clone()))


@pytest.mark.parametrize("forward", [in_the_same_order, in_another_order, of_two_tensors])
def test_a_forward_that_is_replaced_after_the_adapters_joined(forward, groups, alone):
    """The Trainer puts Liger's kernels in place when training starts, and the source was read before."""
    model = mixture_of("llama", router_aux_loss_coef=0.0, expert_capacity_factor=None).double()
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(forward, block.mlp)
    loss, grads = train_step(model, INPUTS)
    if forward is in_the_same_order:
        assert groups == [3, 2, 3, 2]
    model.base_model.set_expert_maturity("default", 0.0)
    alone()
    expected_loss, expected_grads = train_step(model, INPUTS)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    assert_same_grads(grads, expected_grads, **EXACT)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert", "t5", "bart", "vit"])
def test_evaluation_equals_each_linear_by_itself(architecture, alone):
    model = mixture_of(architecture).double()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in ARCHITECTURES[architecture].batch(2, 5).items()
    }
    with torch.no_grad():
        together = model(**inputs).logits
        alone()
        torch.testing.assert_close(together, model(**inputs).logits, **EXACT)


def test_a_subset_of_adapters_or_a_disabled_mixture_shares_nothing_stale(groups, alone):
    model = mixture_of("llama", experts=True).double()
    model.set_adapter(["expert_2", "expert_0"])
    with torch.no_grad():
        together = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        assert groups == [3, 2, 3, 2]
        alone()
        torch.testing.assert_close(together, model(input_ids=IDS).logits, **EXACT)
    assert (base - together).abs().max() > 1e-3


# ---- what is not ----


class Block(GradientCheckpointingLayer):
    def __init__(self, between=None):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 6), nn.Linear(8, 6)
        self.between = between

    def forward(self, hidden_states):
        h = hidden_states * 2
        q = self.q_proj(h)
        if self.between is not None:
            self.between(h)
        k = self.k_proj(h)
        return q, k


class Model(nn.Module):
    def __init__(self, between=None):
        super().__init__()
        self.layers = nn.ModuleList([Block(between)])
        self.config = type("Config", (), {"hidden_size": 8, "model_type": "custom", "to_dict": lambda self: {}})()

    def forward(self, hidden_states):
        return self.layers[0](hidden_states)


def mixture(between=None):
    torch.manual_seed(0)
    config = MoELoraConfig(r=2, num_experts=3, target_modules=["q_proj", "k_proj"])
    model = get_peft_model(Model(between), config).double().eval()
    awaken(model)
    return model


def outputs(model, x):
    return torch.cat(model(x), dim=-1)


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_an_input_changed_in_place_is_read_anew(x, groups, alone):
    model = mixture(between=lambda h: h.add_(1.0))
    with torch.no_grad():
        together = outputs(model, x)
        assert groups == [2]
        alone()
        torch.testing.assert_close(together, outputs(model, x), **EXACT)


def test_in_inference_mode_nothing_is_shared(x, groups, alone):
    """Inference tensors have no version counter, so nobody would see this change."""
    model = mixture(between=lambda h: h.add_(1.0))
    with torch.inference_mode():
        result = outputs(model, x).clone()
    assert groups == []
    with torch.no_grad():
        alone()
        torch.testing.assert_close(result, outputs(model, x), **EXACT)


def test_a_layer_disabled_in_between_is_obeyed(x):
    model = mixture()
    q_proj, k_proj = (model.base_model.model.layers[0].get_submodule(name) for name in ("q_proj", "k_proj"))
    q_proj.register_forward_hook(lambda *_: k_proj.enable_adapters(False))
    _, k = model(x)
    torch.testing.assert_close(k, k_proj.base_layer(2 * x), **EXACT)


def test_a_base_layer_with_hooks_is_called_by_its_own_layer_alone(x, groups):
    model = mixture()
    calls = []
    model.base_model.model.layers[0].k_proj.base_layer.register_forward_hook(lambda *_: calls.append(len(groups)))
    model(x)
    assert calls == [0] and groups == []


def test_an_output_may_be_changed_in_place(x):
    """As OLMo does where it clips q, k and v."""
    model = mixture()
    plain = model(x)
    for output, expected in zip(model(x), plain, strict=True):
        torch.testing.assert_close(output.clamp_(-1, 1), expected.clamp(-1, 1), **EXACT)


def test_a_linear_that_is_not_called_gets_no_gradient(x):
    model = mixture().train()
    model(x)[0].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    assert all((gradient is None) == ("k_proj" in name) for name, gradient in gradients.items())


def test_a_scripted_submodule_is_no_obstacle():
    base = Model()
    base.layers[0].act = torch.jit.script(nn.SiLU())
    get_peft_model(base, MoELoraConfig(r=2, num_experts=3, target_modules=["q_proj", "k_proj"]))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_tokens(shape):
    q, k = mixture()(torch.zeros(shape, dtype=torch.float64))
    assert q.shape == k.shape == (*shape[:2], 6)


def test_a_hook_that_replaces_the_input_is_obeyed(x, groups, alone):
    model = mixture()
    model.base_model.model.layers[0].k_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    together = outputs(model, x)
    assert groups == [2]
    alone()
    torch.testing.assert_close(together, outputs(model, x), **EXACT)


def test_no_grad_for_one_linear_takes_no_gradient_from_the_next(x):
    grad = {}

    class Mixed(Block):
        def forward(self, hidden_states):
            h = hidden_states * 2
            with torch.no_grad():
                q = self.q_proj(h)
            k = self.k_proj(h)
            grad["q"], grad["k"] = q.requires_grad, k.requires_grad
            return q, k

    base = Model()
    base.layers[0] = Mixed()
    model = get_peft_model(base, MoELoraConfig(r=2, num_experts=3, target_modules=["q_proj", "k_proj"])).double()
    model(x)
    assert grad == {"q": False, "k": True}


def fail(h):
    raise RuntimeError("stop")


@pytest.mark.parametrize("between", [None, fail], ids=["forward", "exception"])
def test_nothing_is_kept_afterwards(x, between, monkeypatch):
    seen, original = [], module.SharedInput.run
    monkeypatch.setattr(module.SharedInput, "run", lambda self, *args: seen.append(self) or original(self, *args))
    model = mixture(between)
    with nullcontext() if between is None else pytest.raises(RuntimeError, match="stop"):
        model(x)
    assert all(hook.routing is None for hook in model.base_model.routing.hooks.values())
    assert seen and all(shared._x is None and not shared._outputs for shared in seen)


def test_factors_cast_without_gradient_serve_no_product_with_one():
    """The first linear of a block may run without gradient, when the factors of the others are cast with its own, and
    the weights flattened for all."""
    model = LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16)
    options = {"target_modules": ["q_proj", "o_proj"], "router_aux_loss_coef": 0.0}
    model = get_peft_model(model, MoELoraConfig(r=2, num_experts=3, **options))
    awaken(model)
    layer = model.base_model.model.model.layers[0].self_attn
    alone = layer.q_proj.forward
    layer.q_proj.forward = torch.no_grad()(alone)
    for _ in range(2):  # the second time, the block knows what is to come
        model.zero_grad()
        model(input_ids=IDS[:, :5], labels=IDS[:, :5]).loss.backward()
        assert layer.q_proj.lora_B["default"].weight.grad is None
        assert layer.o_proj.lora_B["default"].weight.grad.abs().sum() > 0
        (router,) = model.base_model.routing.routers["model.layers.0"].active_routers()
        assert router.weight.grad.abs().sum() > 0


def test_generate_obeys_a_change_of_adapters_between_tokens():
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    config = MoELoraConfig(r=2, num_experts=2, target_modules=["q_proj", "k_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.add_adapter("other", config)
    awaken(model)
    model.eval()
    prompt = IDS[:1, :4]

    def switch(_, scores):
        model.set_adapter("other")
        return scores

    model.set_adapter("default")
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    actual = model.generate(
        input_ids=prompt, logits_processor=LogitsProcessorList([switch]), use_cache=False, **options
    )
    model.set_adapter("other")
    expected = model(input_ids=actual.sequences[:, :5]).logits[:, -1]
    torch.testing.assert_close(actual.logits[1], expected)
