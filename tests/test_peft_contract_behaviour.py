"""What PEFT promises about adapters, kept for a mixture."""

import re

import peft
import pytest
import torch
from helpers import (
    ARCHITECTURES,
    IN_SCOPES,
    SCOPES,
    assert_clean,
    awaken,
    bert_classifier,
    config_for,
    every_pair,
    llama,
    mixture_of,
    routers_of,
    train_step,
)
from peft import LoraConfig, PeftModel, get_peft_model

from moelora import MoELoraConfig

INPUTS = ARCHITECTURES["llama"].batch(3, 7)
NO_LABELS = {"input_ids": INPUTS["input_ids"]}
E = 4


def logits(model, **kwargs):
    model.eval()
    with torch.no_grad():
        return model(**NO_LABELS, **kwargs).logits


def base_logits():
    return logits(llama())


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- subsets ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("subset", [["expert_2"], ["expert_3", "expert_1"], "expert_0"], ids=str)
def test_a_subset_is_a_smaller_mixture(scope, subset):
    """The same as a mixture that never had the others."""
    model = mixture_of("llama", experts=True, router_scope=scope)
    model.set_adapter(subset)
    names = [subset] if isinstance(subset, str) else subset
    assert model.active_adapters == names and model.base_model.routing.num_experts == len(names)
    assert all(name.split("expert_")[1][0] in {n[-1] for n in names} for name in trainable(model))
    actual = logits(model)
    small = mixture_of("llama", experts=True, router_scope=scope)
    for name in set(small.peft_config) - set(names):
        small.delete_adapter(name)
    small.set_adapter(subset)
    torch.testing.assert_close(actual, logits(small), rtol=0, atol=0)
    _, grads = train_step(model, INPUTS)
    assert set(grads) == trainable(model)
    model.set_adapter([f"expert_{i}" for i in range(E)])
    torch.testing.assert_close(logits(model), logits(mixture_of("llama", experts=True, router_scope=scope)))


def test_one_expert_alone_is_plain_lora():
    """Its weight is 1 for every token."""
    model = mixture_of("llama", experts=True)
    model.set_adapter("expert_1")
    lora = get_peft_model(
        llama(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=config_for(ARCHITECTURES["llama"]).target_modules)
    )
    with torch.no_grad():
        source = model.state_dict()
        for name, tensor in lora.state_dict().items():
            if "lora_" in name:
                tensor.copy_(source[name.replace("default", "expert_1")])
    torch.testing.assert_close(logits(model), logits(lora), rtol=1e-5, atol=1e-5)


def test_set_adapter_refuses_strangers():
    model = mixture_of("llama", experts=True)
    expected = logits(model)
    with pytest.raises(ValueError, match="'expert_9' does not exist"):
        model.set_adapter(["expert_0", "expert_9"])
    assert len(model.active_adapters) == E
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_order_of_adapters_is_the_order_of_experts():
    model = mixture_of("llama", experts=True).double()
    weights = torch.rand(3, E, dtype=torch.float64)
    expected = logits(model, routing_weights=weights)
    order = [2, 0, 3, 1]
    model.set_adapter([f"expert_{i}" for i in order])
    torch.testing.assert_close(logits(model, routing_weights=weights[:, order]), expected, rtol=0, atol=1e-10)


# ---- deleting ----


@pytest.mark.parametrize("victim", [0, 2, 3])
def test_delete_adapter_leaves_the_others(victim):
    model = mixture_of("llama", experts=True)
    model.base_model.set_requires_grad("expert_1", False)
    before = trainable(model)
    model.delete_adapter(f"expert_{victim}")
    rest = [f"expert_{i}" for i in range(E) if i != victim]
    assert model.active_adapters == rest and list(model.peft_config) == rest and model.active_adapter in rest
    assert trainable(model) == {name for name in before if f"expert_{victim}" not in name}
    assert not [name for name in model.state_dict() if f"expert_{victim}" in name]
    reference = mixture_of("llama", experts=True)
    reference.set_adapter(rest)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)
    train_step(model, INPUTS)
    assert model.generate(**NO_LABELS, max_new_tokens=2).shape == (3, 9)


def test_delete_an_inactive_adapter():
    model = mixture_of("llama", experts=True)
    model.set_adapter(["expert_0", "expert_1"])
    expected = logits(model)
    model.delete_adapter("expert_3")
    assert model.active_adapters == ["expert_0", "expert_1"]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_delete_all_leaves_the_base_model():
    model = mixture_of("llama", experts=True)
    for i in range(E):
        model.delete_adapter(f"expert_{i}")
    torch.testing.assert_close(logits(model.base_model.model), base_logits(), rtol=0, atol=0)


def test_adding_to_an_emptied_model():
    model = mixture_of("llama")
    model.delete_adapter("default")
    model.add_adapter("again", config_for(ARCHITECTURES["llama"]))
    assert model.active_adapters == ["again"]
    torch.testing.assert_close(logits(model), base_logits(), rtol=0, atol=1e-6)


def test_delete_refuses_strangers():
    with pytest.raises(ValueError, match="does not exist"):
        mixture_of("llama").delete_adapter("nobody")


# ---- status ----


@pytest.mark.parametrize("experts", [False, True], ids=["whole", "expert-by-expert"])
def test_status(experts, capsys):
    model = mixture_of("llama", experts=experts)
    names = [f"expert_{i}" for i in range(E)] if experts else ["default"]
    layers = model.get_layer_status()
    assert len(layers) == 16  # 7 linears and a router in each block
    for layer in layers:
        assert layer.enabled and layer.active_adapters == names and layer.available_adapters == sorted(names)
        assert layer.merged_adapters == [] and set(layer.requires_grad.values()) == {True}
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == names and status.merged_adapters == []
    expected = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert status.trainable_params == expected
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert re.search(rf"trainable params: {expected:,} ", printed)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# ---- merging and unloading ----


@every_pair(name=ARCHITECTURES, scope=SCOPES, experts=[False, True])
def test_fixed_routing_merges_exactly(name, scope, experts):
    model = mixture_of(name, router_scope=scope, router_type="fixed", experts=experts, routing_scale=1.5)
    model.set_routing_weights([0.5, 0.1, -0.3, 1.0])
    inputs = ARCHITECTURES[name].batch(labels=False)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        base = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(base(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - ARCHITECTURES[name].build()(**inputs).logits).abs().max() > 1e-2
    assert_clean(base)


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity"])
def test_learned_routing_refuses_to_merge(how, router_type):
    model = mixture_of("llama", router_type=router_type)
    expected = logits(model)
    with pytest.raises(ValueError, match=rf"cannot merge.*{router_type}.*\"fixed\""):
        getattr(model, how)()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_attached_router_refuses_to_merge():
    model = mixture_of("llama", router_type="fixed")
    model.attach_router(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"attached router.*detach_router"):
        model.merge_and_unload()


def test_user_weights_on_merged_layers_are_refused():
    """Merged, the delta is in the base weights; weights by hand cannot act and must not pretend to."""
    model = mixture_of("llama", router_type="fixed")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"`routing_weights` cannot act on merged experts.*unmerge_adapter"):
        logits(model, routing_weights=torch.eye(E)[:3])


@pytest.mark.parametrize(("name", "scope"), IN_SCOPES)
def test_unload_gives_the_base_model_back(name, scope):
    model = mixture_of(name, router_scope=scope)
    inputs = ARCHITECTURES[name].batch(labels=False)
    base = model.unload()
    with torch.no_grad():
        torch.testing.assert_close(base(**inputs).logits, ARCHITECTURES[name].build()(**inputs).logits, rtol=0, atol=0)
    assert_clean(base)
    again = get_peft_model(base, config_for(ARCHITECTURES[name], router_scope=scope))
    awaken(again)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, mixture_of(name, router_scope=scope)(**inputs).logits)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_trained_beside_the_experts(bias):
    """As PEFT trains them: no router weighs them, those of adapted linears alone or every one."""
    model = mixture_of("bert", bias=bias)
    adapted = {f"{name}.base_layer.bias" for name, module in model.named_modules() if hasattr(module, "lora_A")}
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert adapted and adapted < every
    _, grads = train_step(model, ARCHITECTURES["bert"].batch())
    learned = {name for name, grad in grads.items() if name.endswith("bias") and grad.abs().max() > 0}
    # A bias on keys moves all scores of a query alike.
    assert {name for name in adapted if "key" not in name} <= learned <= (adapted if bias == "lora_only" else every)
    assert (learned <= adapted) == (bias == "lora_only")


def test_weighted_adapters_are_refused():
    model = mixture_of("llama", experts=True)
    with pytest.raises(ValueError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["expert_0", "expert_1"], [0.5, 0.5], "mixed")


# ---- LoraConfig's options ----


def test_layers_to_transform():
    model = mixture_of("llama", layers_to_transform=[1])
    assert list(routers_of(model)) == ["model.layers.1"]
    assert trainable(model) and all("layers.1" in name for name in trainable(model))
    _, grads = train_step(model, INPUTS)
    assert set(grads) == trainable(model)
    weights = torch.rand(3, 7, E)
    assert (logits(model, routing_weights=weights) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("num_experts", [4, 7])
def test_patterns_describe_one_expert(use_rslora, num_experts):
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 10}}
    options = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora, **patterns}
    model = mixture_of("llama", num_experts=num_experts, **options)
    lora = get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], **options))
    attention = model.base_model.model.model.layers[0].self_attn
    expected = lora.base_model.model.model.layers[0].self_attn
    for target in ("q_proj", "k_proj", "v_proj"):
        one, plain = getattr(attention, target), getattr(expected, target)
        assert one.lora_A["default"].weight.shape[0] == num_experts * plain.lora_A["default"].weight.shape[0]
        assert one.scaling["default"] == pytest.approx(plain.scaling["default"]), target
    assert model.peft_config["default"].r == 4 and model.peft_config["default"].lora_alpha == 6
    assert model.peft_config["default"].rank_pattern == {"q_proj": 3}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("routed", [True, False])
def test_heads_of_tasks_are_noted_as_by_lora(task, routed, tmp_path):
    """PEFT's wrappers write the heads into the configuration that they were given, two of them when it is in use."""
    given = MoELoraConfig(r=2, target_modules=["query"], task_type=task, use_moe_routing=routed)
    model = get_peft_model(bert_classifier(), given)
    lora = get_peft_model(bert_classifier(), LoraConfig(r=2, target_modules=["query"], task_type=task))
    assert model.peft_config["default"] is given
    assert given.modules_to_save == lora.peft_config["default"].modules_to_save != []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert_classifier(), tmp_path).eval()
    torch.testing.assert_close(loaded(**NO_LABELS).logits, model(**NO_LABELS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("experts", [False, True], ids=["whole", "expert-by-expert"])
def test_modules_to_save(experts):
    config = MoELoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", num_experts=3)
    if experts:
        model = get_peft_model(bert_classifier(), config, adapter_name="expert_0")
        for i in range(1, 3):
            model.add_adapter(f"expert_{i}", config)
        assert model.active_adapters == ["expert_0", "expert_1", "expert_2"]
    else:
        model = get_peft_model(bert_classifier(), config)
    awaken(model)
    inputs = {"input_ids": INPUTS["input_ids"], "labels": torch.tensor([0, 1, 2])}
    _, grads = train_step(model, inputs)
    assert any("classifier.modules_to_save" in name for name in grads)
    assert sum("lora_router" in name for name in grads) == (6 if experts else 2)
    copies = [name for name in grads if name.endswith("weight") and "classifier.modules_to_save" in name]
    assert len(copies) == 1, "one head is active, or the task would have several answers"
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_no_routing_is_plain_lora_to_the_bit():
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.1,
    }
    torch.manual_seed(3)
    ours = get_peft_model(llama(), MoELoraConfig(use_moe_routing=False, **options))
    torch.manual_seed(3)
    theirs = get_peft_model(llama(), peft.LoraConfig(**options))
    awaken(ours), awaken(theirs)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    torch.manual_seed(4)
    loss, grads = train_step(ours, INPUTS)
    torch.manual_seed(4)
    loss2, grads2 = train_step(theirs, INPUTS)
    assert torch.equal(loss, loss2) and all(torch.equal(grads[name], grads2[name]) for name in grads2)
    with pytest.raises(ValueError, match=r"`routing_weights` needs a mixture"):
        ours(**NO_LABELS, routing_weights=torch.ones(3, E))
    torch.testing.assert_close(
        ours.merge_and_unload()(**NO_LABELS).logits, theirs.merge_and_unload()(**NO_LABELS).logits
    )


def test_a_merged_mixture_reports_itself_merged():
    model = mixture_of("llama", router_type="fixed")
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
