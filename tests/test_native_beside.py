"""Experts of ours beside a base's native ones, weighed by our router; balancing losses of both routers."""

import copy
import pickle

import pytest
import torch
from native import EXPERTS, FAMILIES, batch, gradients, native_model, noisy, ours
from peft import PeftModel, get_peft_model
from torch import nn

from moelora import MoELoraConfig
from moelora.tuner._peft import ExpertsLora

BESIDE = {"target_modules": ["mlp.experts"], "expert_capacity_factor": None}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ExpertsLora)]


class Formula(nn.Module):
    """What the module should compute, written out: base(x) + sum_e w_e * scaling * B_e A_e x."""

    def __init__(self, layer, weights):
        super().__init__()
        self.base, self.layer, self.weights = layer.base_layer, layer, weights

    def forward(self, x, *routing):
        A, B = (factors["default"].weight for factors in (self.layer.lora_A, self.layer.lora_B))
        total = self.base(x, *routing)
        for e in range(4):
            block = slice(2 * e, 2 * e + 2)
            total = total + self.weights.flatten(0, -2)[:, e, None] * 3.0 * (x @ A[block].T) @ B[:, block].T
        return total


@pytest.mark.parametrize("family", FAMILIES)
def test_acts_from_what_enters_the_experts_to_what_leaves_them(family):
    inputs = batch()
    model = ours(native_model(family), **BESIDE)
    assert len(layers_of(model)) == FAMILIES[family].num_mixtures == len(model.base_model.routing.routers)
    weights = torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(5))
    loss = model(**inputs, routing_weights=weights).loss
    loss.backward()
    names = {name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    found = {name: p.grad.clone() for name, p in model.named_parameters() if name in names}
    model.zero_grad()
    by_formula = model.base_model.model
    for name, module in list(by_formula.named_modules()):
        if isinstance(module, ExpertsLora):
            parent = by_formula.get_submodule(name.rpartition(".")[0])
            parent.experts = Formula(module, weights)
    expected = by_formula(**inputs).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert found
    for layer in (module.layer for module in by_formula.modules() if isinstance(module, Formula)):
        for side in ("lora_A", "lora_B"):
            grad = getattr(layer, side)["default"].weight.grad
            name = next(n for n in names if n.startswith(f"base_model.model.{layer.link.name}.{side}"))
            assert grad.abs().max() > 0
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["block", "model", "module"])
def test_every_router_learns(scope):
    inputs = batch()
    inputs["attention_mask"] = torch.ones(3, 7, dtype=torch.int64)
    inputs["attention_mask"][1, 5:] = 0
    model = ours(native_model("qwen3_moe"), **BESIDE | {"router_scope": scope}).train()
    _, grads = gradients(model, inputs)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    if scope == "block":
        assert {stats.num_tokens for stats in model.routing_stats().values()} == {19}


def test_starts_as_the_base_and_can_be_switched_off():
    inputs = batch(labels=False)
    expected = native_model("gpt_oss")(**inputs).logits
    model = get_peft_model(native_model("gpt_oss"), MoELoraConfig(r=2, **BESIDE)).eval()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    noisy(model)
    assert (model(**inputs).logits - expected).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, expected)
    base = model.unload()
    torch.testing.assert_close(base(**inputs).logits, expected)


@pytest.mark.parametrize("targets", [BESIDE, {"target_modules": [], "target_parameters": EXPERTS}], ids=str)
def test_saved_loaded_copied_and_pickled(tmp_path, targets):
    inputs = batch(labels=False)
    model = ours(native_model("mixtral"), **targets)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(native_model("mixtral"), tmp_path, **options)
        assert torch.equal(again(**inputs).logits, expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)


def test_grows_expert_by_expert():
    inputs = batch()
    config = MoELoraConfig(r=2, router_type="learned", num_experts=3, **BESIDE)
    model = get_peft_model(native_model("mixtral"), config, "expert_0")
    for i in (1, 2):
        model.add_adapter(f"expert_{i}", config)
    noisy(model)
    assert model.base_model.routing.num_experts == 3
    _, grads = gradients(model.train(), inputs)
    assert len([name for name in grads if "lora_B.expert_2" in name]) == 2
    model.delete_adapter("expert_1")
    assert model(**inputs).loss.isfinite()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    results = []
    for checkpoints in (False, True):
        model = ours(native_model("mixtral"), **BESIDE).train()
        if checkpoints:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(gradients(model, batch()))
    (expected_loss, expected), (loss, grads) = results
    torch.testing.assert_close(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_float32_experts_on_a_bfloat16_base():
    model = ours(native_model("qwen3_moe", torch.bfloat16), **BESIDE)
    layer = layers_of(model)[0]
    assert layer.lora_A["default"].weight.dtype is torch.float32
    _, grads = gradients(model, batch())
    assert all(grad.isfinite().all() and grad.dtype is torch.float32 for grad in grads.values())
    exact = ours(native_model("qwen3_moe"), **BESIDE)
    expected, logits = exact(**batch(labels=False)).logits, model(**batch(labels=False)).logits
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def test_without_routing_there_is_nothing_to_act_beside():
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(native_model("mixtral"), MoELoraConfig(target_modules=["mlp.experts"], use_moe_routing=False))


def test_neither_merged_nor_exported(tmp_path):
    from moelora.experts import to_lora

    model = ours(native_model("mixtral"), **BESIDE | {"router_type": "fixed"})
    with pytest.raises(ValueError, match="cannot merge: experts beside"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"beside the native ones of `model\.layers\.0\.mlp\.experts`"):
        to_lora(model, 0)


@pytest.mark.parametrize("targets", [BESIDE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}], ids=str)
def test_fewer_experts(targets):
    """Of ours: what is left computes as the whole did where the others had no weight; native pairs stay whole."""
    from moelora.experts import put_together, select, take_apart

    inputs = batch(labels=False)
    model = ours(native_model("mixtral"), **targets)
    weights = torch.rand(3, 7, 3, generator=torch.Generator().manual_seed(5))
    expected = model(**inputs, routing_weights=nn.functional.pad(weights, (0, 1))).logits
    smaller = put_together(model, select(take_apart(model), [0, 1, 2]))
    torch.testing.assert_close(smaller(**inputs, routing_weights=weights).logits, expected, rtol=1e-5, atol=1e-5)


def balancing(model, **options):
    """Loss, the base's own balancing loss, ours, and the gradients of the adapter, of one training forward."""
    model.train()
    model.zero_grad()
    output = model(**batch(), **options)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, model.base_model.balancing_loss, grads


@pytest.mark.parametrize("kind", ["target_parameters", "beside"])
def test_balancing_losses_of_both_routers_are_added_once_each(kind):
    coefs = {"router_aux_loss_coef": 0.25}
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    targets = targets | coefs if kind == "target_parameters" else BESIDE | coefs
    make = lambda **own: ours(native_model("mixtral", router_aux_loss_coef=0.5), **targets | own)  # noqa: E731
    output, our_loss, grads = balancing(make(), output_router_logits=True)
    neither, _, _ = balancing(make(router_aux_loss_coef=0.0), output_router_logits=False)
    assert output.aux_loss > 0.5 and our_loss > 0.5
    wanted = neither.loss + 0.5 * output.aux_loss + 0.25 * our_loss
    torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=1e-5)
    ours_alone, _, of_ours = balancing(make(), output_router_logits=False)
    base_alone, _, of_base = balancing(make(router_aux_loss_coef=0.0), output_router_logits=True)
    _, _, of_neither = balancing(make(router_aux_loss_coef=0.0), output_router_logits=False)
    torch.testing.assert_close(ours_alone.loss - neither.loss, 0.25 * our_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base_alone.loss - neither.loss, 0.5 * output.aux_loss, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        parts = of_ours[name] + of_base[name] - of_neither[name]
        torch.testing.assert_close(grad, parts, rtol=1e-3, atol=1e-5, msg=name)
    changed = [name for name in grads if (of_ours[name] - of_neither[name]).abs().max() > 1e-6]
    assert any("lora_router" in name for name in changed)
    assert any((of_base[name] - of_neither[name]).abs().max() > 1e-6 for name in grads)


@torch.no_grad()
@pytest.mark.parametrize("first", ["beside", "pairs"])
def test_the_other_layout_is_refused_beside_one(first):
    layouts = {"beside": BESIDE, "pairs": {"target_modules": ["q_proj"], "target_parameters": EXPERTS}}
    fields = {"beside": "target_parameters", "pairs": "target_modules"}
    model, inputs = ours(native_model("mixtral"), **layouts.pop(first)), batch(labels=False)
    before, names = model(**inputs).logits, list(model.state_dict())
    with pytest.raises(ValueError, match=f"`{fields[first]}` of adapter 'other'.*in the same field"):
        model.add_adapter("other", MoELoraConfig(**next(iter(layouts.values()))))
    assert torch.equal(model(**inputs).logits, before) and list(model.state_dict()) == names


PAIRS_TOO = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}


@torch.no_grad()
def test_a_merged_expert_of_another_rank_leaves_pairs_where_they_are():
    from moelora.experts import MergeRecipe, merge_experts, put_together, take_apart

    model, inputs = ours(native_model("mixtral"), **PAIRS_TOO), batch(labels=False)
    weights = torch.rand(3, 7, 1, generator=torch.Generator().manual_seed(5))
    expected = model(**inputs, routing_weights=weights.expand(-1, -1, 4)).logits
    merged = merge_experts(take_apart(model), [0, 1], [0.5, 0.5], MergeRecipe(method="average"))
    smaller = put_together(model, merged.adapters)
    assert list(smaller.peft_config) == ["default", "expert_0"]
    doubled = weights * torch.tensor([1.0, 1.0, 2.0])  # the average of two stands for both
    torch.testing.assert_close(smaller(**inputs, routing_weights=doubled).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [[0], [2, 3]])
def test_experts_that_pairs_would_have_no_adapter_with_are_refused_first(kept):
    from moelora.experts import select, take_apart

    model = ours(native_model("mixtral"), **PAIRS_TOO, num_experts=2)
    model.add_adapter("expert_2", MoELoraConfig(r=2, target_modules=["q_proj"], router_type="learned"))
    model.add_adapter("expert_3", MoELoraConfig(r=2, target_modules=["q_proj"], router_type="learned"))
    with pytest.raises(ValueError, match=r"'default' adapts a base's native experts too.*keep more"):
        select(take_apart(model), kept)
