"""torch.func's gradients of single samples and torch.jit.trace, for a mixture as for plain LoRA."""

import itertools
import warnings

import pytest
import torch
from helpers import ARCHITECTURES, LLAMA_TARGETS, SCOPES, grads_of, llama, mixture_of
from native import EXPERTS, batch, native_model, ours
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, grad, jacrev, vmap

MODELS = [("llama", scope) for scope in ("lora", *SCOPES)]
MODELS += [("gpt2", "block"), ("opt", "module"), ("bart", "block"), ("t5", "model"), ("vit", "block")]


def adapted(name, scope):
    if scope == "lora":
        config = LoraConfig(r=2, target_modules=LLAMA_TARGETS, init_lora_weights=False)
        return get_peft_model(llama(), config).eval()
    return mixture_of(name, router_scope=scope)


def split(model):
    parameters = dict(model.named_parameters())
    trained = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad}
    return trained, {name: parameter.detach() for name, parameter in parameters.items() if name not in trained}


def loss_of(model, frozen, names):
    def loss(trained, *sample):
        inputs = {name: value[None] for name, value in zip(names, sample, strict=True)}
        if "input_ids" in names:  # or transformers looks for padding, which it cannot under vmap
            inputs["attention_mask"] = torch.ones(1, sample[0].shape[-1], dtype=torch.int64)
        return functional_call(model, (trained, frozen), (), inputs).logits.square().mean()

    return loss


@pytest.mark.parametrize(("model", "training"), zip(MODELS, itertools.cycle([True, False]), strict=False), ids=str)
def test_gradients_of_each_sample(model, training):
    """All at once, as by one backward for each."""
    name, scope = model
    model = adapted(*model).train(training)
    inputs = ARCHITECTURES[name].batch(batch=3, labels=False)
    trained, frozen = split(model)
    loss = loss_of(model, frozen, list(inputs))
    with warnings.catch_warnings(record=True):
        together = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(trained, *inputs.values())
    assert scope == "lora" or not model.routing_stats()
    model.eval()  # no capacity, which is for batches
    for row in range(3):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits.square().mean().backward()
        alone = grads_of(model)
        assert alone and any("lora_router" in key for key in alone) == (scope != "lora")
        for key, value in alone.items():
            assert torch.allclose(together[key][row], value, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize(
    "options",
    [
        {"router_type": "fixed"},
        {"router_type": "sigmoid", "load_balance_loss_type": "loss_free"},
        {"router_type": "learned_with_maturity"},
        {"router_hidden_size": 5},
        {"experts": True},
    ],
    ids=str,
)
def test_every_router_is_transformed(options):
    model = mixture_of("llama", **options)
    inputs = ARCHITECTURES["llama"].batch(batch=2, labels=False)
    trained, frozen = split(model)
    key = next(name for name in reversed(trained) if "lora_router" in name or "lora_A" in name)
    rest = {name: value for name, value in trained.items() if name != key}
    loss = loss_of(model, frozen | rest, ["input_ids"])
    jacobian = jacrev(lambda value: vmap(lambda ids: loss({key: value}, ids))(inputs["input_ids"]))(trained[key])
    model.zero_grad()
    for row in range(2):
        loss_alone = model(inputs["input_ids"][row : row + 1]).logits.square().mean()
        (expected,) = torch.autograd.grad(loss_alone, dict(model.named_parameters())[key])
        torch.testing.assert_close(jacobian[row], expected, rtol=1e-3, atol=1e-5)


def test_training_without_a_balancing_loss_is_said_once():
    model = mixture_of("llama").train()
    ids = ARCHITECTURES["llama"].batch(labels=False)["input_ids"]
    trained, frozen = split(model)
    with pytest.warns(UserWarning, match=r"torch\.func.*no balancing loss") as said:
        for _ in range(2):
            grad(loss_of(model, frozen, ["input_ids"]))(trained, ids[0])
    assert len([each for each in said if "torch.func" in str(each.message)]) == 1


class _Logits(torch.nn.Module):
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values):
        options = {} if "pixel_values" in self.names else {"use_cache": False}
        return self.model(**dict(zip(self.names, values, strict=True)), **options).logits


@pytest.mark.parametrize(("model", "gradients"), zip(MODELS, itertools.cycle([False, True]), strict=False), ids=str)
def test_a_traced_model_computes_the_same(tmp_path, model, gradients):
    name, _ = model
    model = adapted(*model)
    inputs, others = (ARCHITECTURES[name].batch(batch=3, labels=False, seed=seed) for seed in (1, 2))
    module = _Logits(model, list(inputs))
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traced shapes
        traced = torch.jit.trace(module, tuple(inputs.values()))
    torch.jit.save(traced, tmp_path / "traced.pt")
    again = torch.jit.load(tmp_path / "traced.pt")
    with torch.no_grad():
        torch.testing.assert_close(again(*others.values()), model(**others).logits, rtol=1e-4, atol=1e-5)


# ---- low-rank pairs on native experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # grouped products, and padded ones
def test_gradients_of_pairs_on_native_experts(dtype):
    model = ours(native_model("mixtral", dtype), target_modules=["q_proj"], target_parameters=EXPERTS)
    ids = batch(labels=False)["input_ids"]
    trained, frozen = split(model)
    together = grad(loss_of(model, frozen, ["input_ids"]))(trained, ids[0])
    model(ids[:1]).logits.square().mean().backward()
    alone = grads_of(model)
    assert any("experts" in key for key in alone)
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_trace_of_pairs_on_native_experts_holds_for_other_tokens(dtype):
    model = ours(native_model("mixtral", dtype), target_modules=["q_proj"], target_parameters=EXPERTS)
    ids = batch(labels=False)["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traced shapes
        traced = torch.jit.trace(_Logits(model, ["input_ids"]), (ids,))
        one_sided = torch.full_like(ids, 5)  # all tokens go to the same native experts
        torch.testing.assert_close(traced(one_sided), model(one_sided).logits, rtol=1e-4, atol=1e-5)
